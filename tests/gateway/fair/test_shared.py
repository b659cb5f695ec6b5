"""Gateways that share one queue through a real Redis, before null engines: real asyncio, limits and all."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.errors import LimitExceeded
from synthia_vllm.gateway.accounts import Account, UserLimits
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.peers import share
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.fair.settlement import FRESH_S
from synthia_vllm.gateway.fair.shared import SharedQueue
from synthia_vllm.gateway.limits.layer import Limits
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.sequences import Sequences
from synthia_vllm.supervise import stop
from tests.gateway.layers import make_request, until
from tests.redis_service import RedisServer

TOKENS = 1000
ENGINES = ("one", "two")


@dataclass
class Member:
    """A gateway's layers, and what settles its queue with the others."""

    layers: Limits
    scheduler: Scheduler
    shared: SharedQueue
    limiter: SharedLimiter
    settling: "asyncio.Task[None]"

    @property
    def gateways(self) -> int:
        return self.shared._settlement.gateways

    async def kill(self) -> None:
        await stop(self.settling, again_s=0.1)

    async def close(self) -> None:
        await self.kill()
        await self.shared.close()
        await self.limiter.close()


async def begin(url: str, engine: NullEnginePort, engines: Sequence[str] = ENGINES, **options: Any) -> Member:
    scheduler = Scheduler(whole := Capacity(tokens=TOKENS))

    def set_gateways(number: int) -> None:
        scheduler.room.capacity = share(whole, number)
        scheduler.dispatch()

    shared = SharedQueue(url, engines, scheduler, set_gateways, **options)
    limiter = SharedLimiter(url)
    queue = FairQueue(Sequences(Meter(engine)), scheduler=scheduler, max_wait=600.0, max_requests=100_000)
    await shared.settle()
    settling = asyncio.create_task(shared.run())
    return Member(Limits(queue, limiter=limiter), scheduler, shared, limiter, settling)


@asynccontextmanager
async def gateways(url: str, count: int = 4, **options: Any) -> AsyncIterator[list[Member]]:
    engine = NullEnginePort(tokens_per_second=20)
    members = [await begin(url, engine, **options) for _ in range(count)]
    try:
        yield members
    finally:
        await asyncio.gather(*(member.close() for member in members))


class Crowd:
    """Users who always have more under way than they get, each at all gateways."""

    def __init__(self, members: list[Member], users: int, streams: int) -> None:
        self.members = members
        self.accounts = [Account(f"u{number}") for number in range(users)]
        self.service: dict[str, float] = defaultdict(float)
        self.done = 0
        self.failed: list[Exception] = []
        self.most = 0
        self._ids = count()
        self._lead: dict[str, tuple[float, float]] = {}
        self._tasks = {
            asyncio.create_task(self._keep_asking(account, number)): number % len(members)
            for account in self.accounts
            for number in range(streams)
        }

    async def _keep_asking(self, account: Account, number: int) -> None:
        prompt, most = 4 + number % 8, 8 + 4 * (number % 4)
        while True:
            member = self.members[number % len(self.members)]
            request = make_request(account=account, id=str(next(self._ids)), prompt=prompt, most=most)
            cost = prompt + 2.0
            try:
                async for _ in member.layers.generate(request):
                    self.service[account.user] += cost
                    cost = 2.0
            except Exception as error:
                self.failed.append(error)
            else:
                assert request.usage.generated == most
                self.done += 1

    def begin_measuring(self) -> None:
        self._lead.clear()

    async def watch(self, seconds: float) -> float:
        """The greatest gap in service between two users since measuring began."""
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
            self.most = max(self.most, sum(member.scheduler.room.tokens for member in self.members))
            for account in self.accounts:
                lead = self.service[account.user] - self.service[self.accounts[0].user]
                least, most = self._lead.get(account.user, (lead, lead))
                self._lead[account.user] = min(least, lead), max(most, lead)
        return max(most - least for least, most in self._lead.values())

    async def replace(self, number: int, member: Member) -> None:
        """The gateway is killed: what its users had there is gone, and they ask the new one."""
        await self.members[number].kill()
        self.members[number] = member
        mine = [task for task, home in self._tasks.items() if home == number]
        for task in mine:
            del self._tasks[task]
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        for at in range(len(mine)):
            account = self.accounts[at % len(self.accounts)]
            self._tasks[asyncio.create_task(self._keep_asking(account, number))] = number

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


