"""What is sent, and when; and which measurements count."""

import asyncio
import random
import statistics
import time
from typing import Any

import pytest

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.clients import Clients, shares
from synthia_vllm.bench.conversations import Conversations
from synthia_vllm.bench.measuring import Terms, Workload, lateness, measure
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.prompts import Prompts, Span
from synthia_vllm.bench.run_file import Measurement, Request
from synthia_vllm.bench.trace import Row, Trace
from synthia_vllm.bench.users import Population, Users
from synthia_vllm.bench.workloads import ClosedLoop, OpenLoop, arrivals
from tests.gateway.live import serving

SHORT = Span(8, 8)


class Noting(NullEngine):
    """Knows the most requests that it had at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.most = 0

    async def _begin(self, *request: Any) -> None:
        self.most = max(self.most, self.running + 1)
        await super()._begin(*request)


async def run(engine: NullEngine, workload: Workload, terms: Terms | None = None, **target: Any) -> Measurement:
    with serving(engine) as port:
        where = Target(f"http://127.0.0.1:{port}", "null", **target)
        return await measure(where, workload, terms or Terms(), server="null", number=0)


async def test_a_closed_loop_keeps_so_many_requests_open() -> None:
    engine = Noting(tokens_per_second=200)
    found = await run(engine, ClosedLoop(4, 10, SHORT, SHORT))
    assert len(found.requests) == 10
    assert engine.most == 4
    assert all(len(body["prompt"]) == 8 for body in engine.asked)
    assert found.duration_s >= max(request.done_s for request in found.requests)


async def test_several_client_processes_make_one_load() -> None:
    engine = Noting(tokens_per_second=100)
    with Clients(3) as clients:
        found = await run(engine, ClosedLoop(7, 15, SHORT, SHORT), Terms(clients=clients))
        assert len(found.requests) == 15
        assert {request.error for request in found.requests} == {None}
        assert engine.most <= 7
        assert len({tuple(body["prompt"]) for body in engine.asked}) == 15  # none is sent twice
        assert all(request.sent_s >= request.due_s for request in found.requests)
        # All began at one moment, by one clock.
        assert sum(request.due_s == 0 for request in found.requests) == 7
        limited = await run(
            Noting(tokens_per_second=50), ClosedLoop(6, 60, SHORT, Span(1, 60)), Terms(clients=clients, limit_s=0.5)
        )
        assert limited.invalid  # whatever was under way in any of them was left out, and that is told


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "workload",
    [
        ClosedLoop(5, 11, SHORT, SHORT),
        OpenLoop(10, 3, SHORT, SHORT),
        OpenLoop(10, 0.2, SHORT, SHORT),
        OpenLoop(10, 3, SHORT, SHORT, burstiness=0.25),
        Conversations(2, 2, 0.1, 4, SHORT),
    ],
)
def test_shares_come_to_the_whole(workload: Workload, count: int) -> None:
    found = shares(workload, count)
    assert 1 <= len(found) <= count
    if workload.streams:
        assert sum(one.streams or 0 for one in found) == workload.streams
        assert all(one.streams for one in found)
    if isinstance(workload, ClosedLoop):
        assert sum(one.requests for one in found if isinstance(one, ClosedLoop)) == workload.requests
    if workload.rate:
        assert sum(one.rate or 0 for one in found) == pytest.approx(workload.rate)
    if not isinstance(workload, ClosedLoop) and getattr(workload, "burstiness", 0) != 1:
        assert found == [workload]


async def test_an_open_loop_has_no_cap() -> None:
    engine = Noting(prefill_s=1.0)
    found = await run(engine, OpenLoop(100, 0.3, SHORT, SHORT))
    assert engine.most == len(found.requests) == 30


async def test_the_same_seed_sends_the_same_and_a_salt_other_prompts_at_the_same_moments() -> None:
    workload = OpenLoop(200, 0.1, Span(4, 40), SHORT)
    engines = [Noting(), Noting(), Noting()]
    found = [
        await run(engine, workload, Terms(salt=""), salt=salt)
        for engine, salt in zip(engines, ("", "", "/x"), strict=True)
    ]
    prompts = [sorted(body["prompt"] for body in engine.asked) for engine in engines]
    assert prompts[0] == prompts[1] != prompts[2]
    moments = [[request.due_s for request in one.requests] for one in found]
    assert sorted(moments[0]) == sorted(moments[1]) == sorted(moments[2])
    lengths = [sorted(map(len, one)) for one in prompts]
    assert lengths[0] == lengths[2]


async def test_two_runs_of_one_seed_send_other_prompts_of_the_same_lengths_at_the_same_moments() -> None:
    workload = OpenLoop(200, 0.1, Span(4, 40), SHORT)
    engines = [Noting(), Noting()]
    found = [await run(engine, workload, Terms(seed=3)) for engine in engines]
    one, other = (sorted(tuple(body["prompt"]) for body in engine.asked) for engine in engines)
    assert not set(one) & set(other)
    assert sorted(map(len, one)) == sorted(map(len, other))
    assert [r.due_s for r in found[0].requests] == [r.due_s for r in found[1].requests]


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_gaps_are_gamma_distributed_and_fill_the_time(burstiness: float, variation: float) -> None:
    moments = arrivals(random.Random(3), 50, 200, burstiness)
    gaps = [b - a for a, b in zip([0.0, *moments], moments, strict=False)]
    assert len(moments) == 10_000
    assert moments[-1] == pytest.approx(200)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.1)


@pytest.mark.parametrize("chat", [True, False])
async def test_a_conversation_grows_in_the_synthia_format(chat: bool) -> None:
    engine = Noting()
    found = await run(engine, Conversations(1, 3, 0.01, 5, SHORT), chat=chat)
    assert len(found.requests) == 3
    if chat:
        assert [len(body["messages"]) for body in engine.asked] == [2, 4, 6]
        assert engine.asked[2]["messages"][:4] == [*engine.asked[1]["messages"]]
    else:
        prompts = [body["prompt"] for body in engine.asked]
        assert all(prompt.endswith("\nASSISTANT:") for prompt in prompts)
        assert prompts[1].startswith(prompts[0])
        assert prompts[2].startswith(prompts[1])


async def test_a_user_who_gets_no_answer_says_no_more() -> None:
    from synthia_vllm.bench.null.faults import Faults

    found = await run(Noting(faults=Faults(status=500)), Conversations(2, 3, 0.01, 5, SHORT))
    assert len(found.requests) == 2


async def test_a_trace_is_sent_at_its_moments() -> None:
    rows = (
        Row(arrival=5, prompt_tokens=3, output_tokens=2, user="a"),
        Row(arrival=5.4, prompt_tokens=4, output_tokens=1),
    )
    engine = Noting()
    found = await run(engine, Trace("t", rows, speed=2))
    assert [request.due_s for request in found.requests] == [0, 0.2]
    assert [request.user for request in found.requests] == ["a", ""]
    assert [len(body["prompt"]) for body in engine.asked] == [3, 4]
    assert found.requests[1].sent_s >= 0.2


async def test_populations_send_side_by_side() -> None:
    steady = Population(name="steady", rate=50, output_tokens=SHORT)
    heavy = Population(name="heavy", streams=3, output_tokens=SHORT, weight=2)
    found = await run(Noting(tokens_per_second=200), Users((steady, heavy), 0.3))
    assert found.weights == {"steady": 1, "heavy": 2}
    users = [request.user for request in found.requests]
    assert users.count("steady") == 15
    assert users.count("heavy") > 6


async def test_the_limit_leaves_out_what_was_under_way_and_keeps_what_counts() -> None:
    # One at a time, as the card's script does: nothing of the others has come.
    engine = NullEngine(prefill_s=0.2, max_num_seqs=1)
    found = await run(engine, ClosedLoop(8, 16, SHORT, SHORT), Terms(limit_s=0.5))
    assert 1 <= len(found.requests) <= 3
    assert not any("under way" in why for why in found.invalid)


async def test_a_limit_that_cuts_into_replies_makes_a_measurement_invalid() -> None:
    found = await run(NullEngine(tokens_per_second=30), ClosedLoop(4, 8, SHORT, Span(20, 20)), Terms(limit_s=1.0))
    assert any("under way" in why for why in found.invalid)


async def test_a_client_that_is_held_up_says_so() -> None:
    async def hold_up() -> None:
        await asyncio.sleep(0.1)
        time.sleep(0.3)  # noqa: ASYNC251

    held = asyncio.create_task(hold_up())
    found = await run(NullEngine(), OpenLoop(100, 0.5, SHORT, SHORT))
    await held
    assert len(found.invalid) == 1
    assert "could not keep its schedule" in found.invalid[0]


@pytest.mark.parametrize(
    ("late", "ttft", "valid"), [(0.004, 0.01, True), (0.006, 0.01, False), (0.04, 1.0, True), (0.06, 1.0, False)]
)
def test_how_late_a_client_may_be_depends_on_what_it_measures(late: float, ttft: float, valid: bool) -> None:
    requests = [Request(due_s=0, sent_s=late, chunk_s=[late + ttft], done_s=late + ttft)] * 3
    assert (lateness(requests) == []) is valid


def test_prompts_have_the_length_that_is_asked_for_and_no_beginning_in_common() -> None:
    prompts = Prompts("seed")
    found = [tuple(prompts.ids(16)) for _ in range(100)]
    assert {len(ids) for ids in found} == {16}
    assert len({ids[:4] for ids in found}) == 100


async def test_streams_that_are_spread_begin_one_after_the_other() -> None:
    found = await run(NullEngine(), ClosedLoop(4, 4, SHORT, SHORT, spread_s=0.2))
    assert [request.due_s for request in found.requests] == pytest.approx([0.0, 0.05, 0.1, 0.15])
    assert all(request.sent_s >= request.due_s for request in found.requests)
