"""/ready: an engine that generates, or one that only lives."""

import asyncio
import time

import httpx

from benchmarks.null_faults import Faults
from benchmarks.null_port import NullEnginePort
from synthia_vllm.gateway.readiness import Readiness
from tests.gateway.stack import Stack


class Counted(NullEnginePort):
    """Notes how often it is asked whether it is ready, and takes a moment to say so."""

    asked = 0

    async def ready(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0)
        return await super().ready()


async def ready(layer: Readiness, times: int = 1) -> list[int]:
    async with Stack(layer.engine, ready=layer).client(None) as client:  # type: ignore[arg-type]
        replies = await asyncio.gather(*(client.get("/ready") for _ in range(times)))
    return [reply.status_code for reply in replies]


async def test_an_engine_that_generates_is_ready_and_asked_once() -> None:
    engine = Counted()
    layer = Readiness(engine, last_token=lambda: 0.0)
    assert await ready(layer, 5) == [200] * 5
    assert await ready(layer) == [200]
    assert engine.asked == 1


async def test_an_engine_that_is_dead_is_not_ready() -> None:
    assert await ready(Readiness(NullEnginePort(faults=Faults(dead=True)), last_token=lambda: 0.0)) == [503]


async def test_a_busy_engine_is_not_asked() -> None:
    engine = Counted(faults=Faults(dead=True))
    assert await ready(Readiness(engine, last_token=time.perf_counter)) == [200]
    assert engine.asked == 0


async def test_it_is_asked_again_after_a_failure() -> None:
    engine = NullEnginePort(faults=Faults(dead=True))
    layer = Readiness(engine, last_token=lambda: 0.0)
    assert await ready(layer) == [503]
    engine.faults.change({"dead": False})
    assert await ready(layer) == [200]


async def test_a_probe_that_gives_up_takes_the_answer_from_no_other() -> None:
    engine = Counted()
    layer = Readiness(engine, last_token=lambda: 0.0)
    first, second = asyncio.create_task(layer()), asyncio.create_task(layer())
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    assert engine.asked == 1


async def test_what_is_not_ready_says_when_to_ask_again() -> None:
    layer = Readiness(NullEnginePort(faults=Faults(dead=True)), last_token=lambda: 0.0)
    transport = httpx.ASGITransport(app=Stack(layer.engine, ready=layer).app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        reply = await client.get("/ready")
    assert reply.headers["retry-after"] == "5"
