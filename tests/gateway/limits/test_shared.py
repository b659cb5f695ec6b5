"""What only the shared counter has: several processes, killed ones, and a Redis that goes and comes back."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from itertools import accumulate

import pytest
import redis.asyncio
from prometheus_client import REGISTRY
from redis.exceptions import ResponseError

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import Standing
from synthia_vllm.gateway.limits.shared import SharedLimiter
from tests.redis_service import RedisServer

LIMITS = UserLimits(requests_per_minute=200, tokens_per_minute=5000, concurrent_requests=7)

# A gateway's part: starts and ends requests as fast as it can for some seconds, and tells when each ran.
_GATEWAY = """
import asyncio, random, sys, time
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.shared import SharedLimiter
url, name = sys.argv[1:]
limits = UserLimits(requests_per_minute=200, tokens_per_minute=5000, concurrent_requests=7)
async def main():
    limiter = SharedLimiter(url, lease=1.0, timeout=30.0)
    end = time.monotonic() + 3
    async def user(number):
        count = 0
        while time.monotonic() < end:
            count += 1
            call = f"{name}-{number}-{count}"
            if await limiter.reserve("a", limits, call, 20) is None:
                began = time.monotonic()
                print("in", flush=True)
                await asyncio.sleep(random.random() / 20)
                print("ran", began, time.monotonic(), flush=True)
                await limiter.settle("a", call, 15)
    await asyncio.gather(*(user(number) for number in range(5)))
    await limiter.close()
asyncio.run(main())
"""


def gateways(url: str, count: int) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen([sys.executable, "-c", _GATEWAY, url, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]


async def test_four_gateways_never_overshoot(redis_url: str) -> None:
    lines = [line for process in gateways(redis_url, 4) for line in process.communicate(timeout=60)[0].splitlines()]
    assert lines.count("in") == 200
    assert most_at_once(lines) <= 7
    limiter = SharedLimiter(redis_url, timeout=30.0)
    standing = await limiter.standing("a")
    assert (standing.concurrent_requests, standing.requests_last_minute) == (0, 200)
    assert standing.tokens_last_minute == 200 * 15
    await limiter.close()


async def test_what_a_killed_gateway_had_open_comes_back(redis_url: str) -> None:
    victim, *others = gateways(redis_url, 4)
    assert victim.stdout is not None
    for _ in range(5):
        victim.stdout.readline()
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    lines = [line for process in others for line in process.communicate(timeout=60)[0].splitlines()]
    assert most_at_once(lines) <= 7
    limiter = SharedLimiter(redis_url, lease=1.0, timeout=30.0)
    deadline = time.monotonic() + 10
    while (standing := await limiter.standing("a")).concurrent_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert standing.concurrent_requests == 0
    assert standing.tokens_last_minute % 15 == 0  # of what was cut, nothing
    await limiter.close()


def most_at_once(lines: list[str]) -> int:
    """By the requests' own times: one clock for all processes of a machine."""
    times = [line.split()[1:] for line in lines if line.startswith("ran")]
    changes = sorted([(float(began), 1) for began, _ in times] + [(float(ended), -1) for _, ended in times])
    return max(accumulate(change for _, change in changes))


async def test_more_decisions_at_once_than_connections(redis_url: str) -> None:
    limiter = SharedLimiter(redis_url, on_loss="closed", timeout=30.0)  # a machine that is busy for a second is no loss
    answers = await asyncio.gather(*(limiter.reserve("a", LIMITS, str(number), 1) for number in range(500)))
    assert answers.count(None) == 7
    await asyncio.gather(*(limiter.settle("a", str(number), 1) for number in range(500)))
    assert (await limiter.standing("a")).concurrent_requests == 0
    await limiter.close()


