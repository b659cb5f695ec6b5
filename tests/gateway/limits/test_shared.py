"""What only the shared counter has: several processes, killed ones, and a Redis that goes and comes back."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from prometheus_client import REGISTRY

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.shared import SharedLimiter
from tests.redis_service import RedisServer

LIMITS = UserLimits(requests_per_minute=200, tokens_per_minute=5000, concurrent_requests=7)

# A gateway's part: starts and ends requests as fast as it can for some seconds, then tells what it got in.
_GATEWAY = """
import asyncio, random, sys, time
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.shared import SharedLimiter
url, name = sys.argv[1:]
limits = UserLimits(requests_per_minute=200, tokens_per_minute=5000, concurrent_requests=7)
async def main():
    limiter = SharedLimiter(url, lease=1.0)
    end, admitted, most = time.monotonic() + 3, 0, 0
    async def user(number):
        nonlocal admitted, most
        count = 0
        while time.monotonic() < end:
            count += 1
            call = f"{name}-{number}-{count}"
            if await limiter.reserve("a", limits, call, 20) is None:
                admitted += 1
                most = max(most, (await limiter.standing("a")).concurrent_requests)
                print("in", flush=True)
                await asyncio.sleep(random.random() / 20)
                await limiter.settle("a", call, 15)
    await asyncio.gather(*(user(number) for number in range(5)))
    await limiter.close()
    print(admitted, most, flush=True)
asyncio.run(main())
"""


def gateways(url: str, count: int) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen([sys.executable, "-c", _GATEWAY, url, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]


async def test_four_gateways_never_overshoot(redis_url: str) -> None:
    outputs = [process.communicate(timeout=60)[0].splitlines()[-1].split() for process in gateways(redis_url, 4)]
    assert sum(int(admitted) for admitted, _ in outputs) == 200
    assert max(int(most) for _, most in outputs) <= 7
    limiter = SharedLimiter(redis_url)
    standing = await limiter.standing("a")
    assert (standing.concurrent_requests, standing.requests_last_minute) == (0, 200)
    assert standing.tokens_last_minute == 200 * 15
    await limiter.close()


async def test_what_a_killed_gateway_had_open_comes_back(redis_url: str) -> None:
    victim = gateways(redis_url, 1)[0]
    assert victim.stdout is not None
    for _ in range(5):
        victim.stdout.readline()
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    limiter = SharedLimiter(redis_url, lease=1.0)
    deadline = time.monotonic() + 10
    while (standing := await limiter.standing("a")).concurrent_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert standing.concurrent_requests == 0
    await limiter.close()


async def test_open_calls_are_kept_by_the_heartbeat(redis_url: str) -> None:
    limiter, other = SharedLimiter(redis_url, lease=0.6), SharedLimiter(redis_url)
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
    os.kill(redis_server._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]  # hangs, and loses nothing
    try:
        await limiter.settle("a", "1", 40)
    finally:
        os.kill(redis_server._process.pid, signal.SIGCONT)  # type: ignore[union-attr]
    await asyncio.sleep(1.1)
    await limiter.close()
    other = SharedLimiter(redis_url)
    standing = await other.standing("a")
    assert standing.concurrent_requests == 0
    assert standing.tokens_last_minute in (0, 40)  # 0 where the lease ended first
    await other.close()
