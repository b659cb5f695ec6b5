"""What is counted of one reply, with a clock that the test turns."""

from typing import Any

import pytest

from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.observers.metrics import Metrics
from synthia_vllm.gateway.request import Exchange
from synthia_vllm.metrics.recorder import Recorder, Waiting
from synthia_vllm.metrics.sketch import quantiles
from synthia_vllm.settings import MetricsSettings, SloSettings
from tests.gateway.layers import make_exchange, make_request


class Bench:
    """A recorder, and replies that go out at given seconds after their arrival."""

    def __init__(self, **settings: Any) -> None:
        self.now = 100.0
        self.recorder = Recorder(MetricsSettings(**settings), SloSettings(), clock=lambda: self.now)
        self.metrics = Metrics(self.recorder)

    def open(
        self,
        user: str = "alice",
        *,
        priority: Any = "interactive",
        weight: float = 1.0,
        streamed: bool = True,
        exact: bool = True,
        prompt: int = 7,
        accepted: bool = True,
        **fields: Any,
    ) -> Exchange:
        account = Account(user, priority=priority, weight=weight)
        exchange = make_exchange(make_request(account=account, prompt=prompt, streamed=streamed, exact=exact))
        exchange.arrived, exchange.status = self.now, 200
        usage = exchange.usage
        usage.accepted, usage.dispatched = accepted, self.now if accepted else None
        for name, value in fields.items():
            setattr(usage if name == "replica" else exchange, name, value)
        self.metrics.opened(exchange)
        return exchange

    def send(self, exchange: Exchange, seconds: float, tokens: int = 1, chunks: int = 1) -> None:
        self.now += seconds
        exchange.usage.generated += tokens
        self.metrics.sent(exchange, chunks, tokens)

    def end(self, exchange: Exchange, outcome: Any = "finished", seconds: float = 0.0) -> None:
        self.now += seconds
        exchange.outcome, exchange.ended = outcome, self.now
        self.metrics.ended(exchange)

    def gaps(self) -> dict[float, int]:
        """Observations by the upper bound of their bucket."""
        table = self.recorder.gaps
        bounds = (*table.family.buckets, float("inf"))
        counts = map(sum, zip(*(cell.counts for cell in table.cells.values()), strict=True))
        return {bound: count for bound, count in zip(bounds, counts, strict=False) if count}

    def judged(self) -> str | None:
        cells = {labels[1]: cell.value for labels, cell in self.recorder.slo_requests.cells.items() if cell.value}
        assert sum(cells.values()) <= 1
        return next(iter(cells), None)


def test_one_gap_a_chunk_however_many_tokens_it_has() -> None:
    bench = Bench()
    exchange = bench.open()
    bench.send(exchange, 0.04)
    bench.send(exchange, 0.04, tokens=3)
    bench.send(exchange, 0.04)
    assert bench.gaps() == {0.05: 2}
    first = bench.recorder.first_token.cell("synthia")
    assert (sum(first.counts), first.sum) == (1, pytest.approx(0.04))
    assert bench.recorder.generation_tokens.cell("alice", "synthia").value == 5


def test_chunks_that_go_out_together_have_a_gap_and_zeros() -> None:
    bench = Bench()
    exchange = bench.open()
    bench.send(exchange, 0.04, tokens=2, chunks=2)
    bench.send(exchange, 0.04, tokens=3, chunks=3)
    assert bench.gaps() == {0.05: 1, 0.0002: 3}
    assert bench.recorder.gaps.cell("synthia").sum == pytest.approx(0.04)


def test_the_live_views_latencies_are_finer_than_the_buckets() -> None:
    bench = Bench()
    exchange = bench.open()
    bench.now += 0.05
    exchange.usage.dispatched = bench.now
    bench.send(exchange, 0.066)
    for gap in (0.0118, 0.0118, 0.0118, 0.0118, 0.31):
        bench.send(exchange, gap)
    bench.send(exchange, 0.0118, tokens=5, chunks=5)
    bench.end(exchange)
    told = {name: quantiles(sketch.counts, 0.5, 1.0) for name, sketch in bench.recorder.latencies.items()}
    assert told == {
        "ttft": pytest.approx([0.116, 0.116], rel=0.01),
        "queue": pytest.approx([0.05, 0.05], rel=0.01),
        "engine": pytest.approx([0.066, 0.066], rel=0.01),
        "itl": pytest.approx([0.0118, 0.31], rel=0.01),
    }


def test_what_is_told_of_one_that_is_not_streamed_is_counted_at_its_end() -> None:
    bench = Bench()
    exchange = bench.open(streamed=False)
    exchange.usage.generated = 5
    bench.end(exchange, seconds=1.0)
    assert bench.recorder.generation_tokens.cell("alice", "synthia").value == 5
    assert bench.recorder.prompt_tokens.cell("alice", "synthia").value == 7
    assert not bench.recorder.first_token.cells
    assert bench.gaps() == {}


