"""What a machine's clock does when it is set, and a process that stands still: nothing to the limits by the minute."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.base import Standing
from synthia_vllm.gateway.limits.shared import SharedLimiter
from tests.clock_service import WallClock
from tests.redis_service import RedisServer

HOUR = 3600

# A gateway's limiter, on a machine whose clock is set while a request runs, and back again while another does.
_JUMPING = """
import asyncio, json, os, pathlib, sys, time
from dataclasses import asdict
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.limits.shared import SharedLimiter
url, seconds = sys.argv[1:]
limits = UserLimits(tokens_per_minute=100, concurrent_requests=2)
def set_clock(seconds):
    before = time.time()
    pathlib.Path(os.environ["CLOCK_OFFSET"]).write_text(f"{seconds}".ljust(20))
    return round(time.time() - before)
async def main():
    limiter = SharedLimiter(url, timeout=30.0) if url else MemoryLimiter()
    told = [await limiter.reserve("a", limits, "1", 60)]
    told.append(set_clock(int(seconds)))
    told.append((await limiter.reserve("a", limits, "2", 60)).retry_after)
    told.append(asdict(await limiter.standing("a")))
    await limiter.settle("a", "1", 10)
    told.append(asdict(await limiter.standing("a")))
    told.append(await limiter.reserve("a", limits, "3", 90))
    set_clock(0)
    told.append((await limiter.reserve("a", limits, "4", 60)).retry_after)
    await limiter.settle("a", "3", 5)
    told.append(asdict(await limiter.standing("a")))
    await limiter.close()
    print(json.dumps(told))
asyncio.run(main())
"""


@pytest.fixture
def redis_of_the_machine(tmp_path: Path, wall_clock: WallClock) -> Iterator[RedisServer]:
    """Redis where the clock is set."""
    server = RedisServer(tmp_path)
    server.start(wall_clock.environment)
    yield server
    server.stop()


@pytest.mark.parametrize("kind", ["memory", "redis"])
@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forwards", "backwards"])
def test_a_clock_that_is_set_by_an_hour_changes_nothing_of_a_minute(
    kind: str, seconds: int, wall_clock: WallClock, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("redis_of_the_machine").url if kind == "redis" else ""
    done = subprocess.run(
        [sys.executable, "-c", _JUMPING, url, str(seconds)],
        env=os.environ | wall_clock.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, moved, wait, running, settled, third, later, end = json.loads(done.stdout)
    assert (first, moved, third) == (None, seconds, None)
    assert 40 < wait <= 60
    assert 40 < later <= 60
    assert Standing(**running) == Standing(1, 60, 1, 0)
    assert Standing(**settled) == Standing(1, 10, 0, 0)
    assert Standing(**end) == Standing(2, 15, 0, 0)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forwards", "backwards"])
async def test_no_wait_is_longer_than_the_window_where_no_gateway_saw_redis_clock_move(
    redis_of_the_machine: RedisServer, wall_clock: WallClock, seconds: int
) -> None:
    before = SharedLimiter(redis_of_the_machine.url, timeout=30.0)
    limits = UserLimits(requests_per_minute=1)
    await before.reserve("a", limits, "1", 10)
    await before.settle("a", "1", 10)
    await before.close()
    wall_clock.set(seconds)
    after = SharedLimiter(redis_of_the_machine.url, timeout=30.0)
    refusal = await after.reserve("a", limits, "2", 10)
    assert refusal is None or refusal.retry_after <= 60
    standing = await after.standing("a")
    assert min(standing.requests_last_minute, standing.tokens_last_minute) >= 0
    await after.close()


_OPEN = """
import asyncio, sys
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.limits.shared import SharedLimiter
async def main():
    limiter = SharedLimiter(sys.argv[1], lease=0.6, timeout=30.0)
    await limiter.reserve("a", UserLimits(requests_per_minute=9, tokens_per_month=1000), "long", 100)
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await limiter.settle("a", "long", 70)
    await limiter.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("settled_first", [False, True], ids=["renewed", "settled"])
async def test_a_process_that_stood_still_has_its_requests_counted_all_the_same(
    redis_url: str, settled_first: bool
) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _OPEN, redis_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    other = SharedLimiter(redis_url, timeout=30.0)
    assert await other.standing("a") == Standing(1, 100, 1, 100)
    process.send_signal(signal.SIGSTOP)
    while (standing := await other.standing("a")).concurrent_requests:
        await asyncio.sleep(0.05)
    assert standing == Standing(1, 0, 0, 0)
    if settled_first:
        process.stdin.write("\n")
        process.stdin.flush()
    process.send_signal(signal.SIGCONT)
    if not settled_first:
        while not (standing := await other.standing("a")).concurrent_requests:
            await asyncio.sleep(0.05)
        assert standing == Standing(1, 100, 1, 100)
    process.communicate("\n", timeout=60)
    assert await other.standing("a") == Standing(1, 70, 0, 70)
    await other.close()
