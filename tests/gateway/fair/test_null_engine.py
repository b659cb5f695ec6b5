"""The queue around the null engine: many users, thousands of requests, real asyncio."""

import asyncio
from collections import defaultdict
from itertools import count
from typing import Any

import pytest

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.sequences import Sequences
from tests.gateway.layers import make_request

USERS, REQUESTS, OUTSTANDING = 50, 10_000, 6
CAPACITY = 2_000  # tokens


def queue_before_engine(capacity: Capacity, policy: Any = "vtc") -> FairQueue:
    scheduler = Scheduler(capacity, policy=policy)
    engine = Sequences(Meter(NullEnginePort(tokens_per_second=1000)))
    return FairQueue(engine, scheduler=scheduler, max_wait=600.0, max_requests=100_000, max_tokens=10**9)


async def overload(policy: str) -> tuple[float, int]:
    """Greatest gap in service between two users who always have requests waiting; and how many requests ran.

    The shape is the paper's (figure 3): all ask for more than their share, at different rates and lengths.
    """
    queue = queue_before_engine(Capacity(tokens=CAPACITY), policy)
    users = [f"u{number}" for number in range(USERS)]
    service: dict[str, float] = defaultdict(float)
    least: dict[str, float] = defaultdict(float)
    most: dict[str, float] = defaultdict(float)
    sent = ran = 0
    ids = count()

    def note(user: str, cost: float) -> None:
        if sent >= REQUESTS:  # from here on, some users have nothing waiting any more
            return
        service[user] += cost
        lead = service[user] - service[users[0]]
        least[user], most[user] = min(least[user], lead), max(most[user], lead)

    async def keep_asking(user: str, number: int) -> None:
        nonlocal sent, ran
        words, tokens = 4 * (1 + number % 8), 4 + 4 * (number % 7)
        while sent < REQUESTS:
            sent += 1
            request = make_request(user, id=str(next(ids)), prompt=words, most=tokens)
            cost = words + 2.0  # the prompt's with the first token
            async for _ in queue.generate(request):
                note(user, cost)
                cost = 2.0
            assert request.usage.generated == tokens
            ran += 1

    await asyncio.gather(*(keep_asking(user, number) for number, user in enumerate(users) for _ in range(OUTSTANDING)))
    # Between any two users over any interval: at most what both leads over the first one moved.
    return max(most[user] - least[user] for user in users), ran


async def test_the_service_gap_stays_under_the_papers_bound() -> None:
    """Theorem 4.4: 2 max(w_p L_in, w_q M), with M the tokens that the engine holds."""
    gap, ran = await overload("vtc")
    assert ran >= REQUESTS
    assert gap <= 2 * max(1.0 * 32, 2.0 * CAPACITY)


async def test_first_come_first_served_does_not_keep_it() -> None:
    gap, _ = await overload("fcfs")
    assert gap > 2 * max(1.0 * 32, 2.0 * CAPACITY)


async def test_weights_share_a_backlog() -> None:
    queue = queue_before_engine(Capacity(tokens=600))
    tokens = {"three": 0, "one": 0}
    accounts = {"three": Account("three", weight=3.0), "one": Account("one")}
    ids = count()

    async def keep_asking(user: str) -> None:
        while sum(tokens.values()) < 30_000:
            request = make_request(account=accounts[user], id=str(next(ids)), prompt=8, most=16)
            async for _ in queue.generate(request):
                pass
            tokens[user] += request.usage.generated

    await asyncio.gather(*(keep_asking(user) for user in tokens for _ in range(40)))
    assert tokens["three"] / tokens["one"] == pytest.approx(3.0, rel=0.1)
