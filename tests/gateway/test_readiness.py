"""/ready: an engine that generates, or one that only lives. Null engines stand in."""

import asyncio
import time

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.null_engine import NullEngine
from benchmarks.null_faults import Faults
from synthia_vllm.gateway.readiness import Readiness
from synthia_vllm.gateway.routes import Routes


class Counted:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        await self.app(scope, receive, send)


async def ready(app: ASGIApp, times: int = 1) -> list[int]:
    transport = httpx.ASGITransport(app=Routes(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        replies = await asyncio.gather(*(client.get("/ready") for _ in range(times)))
    return [reply.status_code for reply in replies]


async def test_an_engine_that_generates_is_ready_and_asked_once() -> None:
    engine = Counted(NullEngine())
    layer = Readiness(engine, last_token=lambda: 0.0)
    assert await ready(layer, 5) == [200] * 5
    assert await ready(layer) == [200]
    assert engine.asked.count("/v1/completions") == 1


async def test_an_engine_that_is_dead_but_healthy_is_not_ready() -> None:
    assert await ready(Readiness(NullEngine(faults=Faults(dead=True)), last_token=lambda: 0.0)) == [503]


async def test_a_busy_engine_is_not_asked() -> None:
    engine = Counted(NullEngine(faults=Faults(dead=True)))
    assert await ready(Readiness(engine, last_token=time.perf_counter)) == [200]
    assert engine.asked == []


async def test_it_is_asked_again_after_a_failure() -> None:
    engine = NullEngine(faults=Faults(dead=True))
    layer = Readiness(engine, last_token=lambda: 0.0)
    assert await ready(layer) == [503]
    engine.faults.dead = False
    assert await ready(layer) == [200]
