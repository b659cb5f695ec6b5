"""/ready: an engine that generates, or one that only lives."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine import local
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway import readiness
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.readiness import Readiness
from synthia_vllm.gateway.request import Usage
from tests.gateway.layers import make_exchange, make_request
from tests.gateway.live import serving
from tests.gateway.stack import Stack
from tests.gateway.whole import house_settings


class Counted(NullEnginePort):
    """Notes how often it is asked whether it is ready, and takes a moment to say so."""

    asked = 0

    async def ready(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0)
        return await super().ready()


class InLine(NullEnginePort):
    """Is asked as vLLM is: by a canary that waits in line."""

    _canaries = 0

    async def ready(self) -> bool:
        return await local.LocalEngine.ready(self)  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes tenths."""
    monkeypatch.setattr(readiness, "_FRESH_S", 0.2)
    monkeypatch.setattr(readiness, "_AT_ONCE_S", 0.1)
    monkeypatch.setattr(readiness, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(local, "_READY_DEADLINE_S", 0.2)


def judging(engine: NullEnginePort, *usages: Usage, max_wait: float = 60.0) -> Readiness:
    return Readiness(engine, usages=lambda: usages, max_wait=max_wait)


def under_way(prompt: int = 100, *, since: float = 0.0, last_token: float | None = None) -> Usage:
    """Of a request; times are seconds ago."""
    now = time.perf_counter()
    tokens = None if last_token is None else now - last_token
    return Usage(prompt=prompt, dispatched=now - since, first_token=tokens, last_token=tokens)


async def ready(layer: Readiness, times: int = 1) -> list[int]:
    async with Stack(layer.engine, ready=layer).client(None) as client:
        replies = await asyncio.gather(*(client.get("/ready") for _ in range(times)))
    return [reply.status_code for reply in replies]


async def test_an_engine_that_generates_is_ready_and_asked_once() -> None:
    engine = Counted()
    layer = judging(engine)
    assert await ready(layer, 5) == [200] * 5
    assert await ready(layer) == [200]
    assert engine.asked == 1


async def test_an_engine_that_is_dead_is_not_ready() -> None:
    engine = NullEnginePort(faults=Faults(dead=True))
    assert await ready(judging(engine)) == [503]
    assert await ready(judging(engine, under_way(since=8.0))) == [503]  # whatever it has to do


async def test_a_busy_engine_is_not_asked() -> None:
    engine = Counted(faults=Faults(dead=True))
    assert await ready(judging(engine, under_way(since=8.0, last_token=0.1))) == [200]
    assert engine.asked == 0


async def test_it_is_asked_again_after_a_failure() -> None:
    engine = NullEnginePort(faults=Faults(dead=True))
    layer = judging(engine)
    assert await ready(layer) == [503]
    engine.faults.change({"dead": False})
    assert await ready(layer) == [200]


async def test_a_probe_that_gives_up_takes_the_answer_from_no_other() -> None:
    engine = Counted()
    layer = judging(engine)
    first, second = asyncio.create_task(layer()), asyncio.create_task(layer())
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    assert engine.asked == 1


async def test_what_is_not_ready_says_when_to_ask_again() -> None:
    layer = judging(NullEnginePort(faults=Faults(dead=True)))
    async with Stack(layer.engine, ready=layer).client(None) as client:
        reply = await client.get("/ready")
    assert reply.headers["retry-after"] == "5"


async def test_sixteen_whole_replies_on_an_engine_of_four_leave_it_ready(tmp_path: Path, quick: None) -> None:
    """Reading prompts it tells nothing for longer than a canary would wait, and a canary would wait in line."""
    engine = InLine(prefill_s=0.5, tokens_per_second=20, max_num_seqs=4)
    access = {"mode": "open", "database": f"sqlite:///{tmp_path}/keys.db", "secret": "x" * 32}
    gateway = Gateway(engine, house_settings(tmp_path, access=access), capacity=Capacity(requests=4))
    body = {"model": "synthia", "prompt": "Hello " * 50, "max_tokens": 8}
    with serving(gateway.app, beside=gateway) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(16)]
            told: list[int] = []
            while not all(task.done() for task in asking):
                told.append((await client.get("/ready")).status_code)
                await asyncio.sleep(0.02)
            assert [task.result().status_code for task in asking] == [200] * 16
    assert len(told) > 20
    assert set(told) == {200}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [  # tokens of the prompt, seconds ago that it came, and that its last token came
        ([(400, 1.5, None)], 200),  # 400 tokens take 2 s
        ([(400, 9.0, None)], 503),
        ([(400, 1.5, None), (4000, 20.0, 9.0)], 503),
        ([(2000, 1.0, None), (4000, 12.0, 9.0)], 200),
        ([(4000, 20.0, None)], 503),  # longer than a request may wait
    ],
)
async def test_a_hung_engine_is_given_the_time_that_its_prompts_take(
    requests: Sequence[tuple[int, float, float | None]], expected: int, quick: None
) -> None:
    usages = [under_way(prompt, since=since, last_token=last) for prompt, since, last in requests]
    layer = judging(InLine(faults=Faults(hang=True)), *usages, max_wait=15.0)
    now = time.perf_counter()
    earlier = make_exchange(make_request())
    earlier.usage.prompt, earlier.usage.dispatched, earlier.usage.first_token = 200, now - 61, now - 60
    layer.ended(earlier)  # 5 ms a token
    assert await ready(layer) == [expected]


async def test_a_reply_that_nobody_reads_is_no_work_of_the_engine(quick: None) -> None:
    unread = under_way(since=10.0, last_token=9.0)
    unread.completed = True
    engine = Counted()
    assert await ready(judging(engine, unread)) == [200]
    assert engine.asked == 1
