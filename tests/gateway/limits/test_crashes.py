"""Gateways that start and end requests and are killed, on one Redis whose clock the test sets."""

import asyncio
import math
from dataclasses import dataclass, field

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import Standing
from synthia_vllm.gateway.limits.shared import SharedLimiter

LEASE_S = 30
LIMITS = UserLimits(requests_per_minute=8, tokens_per_minute=150, concurrent_requests=4, tokens_per_month=500)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(0, 1), st.integers(1, 60)),
        st.tuples(st.just("end"), st.integers(0, 1), st.integers(0, 80)),  # more than was reserved too
        st.tuples(st.just("wait"), st.just(0), st.integers(1, 40)),
        st.tuples(st.just("crash"), st.integers(0, 1), st.just(0)),
    ),
    max_size=50,
)


@dataclass
class Request:
    gateway: int
    call: str
    at: float
    tokens: int
    lease_end: float
    open: bool = True


@dataclass
class World:
    """Two gateways, and what the limits should say of them, written down without a thought for speed."""

    url: str
    now: float = 1_795_000_000.0
    requests: list[Request] = field(default_factory=list)
    gateways: list[SharedLimiter] = field(default_factory=list)

    def gateway(self) -> SharedLimiter:
        return SharedLimiter(self.url, on_loss="closed", lease=LEASE_S, timeout=30.0, clock=lambda: self.now)

    def open(self, gateway: int) -> list[Request]:
        return [request for request in self.requests if request.open and request.gateway == gateway]

    def release(self) -> None:
        for request in self.requests:
            if request.open and request.lease_end <= self.now:
                request.open, request.tokens = False, 0

    def standing(self) -> Standing:
        recent = [request.tokens for request in self.requests if request.at + 60 > self.now]
        running = sum(request.open for request in self.requests)
        return Standing(len(recent), sum(recent), running, sum(request.tokens for request in self.requests))

    def fits(self, tokens: int) -> bool:
        used = self.standing()
        return (
            used.requests_last_minute < (LIMITS.requests_per_minute or math.inf)
            and used.tokens_last_minute + tokens <= (LIMITS.tokens_per_minute or math.inf)
            and used.concurrent_requests < (LIMITS.concurrent_requests or math.inf)
            and used.tokens_this_month + tokens <= (LIMITS.tokens_per_month or math.inf)
        )

    async def start(self, gateway: int, call: str, tokens: int) -> None:
        self.release()
        fits = self.fits(tokens)
        refusal = await self.gateways[gateway].reserve("a", LIMITS, call, tokens)
        assert (refusal is None) == fits
        if fits:
            self.requests.append(Request(gateway, call, self.now, tokens, self.now + LEASE_S))

    async def end(self, gateway: int, tokens: int) -> None:
        running = self.open(gateway)
        if running:
            request = running[tokens % len(running)]
            request.open, request.tokens = False, tokens
            await self.gateways[gateway].settle("a", request.call, tokens)

    async def wait(self, seconds: int) -> None:
        """With the heartbeats that real time would bring."""
        while seconds:
            step = min(seconds, LEASE_S // 3)
            self.now += step
            seconds -= step
            self.release()
            for number, limiter in enumerate(self.gateways):
                await limiter._renew()
                for request in self.open(number):
                    request.lease_end = self.now + LEASE_S

    async def crash(self, gateway: int) -> None:
        """Another takes its place; nothing is settled."""
        await abandon(self.gateways[gateway])
        self.gateways[gateway] = self.gateway()
        for request in self.open(gateway):
            request.gateway = -1


async def abandon(limiter: SharedLimiter) -> None:
    if limiter._heartbeat is not None:
        limiter._heartbeat.cancel()
    await limiter._redis.aclose()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=steps)
def test_any_schedule_with_crashes(redis_url: str, schedule: list[tuple[str, int, int]]) -> None:
    asyncio.run(_follow(redis_url, schedule))


async def _follow(url: str, schedule: list[tuple[str, int, int]]) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()
    world = World(url)
    world.gateways = [world.gateway(), world.gateway()]
    for number, (step, gateway, value) in enumerate(schedule):
        if step == "start":
            await world.start(gateway, str(number), value)
        elif step == "end":
            await world.end(gateway, value)
        elif step == "wait":
            await world.wait(value)
        else:
            await world.crash(gateway)
    for gateway in (0, 1):
        while world.open(gateway):
            await world.end(gateway, 1)
    world.now += 61
    world.release()
    standing = await world.gateways[0].standing("a")
    assert standing == world.standing()
    assert standing == Standing(0, 0, 0, standing.tokens_this_month)
    for limiter in world.gateways:
        assert limiter._down_since is None
        await abandon(limiter)