BOUND = 2 * 2.0 * TOKENS  # theorem 4.4 for one gateway


async def test_four_gateways_keep_the_papers_bound_while_one_is_killed_and_replaced(redis_url: str) -> None:
    async with gateways(redis_url) as members:
        crowd = Crowd(members, users=24, streams=16)
        await crowd.watch(2)
        crowd.begin_measuring()
        await crowd.watch(4)
        killed = members[1]
        await crowd.replace(1, await begin(redis_url, NullEnginePort(tokens_per_second=20)))
        gap = await crowd.watch(FRESH_S + 3)
        await crowd.end()
        await killed.limiter.close()
        assert not crowd.failed
        assert crowd.done > 200
        assert gap <= 2 * BOUND
        assert crowd.most <= TOKENS + 4 * 32


async def test_a_redis_that_stands_still_for_two_seconds_loses_nothing(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with gateways(redis_url) as members:
        crowd = Crowd(members, users=24, streams=16)
        await crowd.watch(2)
        crowd.begin_measuring()
        await crowd.watch(2)
        before = crowd.done
        with redis_server.paused():
            await crowd.watch(2)
            during = crowd.done - before
        gap = await crowd.watch(4)
        await crowd.end()
        assert not crowd.failed
        assert during > 20
        assert gap <= 2 * BOUND
        assert crowd.most <= TOKENS + 4 * 32


async def test_limits_are_exact_over_gateways_that_share_a_queue(redis_url: str) -> None:
    limited = Account("limited", limits=UserLimits(requests_per_minute=30))
    outcomes: Counter[str] = Counter()

    async def ask(member: Member, number: int) -> None:
        try:
            async for _ in member.layers.generate(make_request(account=limited, id=f"l{number}", prompt=4, most=4)):
                pass
            outcomes["done"] += 1
        except LimitExceeded:
            outcomes["refused"] += 1

    async with gateways(redis_url) as members:
        crowd = Crowd(members, users=12, streams=8)
        await crowd.watch(1)
        await asyncio.gather(*(ask(members[number % 4], number) for number in range(60)))
        await crowd.end()
    assert outcomes == {"done": 30, "refused": 30}


async def test_one_that_leaves_is_not_waited_for_and_one_that_is_killed_is_found_by_its_beat(redis_url: str) -> None:
    async with gateways(redis_url, 1) as (one,):
        leaving = await begin(redis_url, NullEnginePort())
        killed = await begin(redis_url, NullEnginePort())
        await until(lambda: one.gateways == 3)
        await killed.kill()
        await leaving.close()
        await until(lambda: one.gateways == 2, 2.0)
        assert one.scheduler.room.lease is not None
        await until(lambda: one.gateways == 1 and one.scheduler.room.lease is None, FRESH_S + 5.0)
        await killed.limiter.close()


async def test_gateways_before_some_of_the_same_engines_divide_and_those_before_others_do_not(redis_url: str) -> None:
    async with gateways(redis_url, 1) as (one,):
        stranger = await begin(redis_url, NullEnginePort(), ["three"])
        overlapping = await begin(redis_url, NullEnginePort(), ["two", "three"])
        await until(lambda: one.scheduler.room.capacity.tokens == TOKENS // 2)
        await until(lambda: stranger.scheduler.room.capacity.tokens == TOKENS // 2)
        await overlapping.close()
        await until(lambda: one.scheduler.room.capacity.tokens == TOKENS)
        await until(lambda: (one.gateways, stranger.gateways) == (1, 1))
        await stranger.close()


async def test_without_redis_at_the_start_it_takes_its_part_as_set() -> None:
    member = await begin("redis://127.0.0.1:1", NullEnginePort(), least=4)
    assert member.scheduler.room.capacity.tokens == TOKENS // 4
    await member.close()
