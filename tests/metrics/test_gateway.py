"""A whole gateway around the null engine under a known load: what it tells against what happened."""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.metrics.cells import quantile
from synthia_vllm.settings import Settings
from tests.gateway.asgi import post
from tests.prometheus_service import promtool

USERS = {"alice": 5, "bob": 8}  # requests
TOKENS, PROMPT = 20, [1] * 40


class Load:
    """A gateway with keys, and its clients."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.keys = {user: gateway.keys.create(user)[1] for user in USERS}
        self.admin = gateway.keys.create("ops", admin=True)[1]
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.durations: list[float] = []

    async def ask(self, user: str, **body: Any) -> int:
        """One streamed completion, timed as a client does; returns the status."""
        times = [perf_counter()]
        whole = {"model": "synthia", "prompt": PROMPT, "max_tokens": TOKENS, "stream": True, **body}
        answer = await post(
            self.gateway.app,
            whole,
            headers={"x-api-key": self.keys.get(user, "none")},
            on_token=lambda: times.append(perf_counter()),
        )
        if answer.tokens:
            self.durations.append(perf_counter() - times[0])
            self.firsts.append(times[1] - times[0])
            self.gaps += [after - before for before, after in pairwise(times[1:])]
        return answer.status

    async def get(self, path: str, key: str | None = None, **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get(path, headers={"x-api-key": self.admin if key is None else key, **headers})


@pytest.fixture
async def load(tmp_path: Path) -> AsyncIterator[Load]:
    settings = Settings(
        access={"mode": "keys", "database": f"sqlite:///{tmp_path}/keys.db", "secret": "x" * 32},
        limits={"tokens_per_minute": 10_000},
        log={"requests": False},
    )  # type: ignore[arg-type]
    engine = NullEnginePort(tokens_per_second=100, prefill_s=0.03, context=100_000)
    async with Gateway(engine, settings) as gateway:
        yield Load(gateway)


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == f"synthia_{name}"
    }


async def test_counters_equal_the_truth(load: Load) -> None:
    await asyncio.gather(*(load.ask(user) for user, count in USERS.items() for _ in range(count)))
    for user in USERS:
        assert await load.ask(user, stream=False) == 200
    assert await load.ask("alice", max_tokens=20_000) == 400  # over its limit for a minute by itself
    assert await load.ask("alice", max_tokens=9_900) == 429
    assert await load.ask("nobody") == 401
    page = (await load.get("/metrics")).text
    route = "/v1/completions"
    prompt = len(PROMPT)
    assert samples(page, "requests_total") == {
        ("alice", "synthia", route, "finished"): 6,
        ("bob", "synthia", route, "finished"): 9,
        ("alice", "synthia", route, "rejected"): 2,
        ("anonymous", "other", route, "rejected"): 1,
    }
    assert samples(page, "generation_tokens_total") == {
        ("alice", "synthia"): 6 * TOKENS,
        ("bob", "synthia"): 9 * TOKENS,
    }
    assert samples(page, "prompt_tokens_total") == {("alice", "synthia"): 6 * prompt, ("bob", "synthia"): 9 * prompt}
    assert samples(page, "rejections_total") == {
        ("alice", "tokens_per_minute"): 2,
        ("anonymous", "unauthorized"): 1,
    }
    assert samples(page, "slo_requests_total") == {
        (user, result): count
        for user, met in (("alice", 6), ("bob", 9))
        for result, count in (("met", met), ("missed", 0))
    }
    cost = prompt + 2 * TOKENS
    assert samples(page, "fair_service_total") == {("alice",): 6 * cost, ("bob",): 9 * cost}
    assert samples(page, "time_to_first_token_seconds_count") == {("synthia", "alice"): 5, ("synthia", "bob"): 8}
    assert samples(page, "inter_token_latency_seconds_count") == {
        ("synthia", "alice"): 5 * (TOKENS - 1),
        ("synthia", "bob"): 8 * (TOKENS - 1),
    }
    assert samples(page, "request_duration_seconds_count") == {("synthia", "alice"): 6, ("synthia", "bob"): 9}
    assert samples(page, "queue_wait_seconds_count") == {("synthia", "alice"): 6, ("synthia", "bob"): 9}
    assert samples(page, "requests_in_flight") == {("alice",): 0, ("bob",): 0, ("anonymous",): 0}


async def test_the_counters_equal_the_bill_also_for_those_who_left(load: Load) -> None:
    task = asyncio.create_task(load.ask("alice", max_tokens=500))
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    load.gateway.ledger.flush()
    live = (await load.get("/admin/usage")).json()
    page = (await load.get("/metrics")).text
    assert [(row["prompt_tokens"], row["generated_tokens"]) for row in live if row["name"] == "alice"] == [
        (samples(page, "prompt_tokens_total")["alice", "synthia"], told)
        for told in samples(page, "generation_tokens_total").values()
    ]


async def test_quantiles_are_within_a_bucket_of_the_clients_own(load: Load) -> None:
    await asyncio.gather(*(load.ask(user) for user, count in USERS.items() for _ in range(count)))
    recorder = load.gateway.exporter.recorder
    for table, measured in (
        (recorder.first_token, load.firsts),
        (recorder.gaps, load.gaps),
        (recorder.duration, load.durations),
    ):
        bounds = table.family.buckets
        own = quantiles(measured, n=100, method="inclusive")
        for q in (50, 90, 99):
            told = quantile(bounds, table.total(), q / 100)
            assert told is not None
            assert abs(bisect_left(bounds, told) - bisect_left(bounds, own[q - 1])) <= 1, (table.family.name, q)


async def test_promtool_finds_nothing_to_say_about_our_series(load: Load) -> None:
    await load.ask("alice")
    await load.ask("nobody")
    page = (await load.get("/metrics")).text
    done = promtool("check", "metrics", stdin=page)
    # vLLM's own, which are there where a test of this process has met vLLM, it would name otherwise.
    assert [line for line in (done.stderr + done.stdout).splitlines() if not line.startswith("vllm:")] == []


async def test_the_page_is_the_operators(load: Load) -> None:
    for path in ("/metrics", "/sd", "/admin/live"):
        assert (await load.get(path, key="none")).status_code == 401
        assert (await load.get(path, key=load.keys["bob"])).status_code == 403
        assert (await load.get(path)).status_code == 200


async def test_openmetrics_with_exemplars_for_who_asks(load: Load) -> None:
    await load.ask("alice")
    reply = await load.get("/metrics", accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert "request_id=" in reply.text
    assert reply.text.endswith("# EOF\n")
    plain = await load.get("/metrics", accept="text/plain")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "request_id=" not in plain.text


async def test_the_live_view_tells_who_and_where(load: Load) -> None:
    await asyncio.gather(*(load.ask(user) for user in ("alice", "alice", "bob")))
    load.gateway.exporter.history.step(running=3, queued=1)
    view = (await load.get("/admin/live")).json()
    assert [(user["user"], user["generation_tokens"], user["slo_met"]) for user in view["users"][:2]] == [
        ("alice", 2 * TOKENS, 2),
        ("bob", TOKENS, 1),
    ]
    assert sum(user["share"] for user in view["users"]) == pytest.approx(1.0)
    (replica,) = view["replicas"]
    assert (replica["name"], replica["state"]) == ("local", "up")
    assert replica["generation_per_s"] > 0
    history = view["history"]
    assert {len(values) for values in history.values() if isinstance(values, list)} == {1}
    assert history["running"] == [3]
    assert 0.03 <= history["ttft_p50"][0] <= 1
    assert history["itl_p50"][0] is not None
    assert (view["slo"]["met"], view["slo"]["missed"]) == (3, 0)
    assert view["slo"]["burn_rate"] == {"5m": 0.0, "1h": 0.0, "6h": 0.0}


async def test_the_history_is_bounded(load: Load) -> None:
    for _ in range(500):
        load.gateway.exporter.history.step(0, 0)
    assert len(load.gateway.exporter.live()["history"]["at"]) == 180
