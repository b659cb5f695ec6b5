"""One set of tests for both counters: in memory, and in a real Redis whose clock the test sets."""

import asyncio
import copy
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import Limiter, Standing, month_of
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.limits.shared import SharedLimiter

START = 1_795_000_000.0  # 2026-11-18
# Redis' scripts add floats: a wait is right to the microsecond.
SLACK = 1e-5


class Clock:
    """`off` is how far the wall's clock is from it, which somebody sets."""

    def __init__(self) -> None:
        self.now = START
        self.off = 0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.off


@pytest.fixture(params=["memory", "redis"])
def kind(request: pytest.FixtureRequest) -> Any:
    """How to make a limiter; Redis is only started where it is used. `spent` is what the ledger has of this month."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None

    @asynccontextmanager
    async def make(clock: Clock, spent: int = 0) -> AsyncIterator[Limiter]:
        def ledger(user: str, since: float) -> int:
            return spent if since < START else 0

        limiter: Limiter
        if url is None:
            limiter = MemoryLimiter(clock=clock, wall=clock.wall, spent=ledger)
        else:
            redis.Redis.from_url(url).flushall()
            limiter = SharedLimiter(
                url,
                clock=clock.wall,
                monotonic=clock,
                wall=clock.wall,
                spent=ledger,
                lease=10_000.0,
                timeout=30.0,  # a machine that stands still for a second is no loss
            )
        yield limiter
        # A script that fails reads like a Redis that is gone, and the fallback would hide it.
        assert getattr(limiter, "_down_since", None) is None
        await limiter.close()

    return make


async def test_a_refused_request_costs_nothing(kind: Any) -> None:
    clock = Clock()
    async with kind(clock) as limiter:
        limits = UserLimits(requests_per_minute=5, tokens_per_minute=100)
        assert await limiter.reserve("a", limits, "1", 80) is None
        before = await limiter.standing("a")
        refusal = await limiter.reserve("a", limits, "2", 30)
        assert (refusal.reason, refusal.limit) == ("tokens_per_minute", 100)
        assert refusal.retry_after == pytest.approx(60, abs=SLACK)
        assert await limiter.standing("a") == before == Standing(1, 80, 1, 0)


async def test_what_was_used_takes_the_place_of_what_was_reserved(kind: Any) -> None:
    async with kind(Clock()) as limiter:
        limits = UserLimits(tokens_per_minute=100, tokens_per_month=1000)
        await limiter.reserve("a", limits, "1", 100)
        await limiter.settle("a", "1", 10)
        await limiter.settle("a", "1", 10)  # again
        await limiter.settle("a", "unknown", 10)
        assert await limiter.standing("a") == Standing(1, 10, 0, 10)
        assert await limiter.reserve("a", limits, "2", 90) is None


async def test_what_used_nothing_leaves_the_window_too(kind: Any) -> None:
    clock = Clock()
    async with kind(clock) as limiter:
        limits = UserLimits(requests_per_minute=1)
        await limiter.reserve("a", limits, "1", 10)
        await limiter.settle("a", "1", 0)
        clock.now += 61
        assert await limiter.reserve("a", limits, "2", 10) is None


async def test_a_wait_counts_only_as_many_as_must_go(kind: Any) -> None:
    clock = Clock()
    async with kind(clock) as limiter:
        limits = UserLimits(tokens_per_minute=100)
        for number, tokens in enumerate((10, 60, 30)):
            await limiter.reserve("a", limits, str(number), tokens)
            clock.now += 10
        for tokens, wait in ((5, 30), (10, 30), (11, 40), (70, 40), (71, 50)):
            refusal = await limiter.reserve("a", limits, "x", tokens)
            assert refusal.retry_after == pytest.approx(wait, abs=SLACK)


async def test_a_request_over_the_limit_by_itself_never_gets_in(kind: Any) -> None:
    async with kind(Clock()) as limiter:
        for limits in (UserLimits(tokens_per_minute=10), UserLimits(tokens_per_month=10)):
            assert (await limiter.reserve("a", limits, "1", 11)).retry_after == math.inf


async def test_requests_at_once(kind: Any) -> None:
    clock = Clock()
    async with kind(clock) as limiter:
        limits = UserLimits(concurrent_requests=2)
        for call in "12":
            assert await limiter.reserve("a", limits, call, 1) is None
        refusal = await limiter.reserve("a", limits, "3", 1)
        assert (refusal.reason, refusal.retry_after >= 1) == ("concurrent_requests", True)
        assert await limiter.reserve("b", limits, "4", 1) is None
        await limiter.settle("a", "1", 1)
        assert await limiter.reserve("a", limits, "3", 1) is None


async def test_the_month_starts_from_the_ledger_and_ends_with_the_calendar(kind: Any) -> None:
    clock = Clock()
    async with kind(clock, spent=900) as limiter:
        limits = UserLimits(tokens_per_month=1000)
        refusal = await limiter.reserve("a", limits, "1", 101)
        assert refusal.reason == "tokens_per_month"
        assert clock.now + refusal.retry_after == month_of(clock.now)[2]
        assert await limiter.reserve("a", limits, "2", 100) is None
        assert (await limiter.standing("a")).tokens_this_month == 1000


async def test_a_new_month_starts_at_nothing_and_no_earlier(kind: Any) -> None:
    clock = Clock()
    async with kind(clock, spent=950) as limiter:
        limits = UserLimits(tokens_per_month=1000)
        refusal = await limiter.reserve("a", limits, "1", 100)
        clock.now += refusal.retry_after - 1
        assert await limiter.reserve("a", limits, "1", 100) is not None
        clock.now += 1
        assert await limiter.reserve("a", limits, "1", 100) is None
        assert (await limiter.standing("a")).tokens_this_month == 100


async def test_a_month_limited_later_counts_what_was_open_before(kind: Any) -> None:
    async with kind(Clock(), spent=900) as limiter:
        await limiter.reserve("a", UserLimits(requests_per_minute=9), "before", 500)
        await limiter.reserve("a", UserLimits(tokens_per_month=2000), "after", 1)
        assert (await limiter.standing("a")).tokens_this_month == 900 + 500 + 1
        await limiter.settle("a", "before", 100)
        assert (await limiter.standing("a")).tokens_this_month == 900 + 100 + 1


async def test_a_month_forgotten_comes_back_from_the_ledger() -> None:
    billed = 0
    limiter = MemoryLimiter(clock=Clock(), wall=Clock(), spent=lambda user, since: billed)
    limits = UserLimits(tokens_per_month=1000)
    await limiter.reserve("a", limits, "1", 300)
    billed = 600  # by other gateways
    limiter.forget_months()
    assert (await limiter.reserve("a", limits, "2", 101)).retry_after > 0  # type: ignore[union-attr]
    await limiter.settle("a", "1", 200)
    assert await limiter.reserve("a", limits, "2", 200) is None


async def test_the_longest_wait_decides(kind: Any) -> None:
    async with kind(Clock()) as limiter:
        limits = UserLimits(requests_per_minute=1, tokens_per_month=100)
        await limiter.reserve("a", limits, "1", 90)
        assert (await limiter.reserve("a", limits, "2", 50)).reason == "tokens_per_month"


class Naive:
    """The same rules, written down without a thought for speed."""

    def __init__(self, limits: UserLimits) -> None:
        self.limits = limits
        self.admitted: list[list[Any]] = []  # time, tokens, call, open

    def fits(self, now: float, tokens: int) -> bool:
        recent = [entry for entry in self.admitted if entry[0] + 60 > now + SLACK]
        return (
            len(recent) < (self.limits.requests_per_minute or math.inf)
            and sum(entry[1] for entry in recent) + tokens <= (self.limits.tokens_per_minute or math.inf)
            and sum(entry[3] for entry in self.admitted) < (self.limits.concurrent_requests or math.inf)
            and sum(entry[1] for entry in self.admitted) + tokens <= (self.limits.tokens_per_month or math.inf)
        )


steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, 60)),
        st.tuples(st.just("end"), st.integers(0, 40)),  # finished, cut, or cancelled: any number of tokens
        st.tuples(st.just("wait"), st.integers(1, 40)),
        st.tuples(st.just("jump"), st.sampled_from([-3600, -90, 90, 3600])),  # somebody sets the clock
    ),
    max_size=60,
)
some_limits = st.builds(
    UserLimits,
    requests_per_minute=st.none() | st.integers(1, 6),
    tokens_per_minute=st.none() | st.integers(20, 150),
    concurrent_requests=st.none() | st.integers(1, 4),
    tokens_per_month=st.none() | st.integers(100, 600),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=some_limits, schedule=steps)
def test_any_schedule(kind: Any, limits: UserLimits, schedule: list[tuple[str, int]]) -> None:
    asyncio.run(_follow(kind, limits, schedule))


async def _follow(kind: Any, limits: UserLimits, schedule: list[tuple[str, int]]) -> None:
    """Decisions equal the naive ones, whatever the wall's clock shows; a Retry-After is enough, and a second less is
    not; all returns to zero.
    """
    clock, naive = Clock(), Naive(limits)
    async with kind(clock) as limiter:
        for number, (step, value) in enumerate(schedule):
            running = [entry for entry in naive.admitted if entry[3]]
            if step == "wait":
                clock.now += value
            elif step == "jump":
                clock.off += value
            elif step == "end" and running:
                entry = running[value % len(running)]
                entry[1], entry[3] = min(value, entry[1]), False
                await limiter.settle("a", entry[2], entry[1])
            elif step == "start":
                fits = naive.fits(clock.now, value)
                refusal = await limiter.reserve("a", limits, str(number), value)
                assert (refusal is None) == fits
                if refusal is None:
                    naive.admitted.append([clock.now, value, str(number), True])
                elif refusal.reason.endswith("per_minute") and refusal.retry_after < math.inf:
                    others = Naive(UserLimits(limits.requests_per_minute, limits.tokens_per_minute))
                    others.admitted = naive.admitted
                    assert others.fits(clock.now + refusal.retry_after, value)
                    if refusal.retry_after > 1:
                        assert not others.fits(clock.now + refusal.retry_after - 1, value)
        for entry in naive.admitted:
            await limiter.settle("a", entry[2], entry[1])
        clock.now += 61
        standing = await limiter.standing("a")
        assert (standing.requests_last_minute, standing.tokens_last_minute, standing.concurrent_requests) == (0, 0, 0)


@settings(max_examples=200, deadline=None)
@given(limits=some_limits, schedule=steps)
def test_waiting_as_told_gets_in_and_a_second_less_does_not(
    limits: UserLimits, schedule: list[tuple[str, int]]
) -> None:
    asyncio.run(_wait_as_told(replace(limits, concurrent_requests=None), schedule))


async def _wait_as_told(limits: UserLimits, schedule: list[tuple[str, int]]) -> None:
    """Asks copies of the counter in memory, moved to the times in question; all limits together."""
    clock = Clock()
    limiter = MemoryLimiter(clock=clock, wall=clock.wall)
    running: list[str] = []
    for number, (step, value) in enumerate(schedule):
        if step == "wait":
            clock.now += value
        elif step == "jump":
            clock.off += value
        elif step == "end" and running:
            await limiter.settle("a", running.pop(value % len(running)), value)
        elif step == "start":
            refusal = await limiter.reserve("a", limits, str(number), value)
            if refusal is None:
                running.append(str(number))
            elif refusal.retry_after < math.inf:
                assert await _gets_in(limiter, limits, value, refusal.retry_after)
                assert refusal.retry_after <= 1 or not await _gets_in(limiter, limits, value, refusal.retry_after - 1)


async def _gets_in(limiter: MemoryLimiter, limits: UserLimits, tokens: int, after: float) -> bool:
    later = copy.deepcopy(limiter)
    later._clock.now += after  # type: ignore[attr-defined]
    return await later.reserve("a", limits, "again", tokens) is None