async def test_a_decision_that_nobody_waits_for_any_more_holds_nothing(
    redis_server: RedisServer, redis_url: str
) -> None:
    limiter = SharedLimiter(redis_url, lease=3.0)
    await limiter.reserve("a", LIMITS, "first", 10)
    await limiter.settle("a", "first", 10)
    with redis_server.paused():
        deciding = asyncio.create_task(limiter.reserve("a", LIMITS, "second", 10))
        await asyncio.sleep(0.1)
        deciding.cancel()
        await asyncio.gather(deciding, return_exceptions=True)
    assert (await limiter.standing("a")).concurrent_requests == 1
    await asyncio.sleep(1.2)  # a heartbeat, and the lease still runs
    assert await limiter.standing("a") == Standing(2, 10, 0, 0)
    await limiter.close()


async def test_open_calls_are_kept_by_the_heartbeat(redis_url: str) -> None:
    limiter, other = SharedLimiter(redis_url, lease=0.6), SharedLimiter(redis_url, timeout=30.0)
    await limiter.reserve("a", LIMITS, "long", 10)
    await asyncio.sleep(1.5)
    assert (await other.standing("a")).concurrent_requests == 1
    await limiter.settle("a", "long", 5)
    assert (await other.standing("a")).concurrent_requests == 0
    await limiter.close()
    await other.close()


@pytest.fixture
def stopped(redis_server: RedisServer, redis_url: str) -> RedisServer:
    redis_server.stop()
    return redis_server


async def test_closed_refuses_while_redis_is_gone(stopped: RedisServer) -> None:
    limiter = SharedLimiter(stopped.url, on_loss="closed")
    try:
        with pytest.raises(Overloaded, match="shared limits"):
            await limiter.reserve("a", LIMITS, "1", 10)
        assert REGISTRY.get_sample_value("synthia_limits_shared_up") == 0
    finally:
        stopped.start()
    await asyncio.sleep(1.1)
    assert await limiter.reserve("a", LIMITS, "2", 10) is None
    assert REGISTRY.get_sample_value("synthia_limits_shared_up") == 1
    await limiter.settle("a", "2", 10)
    await limiter.close()


async def test_local_counts_here_while_redis_is_gone(stopped: RedisServer) -> None:
    limiter = SharedLimiter(stopped.url, on_loss="local")
    one_a_minute = UserLimits(requests_per_minute=1)
    before = REGISTRY.get_sample_value("synthia_limits_fallback_total", {"mode": "local"}) or 0
    try:
        assert await limiter.reserve("a", one_a_minute, "1", 10) is None
        assert await limiter.reserve("a", one_a_minute, "2", 10) is not None
        assert REGISTRY.get_sample_value("synthia_limits_fallback_total", {"mode": "local"}) == before + 2
        await limiter.settle("a", "1", 10)
    finally:
        stopped.start()
    await limiter.close()


async def test_what_ended_while_redis_was_gone_is_settled_when_it_is_back(
    redis_server: RedisServer, redis_url: str
) -> None:
    limiter = SharedLimiter(redis_url, lease=1.5)
    await limiter.reserve("a", LIMITS, "1", 100)
    with redis_server.paused():
        await limiter.settle("a", "1", 40)
        await asyncio.sleep(1)  # past the lease's end: the one whose it was comes first
    await limiter.close()
    other = SharedLimiter(redis_url, timeout=30.0)
    assert await other.standing("a") == Standing(1, 40, 0, 0)
    await other.close()


async def test_a_script_that_fails_on_one_users_keys_is_no_redis_that_is_gone(redis_url: str) -> None:
    limiter = SharedLimiter(redis_url, lease=0.3, timeout=30.0)
    assert await limiter.reserve("b", LIMITS, "b1", 10) is None
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.set("{synthia:limits:a}:window", "no sorted set")
        with pytest.raises(ResponseError):
            await limiter.reserve("a", LIMITS, "a1", 10)
        assert REGISTRY.get_sample_value("synthia_limits_shared_up") == 1
        await asyncio.sleep(0.5)  # the heartbeat goes on
        assert (await limiter.standing("b")).concurrent_requests == 1
        await client.delete("{synthia:limits:a}:window")
    assert await limiter.reserve("a", LIMITS, "a2", 10) is None
    await limiter.settle("b", "b1", 5)
    assert await limiter.standing("b") == Standing(1, 5, 0, 0)
    await limiter.close()
