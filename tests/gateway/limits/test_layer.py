import asyncio

import pytest

from synthia_vllm.errors import LimitExceeded, RequestError
from synthia_vllm.gateway.accounts import Account, UserLimits
from synthia_vllm.gateway.limits.base import Refusal, Standing
from synthia_vllm.gateway.limits.layer import Limits, merge
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.request import Request
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import Held, Saying, collect, collecting, make_request, settle, tokens

LIMITED = Account("limited", limits=UserLimits(tokens_per_minute=100, concurrent_requests=1))


def limited(id: str = "1", *, prompt: int = 7, most: int = 20) -> Request:
    return make_request(account=LIMITED, id=id, prompt=prompt, most=most)


@pytest.fixture
def limiter() -> MemoryLimiter:
    return MemoryLimiter()


def layer(limiter: MemoryLimiter, engine: Saying | Held, defaults: UserLimits | None = None) -> Limits:
    return Limits(Sequences(Meter(engine)), limiter=limiter, defaults=defaults or UserLimits())


async def test_a_finished_request_is_settled_with_what_it_used(limiter: MemoryLimiter) -> None:
    await collect(layer(limiter, Saying(*tokens("a", "b"))), limited())
    assert await limiter.standing("limited") == Standing(1, 7 + 2, 0, 0)


async def test_what_the_engine_refused_is_settled_with_nothing(limiter: MemoryLimiter) -> None:
    with pytest.raises(RequestError):
        await collect(layer(limiter, Saying(RequestError("no"))), limited())
    assert await limiter.standing("limited") == Standing(1, 0, 0, 0)


async def test_the_most_that_it_may_use_is_reserved_meanwhile(limiter: MemoryLimiter) -> None:
    engine = Held()
    (task,) = collecting(layer(limiter, engine), [limited()])
    await settle()
    assert await limiter.standing("limited") == Standing(1, 7 + 20, 1, 0)
    engine.release.set()
    await task


async def test_a_client_that_leaves_and_a_process_that_stops_are_settled(limiter: MemoryLimiter) -> None:
    (task,) = collecting(layer(limiter, Held()), [limited()])
    await settle()
    assert (await limiter.standing("limited")).concurrent_requests == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await limiter.standing("limited") == Standing(1, 7, 0, 0)


async def test_settling_goes_on_where_the_request_is_cancelled_meanwhile() -> None:
    settling = asyncio.Event()

    class Slow(MemoryLimiter):
        async def settle(self, user: str, call_id: str, tokens: int) -> None:
            settling.set()
            await asyncio.sleep(0.05)
            await super().settle(user, call_id, tokens)

    limiter = Slow()
    (task,) = collecting(layer(limiter, Saying(*tokens("a", "b"))), [limited()])
    await settling.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await limiter.standing("limited")).concurrent_requests == 1
    await asyncio.sleep(0.1)
    assert await limiter.standing("limited") == Standing(1, 7 + 2, 0, 0)


async def test_a_client_that_leaves_while_its_tokens_are_reserved_gets_them_back() -> None:
    reserving = asyncio.Event()

    class Slow(MemoryLimiter):
        async def reserve(self, user: str, limits: UserLimits, call_id: str, tokens: int) -> Refusal | None:
            refusal = await super().reserve(user, limits, call_id, tokens)
            reserving.set()
            await asyncio.sleep(0.05)
            return refusal

    limiter, engine = Slow(), Saying(*tokens("a"))
    (task,) = collecting(layer(limiter, engine), [limited()])
    await reserving.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await limiter.standing("limited") == Standing(1, 0, 0, 0)
    assert engine.asked == 0


async def test_an_upstream_that_breaks_is_settled(limiter: MemoryLimiter) -> None:
    with pytest.raises(OSError, match="gone"):
        await collect(layer(limiter, Saying(tokens("a", "b")[0], OSError("gone"))), limited())
    assert await limiter.standing("limited") == Standing(1, 7 + 1, 0, 0)


async def test_a_refusal_says_when_to_come_back(limiter: MemoryLimiter) -> None:
    engine = Saying(*tokens("a"))
    await limiter.reserve("limited", UserLimits(), "other", 1)
    with pytest.raises(LimitExceeded) as caught:
        await collect(layer(limiter, engine), limited())
    assert (caught.value.status, dict(caught.value.headers)[b"retry-after"]) == (429, b"1")
    await limiter.settle("limited", "other", 95)
    with pytest.raises(LimitExceeded) as caught:
        await collect(layer(limiter, engine), limited())
    assert (caught.value.reason, dict(caught.value.headers)[b"retry-after"]) == ("tokens_per_minute", b"60")
    assert engine.asked == 0


async def test_what_never_gets_in_is_told_so(limiter: MemoryLimiter) -> None:
    with pytest.raises(RequestError) as caught:
        await collect(layer(limiter, Saying()), limited(most=1000))
    assert (caught.value.status, caught.value.param, caught.value.headers) == (400, "max_tokens", [])


async def test_users_without_limits_touch_no_counter(limiter: MemoryLimiter) -> None:
    await collect(layer(limiter, Saying(*tokens("a"))), make_request("alice"))
    assert await limiter.standing("alice") == Standing()


async def test_defaults_hold_where_a_user_has_none(limiter: MemoryLimiter) -> None:
    limits = layer(limiter, Saying(*tokens("a")), UserLimits(requests_per_minute=1))
    await collect(limits, make_request("alice"))
    with pytest.raises(LimitExceeded):
        await collect(limits, make_request("alice", id="2"))
    own, defaults = UserLimits(requests_per_minute=5), UserLimits(requests_per_minute=1, tokens_per_minute=2)
    assert merge(own, defaults) == UserLimits(requests_per_minute=5, tokens_per_minute=2)