def test_what_the_engine_refused_cost_nothing() -> None:
    bench = Bench()
    exchange = bench.open(status=502)
    exchange.usage.accepted = False
    bench.end(exchange, "failed")
    assert not bench.recorder.prompt_tokens.cells
    assert not bench.recorder.service.cells


@pytest.mark.parametrize("route", ["/health", "/ready", "/metrics", "/sd"])
def test_what_machines_ask_all_the_time_is_not_counted(route: str) -> None:
    bench = Bench()
    bench.end(bench.open(route=route, request=None, accepted=False))
    assert not bench.recorder.requests.cells


def test_the_tokens_of_a_stream_are_counted_as_they_come_and_once() -> None:
    bench = Bench()
    exchange = bench.open()
    bench.send(exchange, 0.1, tokens=2)
    prompt, generated = bench.recorder.prompt_tokens, bench.recorder.generation_tokens
    assert (prompt.cell("alice", "synthia").value, generated.cell("alice", "synthia").value) == (7, 2)
    exchange.usage.generated = 5  # by the engine's last word
    bench.end(exchange)
    assert (prompt.cell("alice", "synthia").value, generated.cell("alice", "synthia").value) == (7, 5)


def test_an_estimate_of_the_prompt_is_not_counted() -> None:
    bench = Bench()
    exchange = bench.open(exact=False, prompt=1000)
    bench.send(exchange, 0.1)
    assert not bench.recorder.prompt_tokens.cells
    exchange.usage.prompt = 9
    bench.end(exchange)
    assert bench.recorder.prompt_tokens.cell("alice", "synthia").value == 9


def test_tokens_go_to_the_replica_that_made_them() -> None:
    bench = Bench()
    exchange = bench.open(replica="a")
    bench.send(exchange, 0.1)
    exchange.usage.replica = "b"
    bench.send(exchange, 0.1, tokens=2)
    tokens = {replica: (t.prompt, t.generation) for (_, replica), t in bench.recorder.rates.totals.items()}
    assert tokens == {"a": (7, 1), "b": (0, 2)}


def test_service_is_cost_over_weight() -> None:
    bench = Bench()
    exchange = bench.open(weight=2.0)
    bench.send(exchange, 0.1, tokens=10)
    bench.end(exchange)
    assert bench.recorder.service.cell("alice").value == (7 + 2 * 10) / 2


@pytest.mark.parametrize(
    ("first", "gap", "outcome", "status", "priority", "judged"),
    [
        (1.0, 0.1, "finished", 200, "interactive", "met"),
        (2.5, 0.1, "finished", 200, "interactive", "missed"),
        (1.0, 0.3, "finished", 200, "interactive", "missed"),
        (2.5, 0.3, "finished", 200, "batch", "met"),
        (601.0, 0.1, "finished", 200, "batch", "missed"),
        (1.0, 0.1, "cancelled", 200, "interactive", None),
        (2.5, 0.1, "cancelled", 200, "interactive", "missed"),
        (1.0, 0.1, "failed", 200, "interactive", "missed"),
        (1.0, 0.1, "stopped", 200, "interactive", "missed"),
    ],
)
def test_a_request_meets_or_misses_the_targets_of_its_class(
    first: float, gap: float, outcome: str, status: int, priority: str, judged: str | None
) -> None:
    bench = Bench()
    exchange = bench.open(priority=priority, status=status)
    bench.send(exchange, first)
    bench.send(exchange, gap)
    bench.end(exchange, outcome)
    assert bench.judged() == judged


@pytest.mark.parametrize(
    ("status", "judged"), [(429, None), (400, None), (401, None), (503, "missed"), (502, "missed")]
)
def test_what_we_refuse_for_want_of_room_is_missed_and_a_clients_own_limit_is_not(
    status: int, judged: str | None
) -> None:
    bench = Bench()
    bench.end(bench.open(status=status, accepted=False), "rejected")
    assert bench.judged() == judged


@pytest.mark.parametrize(
    ("status", "outcome", "reason", "result"),
    [
        (200, "finished", "", None),
        (200, "cancelled", "", None),
        (200, "failed", "upstream_lost", "failed"),
        (200, "stopped", "", "failed"),
        (500, "failed", "internal", "failed"),
        (502, "rejected", "upstream_lost", "failed"),
        (504, "failed", "upstream_timeout", "failed"),
        (429, "rejected", "requests_per_minute", "refused"),
        (400, "rejected", "tokens_per_minute", "refused"),
        (503, "rejected", "queue_timeout", "refused"),
        (503, "failed", "overloaded", "refused"),
        (400, "rejected", "bad_request", None),
        (401, "rejected", "unauthorized", None),
    ],
)
def test_errors_and_refusals_are_counted_apart_from_a_clients_own_mistakes(
    status: int, outcome: str, reason: str, result: str | None
) -> None:
    bench = Bench()
    bench.end(bench.open(status=status, reason=reason, accepted=status == 200), outcome)
    expected = {"requests": 1, "failed": 0, "refused": 0}
    assert bench.recorder.results == (expected | {result: 1} if result else expected)


