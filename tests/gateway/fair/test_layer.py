import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from synthia_vllm.errors import Overloaded, QueueTimeout
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.call import Call, attach
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.fair.scheduler import Scheduler


class Engine:
    """An upstream that answers when it is told to."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.release = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered.append(scope["path"])
        await self.release.wait()


async def connected() -> Any:
    await asyncio.Event().wait()


async def gone() -> Any:
    return {"type": "http.disconnect"}


async def ignore(message: Any) -> None:
    pass


def call(user: str = "alice", **facts: Any) -> Call:
    return Call(
        id="1", request_id="1", route="/", account=Account(user), **{"prompt_tokens": 1, "max_generated": 1, **facts}
    )


def ask(layer: FairQueue, one: Call, receive: Receive = connected, path: str = "/") -> asyncio.Task[None]:
    scope: Scope = {"type": "http", "path": path}
    attach(scope, one)
    return asyncio.ensure_future(layer(scope, receive, ignore))


@pytest.fixture
def layer() -> FairQueue:
    return FairQueue(Engine(), scheduler=Scheduler(Capacity(requests=1)), max_wait=30.0, max_requests=2)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_turn_comes_when_the_engine_has_room(layer: FairQueue) -> None:
    tasks = [ask(layer, call(), path=str(number)) for number in range(2)]
    await settle()
    assert layer.app.entered == ["0"]  # type: ignore[attr-defined]
    layer.app.release.set()  # type: ignore[attr-defined]
    await asyncio.gather(*tasks)
    assert layer.app.entered == ["0", "1"]  # type: ignore[attr-defined]
    assert layer.scheduler.room.requests == 0


async def test_a_client_that_leaves_while_queued_is_removed_at_once(layer: FairQueue) -> None:
    running = ask(layer, call())
    await settle()
    one = call()
    await asyncio.wait_for(ask(layer, one, gone), 1)
    assert layer.scheduler.queued_requests == 0
    assert one.dispatched is None
    running.cancel()


async def test_who_waited_too_long_is_dropped_before_any_prefill(layer: FairQueue) -> None:
    running = ask(layer, call())
    await settle()
    with pytest.raises(QueueTimeout) as caught:
        await ask(layer, call(queue_timeout=0.05), path="late")
    assert caught.value.status == 503
    assert dict(caught.value.headers)[b"retry-after"]
    assert "late" not in layer.app.entered  # type: ignore[attr-defined]
    assert layer.scheduler.queued_requests == 0
    running.cancel()


async def test_a_full_queue_refuses(layer: FairQueue) -> None:
    tasks = [ask(layer, call()) for _ in range(3)]
    await settle()
    with pytest.raises(Overloaded, match="full"):
        await ask(layer, call())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert layer.scheduler.queued_requests == layer.scheduler.room.requests == 0


async def test_a_wait_longer_than_allowed_is_refused_at_once(layer: FairQueue) -> None:
    running = ask(layer, call())
    waiting = ask(layer, call(max_generated=1000))
    await settle()
    layer.scheduler.rate.per_second = 20.0  # cost a second: a hundred seconds of queue
    with pytest.raises(Overloaded) as caught:
        await ask(layer, call(), path="refused")
    assert 60 < caught.value.retry_after < 80
    for task in (running, waiting):
        task.cancel()


async def test_a_cancelled_request_gives_its_room_back(layer: FairQueue) -> None:
    running = ask(layer, call())
    await settle()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert layer.scheduler.room.requests == 0


async def test_tokens_are_charged_as_they_stream(layer: FairQueue) -> None:
    one = call(max_generated=10)
    running = ask(layer, one)
    await settle()
    before = layer.scheduler.counters.service["alice"]
    one.add_tokens(3)
    assert layer.scheduler.counters.service["alice"] - before == 6.0
    running.cancel()


async def test_what_generates_nothing_passes(layer: FairQueue) -> None:
    tasks = [ask(layer, call(max_generated=0)) for _ in range(5)]
    await settle()
    assert len(layer.app.entered) == 5  # type: ignore[attr-defined]
    for task in tasks:
        task.cancel()
