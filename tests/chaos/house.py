"""The whole stack over real sockets in front of null engines (stand-ins: real processes, no model) that get hurt."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from synthia_vllm.bench.checked_stream import CHAT, COMPLETIONS, CheckedStream, numbered, run_stream
from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.replica_set import Replica, ReplicaSet
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.edge.listener import DrainingServer, bind
from synthia_vllm.metrics.replicas import STREAM_RESUMES
from synthia_vllm.replicas.pool import ReplicaPool
from synthia_vllm.settings import Settings

FULL = os.environ.get("SYNTHIA_CHAOS") == "full"
REPLICAS = 8 if FULL else 3
STREAMS = 400 if FULL else 24
TOKENS = 200 if FULL else 60
TOKENS_PER_SECOND = 20
BOUND_S = 60.0  # generous: what is asserted is that it comes to that, not when
_LISTING_S = 0.1
OF_POOL: dict[str, Any] = {"canary_period_s": 0.4, "canary_deadline_s": 1.2, "slow_start_s": 0.0, "handover_s": 0.5}


class Both:
    """Two sets as one, for the gateway's discovery."""

    def __init__(self, *sets: ReplicaSet) -> None:
        self._sets = sets

    @property
    def replicas(self) -> list[Replica]:
        return [replica for found in self._sets for replica in found.replicas]

    def listing(self) -> dict[str, str]:
        return {name: url for found in self._sets for name, url in found.listing().items()}


@dataclass
class House:
    """A gateway that runs, its pool, and its replicas."""

    url: str
    gateway: Gateway
    pool: ReplicaPool
    replicas: ReplicaSet | Both

    def load(self, streams: int = STREAMS, tokens: int = TOKENS, **options: Any) -> "asyncio.Task[list[CheckedStream]]":
        """So many streams at once, chats and completions, some with ids and logprobs of the client's own."""
        wanted = []
        for number in range(streams):
            path = CHAT if number % 2 else COMPLETIONS
            more: dict[str, Any] = {"return_token_ids": True} if number % 5 == 0 else {}
            if number % 7 == 0:
                more |= {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
            if number % 4 == 0:
                more["seed"] = number  # said again from its beginning elsewhere, not gone on with
            if number % 3 == 0:
                more["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            lately = random.randint(tokens // 2, tokens)
            wanted.append(numbered(path, f"{number}: what is an orca?", lately, ignore_eos=True, **more | options))

        async def all_of_them() -> list[CheckedStream]:
            async with asyncio.timeout(3 * BOUND_S):
                return list(await asyncio.gather(*(run_stream(self.url, one) for one in wanted)))

        return asyncio.create_task(all_of_them())

    async def busy(self, requests: int = STREAMS) -> None:
        """Until so many requests run on replicas, and each had time for a token or two."""
        await until(lambda: sum(view.in_flight for view in self.pool.replicas()) >= requests)
        await asyncio.sleep(0.3)

    def busiest(self) -> str:
        return max(self.pool.replicas(), key=lambda view: view.in_flight).name

    async def calm(self, up: int | None = None) -> None:
        """Every counter back to zero, and all replicas up again."""
        await until(lambda: self._left_over() == {}, self._left_over)
        standing = await self.gateway.limiter.standing("anonymous")
        assert standing.concurrent_requests == 0
        wanted = REPLICAS if up is None else up
        await until(lambda: len(self.pool.up()) == wanted, self.pool.replicas)

    def _left_over(self) -> dict[str, Any]:
        scheduler = self.gateway.scheduler
        found = {
            "queued": scheduler.queued_requests,
            "queued tokens": scheduler.queued_tokens,
            "in flight": scheduler.room.requests,
            "tokens in flight": scheduler.room.tokens,
            "open": len(self.gateway.access.open),
            "waiting": self.pool.waiting,
            "on replicas": sum(view.in_flight for view in self.pool.replicas()),
        }
        return {name: value for name, value in found.items() if value}


@asynccontextmanager
async def house(
    replicas: ReplicaSet | Both, *, of_pool: dict[str, Any] | None = None, connect_timeout: float = 1.0, **options: Any
) -> AsyncIterator[House]:
    """Gateway, pool and a discovery that tells the pool ten times a second; all replicas are up."""
    told = {"limits": {"concurrent_requests": 100_000}, "log": {"requests": False}, "port": 0, "drain_timeout": 2.0}
    settings = Settings(**told | options, replicas=OF_POOL | (of_pool or {}))
    sock = bind(settings)
    pool = ReplicaPool(settings.replicas, tokenizer=null_tokenizer(), connect_timeout=connect_timeout)
    gateway = Gateway(pool, settings, capacity=Capacity())
    ready = asyncio.Event()
    async with pool, gateway:
        pool.on_capacity = gateway.set_capacity
        server = DrainingServer(gateway.app, settings, ready.set)
        running = [asyncio.create_task(server.serve(sockets=[sock])), asyncio.create_task(_discover(pool, replicas))]
        try:
            async with asyncio.timeout(BOUND_S):
                await ready.wait()
            count = len(replicas.replicas)
            await until(lambda: len(pool.up()) == count, pool.replicas)
            yield House(f"http://127.0.0.1:{sock.getsockname()[1]}", gateway, pool, replicas)
        finally:
            server.should_exit = server.force_exit = True
            running[1].cancel()
            await asyncio.gather(*running, return_exceptions=True)
    sock.close()


async def _discover(pool: ReplicaPool, replicas: ReplicaSet | Both) -> None:
    while True:
        pool.update(replicas.listing())
        await asyncio.sleep(_LISTING_S)


async def until(condition: Callable[[], bool], tell: Callable[[], object] | None = None) -> None:
    """Raises TimeoutError with what `tell` says."""
    deadline = time.monotonic() + BOUND_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(tell() if tell else "not in time")
        await asyncio.sleep(0.05)


def assert_whole(streams: Sequence[CheckedStream]) -> None:
    """No stream has anything missing, doubled or wrong."""
    reasons = Counter(stream.broken for stream in streams)
    assert set(reasons) == {None}, [(stream.broken, stream.offending) for stream in streams if stream.broken][:3]


def resumes() -> dict[tuple[str, str], float]:
    """What became of requests that lost a replica, so far in this process."""
    return {
        (sample.labels["reason"], sample.labels["result"]): sample.value
        for family in STREAM_RESUMES.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