@pytest.mark.parametrize("fields", [{"route": "/admin/live"}, {"route": "/v1/models"}, {"route": "/metrics"}])
def test_who_only_looks_is_no_request_of_the_error_rate(fields: dict[str, str]) -> None:
    bench = Bench()
    bench.end(bench.open(method="GET", request=None, accepted=False, **fields))
    assert bench.recorder.results["requests"] == 0


@pytest.mark.parametrize(("streamed", "judged"), [(True, "missed"), (False, None)])
def test_a_client_that_left_while_waiting_too_long_was_missed(streamed: bool, judged: str | None) -> None:
    bench = Bench()
    bench.end(bench.open(streamed=streamed, status=0), "cancelled", seconds=3.0)
    assert bench.judged() == judged


def test_names_that_clients_make_up_are_one() -> None:
    bench = Bench(max_models=4)
    for number in range(100):
        bench.end(bench.open(model=f"m{number}", status=404, accepted=False), "rejected")
        bench.end(bench.open(model=f"m{number}", status=0, accepted=False), "cancelled")
    assert {labels[1] for labels in bench.recorder.requests.cells} == {"other"}
    for number in range(100):
        bench.end(bench.open(model=f"m{number}"))
    assert {labels[1] for labels in bench.recorder.requests.cells} == {"m0", "m1", "other"}


def test_routes_that_clients_make_up_are_one() -> None:
    bench = Bench()
    for number in range(100):
        bench.end(bench.open(route=f"/v1/models/{number}", request=None, accepted=False, status=401), "rejected")
        bench.end(bench.open(route=f"/admin/keys/{number}", request=None, accepted=False))
        bench.end(bench.open(route=f"/v1/usage/{number}", request=None, accepted=False))
    named = {"/v1/models/{id}", "/admin", "/v1/usage/{id}"}
    assert {labels[2] for labels in bench.recorder.requests.cells} == named


def size(bench: Bench) -> int:
    tables = bench.recorder.tables(Waiting({}, {}))
    return sum(piece.count("\n") for table in tables for piece in table.pieces(False))


def test_ten_thousand_users_do_not_grow_the_page() -> None:
    bench = Bench()
    for number in range(10_000):
        if number == 201:
            full = size(bench)
        exchange = bench.open(f"user-{number}")
        bench.send(exchange, 0.1)
        bench.send(exchange, 0.1)
        bench.end(exchange)
        bench.end(bench.open(f"user-{number}", status=429, accepted=False, reason="tokens_per_minute"), "rejected")
    assert size(bench) <= full + 2  # the outcomes that `other` had not met by then
    assert size(bench) < 2_600
    assert bench.recorder.generation_tokens.cell("other", "synthia").value == 2 * 9_800


def test_latencies_are_by_user_on_request_alone() -> None:
    for asked, labels in ((False, ("synthia",)), (True, ("synthia", "alice"))):
        bench = Bench(user_histograms=asked)
        exchange = bench.open()
        bench.send(exchange, 0.1)
        bench.send(exchange, 0.1)
        bench.end(exchange)
        recorder = bench.recorder
        tables = (recorder.first_token, recorder.gaps, recorder.duration, recorder.queue_wait)
        assert [list(table.cells) for table in tables] == [[labels]] * 4
        page = "".join(piece for table in recorder.tables(Waiting({}, {})) for piece in table.pieces(False))
        assert ('_bucket{model="synthia",user="alice",le="' in page) == asked


def test_those_who_wait_beyond_the_cap_are_summed() -> None:
    bench = Bench(max_users=2)
    for user in ("a", "b", "c"):
        bench.end(bench.open(user))
    tables = {table.family.name: table for table in bench.recorder.tables(Waiting({"c": 2, "d": 3}, {"a": 1}))}
    in_flight = "".join(tables["synthia_requests_in_flight"].pieces(False))
    assert in_flight.splitlines() == [
        'synthia_requests_in_flight{user="a"} 0',
        'synthia_requests_in_flight{user="b"} 0',
        'synthia_requests_in_flight{user="other"} 5',
    ]
    queued = "".join(tables["synthia_requests_queued"].pieces(False))
    assert 'synthia_requests_queued{user="a"} 1' in queued
