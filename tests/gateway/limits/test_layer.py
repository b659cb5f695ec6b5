import asyncio
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.gateway.accounts import Account, UserLimits
from synthia_vllm.gateway.limits.base import Standing
from synthia_vllm.gateway.limits.layer import Limits, merge
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from tests.gateway.asgi import post
from tests.gateway.stack import ACCOUNTS, ScriptedEngine, Stack

BODY = {"model": "null", "prompt": [1] * 10, "max_tokens": 20}
KEY = {"x-api-key": "limited"}


@pytest.fixture
def limiter() -> MemoryLimiter:
    ACCOUNTS["limited"] = Account("limited", limits=UserLimits(tokens_per_minute=100, concurrent_requests=1))
    return MemoryLimiter()


def stack(limiter: Any, engine: ASGIApp, **defaults: Any) -> Stack:
    return Stack(engine, between=lambda app: Limits(app, limiter=limiter, defaults=UserLimits(**defaults)))


async def test_a_finished_request_is_settled_with_what_it_used(limiter: MemoryLimiter) -> None:
    assert (await post(stack(limiter, ScriptedEngine("a", "b")).app, BODY, headers=KEY)).status == 200
    assert await limiter.standing("limited") == Standing(1, 7 + 2, 0, 0)


async def test_a_client_that_leaves_and_a_process_that_stops_are_settled(limiter: MemoryLimiter) -> None:
    async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(post(stack(limiter, hanging).app, BODY, headers=KEY))
    await asyncio.sleep(0.05)
    assert (await limiter.standing("limited")).concurrent_requests == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert (await limiter.standing("limited")).concurrent_requests == 0


async def test_settling_goes_on_where_the_request_is_cancelled_meanwhile(limiter: MemoryLimiter) -> None:
    settle = limiter.settle
    settling = asyncio.Event()

    async def slowly(user: str, call_id: str, tokens: int) -> None:
        settling.set()
        await asyncio.sleep(0.05)
        await settle(user, call_id, tokens)

    limiter.settle = slowly  # type: ignore[method-assign]
    task = asyncio.create_task(post(stack(limiter, ScriptedEngine("a", "b")).app, BODY, headers=KEY))
    await settling.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await limiter.standing("limited")).concurrent_requests == 1
    await asyncio.sleep(0.1)
    assert await limiter.standing("limited") == Standing(1, 7 + 2, 0, 0)


async def test_an_upstream_that_breaks_is_settled(limiter: MemoryLimiter) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await post(stack(limiter, broken).app, BODY, headers=KEY)
    assert (await limiter.standing("limited")).concurrent_requests == 0


async def test_a_refusal_says_when_to_come_back(limiter: MemoryLimiter) -> None:
    app = stack(limiter, ScriptedEngine()).app
    await limiter.reserve("limited", UserLimits(), "other", 1)
    answer = await post(app, BODY, headers=KEY)
    assert (answer.status, answer.headers[b"retry-after"]) == (429, b"1")
    await limiter.settle("limited", "other", 95)
    answer = await post(app, BODY, headers=KEY)
    assert (answer.status, answer.headers[b"retry-after"]) == (429, b"60")


async def test_what_never_gets_in_is_told_so(limiter: MemoryLimiter) -> None:
    answer = await post(stack(limiter, ScriptedEngine()).app, {**BODY, "max_tokens": 1000}, headers=KEY)
    assert answer.status == 400
    assert b"retry-after" not in answer.headers


async def test_users_without_limits_touch_no_counter() -> None:
    assert (await post(stack(None, ScriptedEngine()).app, BODY, headers={"x-api-key": "sk-alice"})).status == 200


async def test_defaults_hold_where_a_user_has_none(limiter: MemoryLimiter) -> None:
    app = stack(limiter, ScriptedEngine(), requests_per_minute=1).app
    statuses = [(await post(app, BODY, headers={"x-api-key": "sk-alice"})).status for _ in range(2)]
    assert statuses == [200, 429]
    own, defaults = UserLimits(requests_per_minute=5), UserLimits(requests_per_minute=1, tokens_per_minute=2)
    assert merge(own, defaults) == UserLimits(requests_per_minute=5, tokens_per_minute=2)
