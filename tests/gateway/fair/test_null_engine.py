"""The queue around the null engine: many users, thousands of requests, real asyncio."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from typing import Any

import pytest
from starlette.types import ASGIApp

from benchmarks.null_engine import NullEngine
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.call import Call
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.room import Capacity
from synthia_vllm.gateway.fair.scheduler import Scheduler
from tests.gateway.asgi import post
from tests.gateway.stack import ACCOUNTS, Stack

USERS, REQUESTS, OUTSTANDING = 50, 10_000, 6
CAPACITY = 2_000  # tokens


def stack_with_queue(capacity: Capacity, policy: Any = "vtc") -> tuple[Stack, Scheduler]:
    scheduler = Scheduler(capacity, policy=policy)

    def queue(app: ASGIApp) -> ASGIApp:
        return FairQueue(app, scheduler=scheduler, max_wait=600.0, max_requests=100_000, max_tokens=10**9)

    return Stack(NullEngine(tokens_per_second=1000), between=queue), scheduler


@pytest.fixture
def users() -> Any:
    names = [f"u{number}" for number in range(USERS)]
    for name in names:
        ACCOUNTS[name] = Account(name)
    yield names
    for name in names:
        del ACCOUNTS[name]


async def overload(policy: str, users: list[str]) -> tuple[float, int]:
    """Greatest gap in service between two users who always have requests waiting; and how many requests ran.

    The shape is the paper's (figure 3): all ask for more than their share, at different rates and lengths.
    """
    stack, _ = stack_with_queue(Capacity(tokens=CAPACITY), policy)
    service: dict[str, float] = defaultdict(float)
    least: dict[str, float] = defaultdict(float)
    most: dict[str, float] = defaultdict(float)
    sent = 0

    def note(user: str, cost: float) -> None:
        service[user] += cost
        lead = service[user] - service[users[0]]
        least[user], most[user] = min(least[user], lead), max(most[user], lead)

    def note_next(user: str, costs: Iterator[float]) -> None:
        if sent < REQUESTS:  # later, some users have nothing waiting any more
            note(user, next(costs))

    async def keep_asking(user: str, number: int) -> None:
        nonlocal sent
        words, tokens = 4 * (1 + number % 8), 4 + 4 * (number % 7)
        prompt = [1] * words
        while sent < REQUESTS:
            sent += 1
            body = {"model": "null", "prompt": prompt, "max_tokens": tokens, "stream": True}
            costs = chain([words + 2.0], repeat(2.0))  # the prompt's with the first token

            answer = await post(stack.app, body, headers={"x-api-key": user}, on_token=partial(note_next, user, costs))
            assert (answer.status, answer.tokens) == (200, tokens)

    await asyncio.gather(*(keep_asking(user, number) for number, user in enumerate(users) for _ in range(OUTSTANDING)))
    # Between any two users over any interval: at most what both leads over the first one moved.
    return max(most[user] - least[user] for user in users), sum(1 for call in stack.calls if _finished(call))


def _finished(call: Call) -> bool:
    return call.outcome == "finished"


async def test_the_service_gap_stays_under_the_papers_bound(users: list[str]) -> None:
    """Theorem 4.4: 2 max(w_p L_in, w_q M), with M the tokens that the engine holds."""
    gap, ran = await overload("vtc", users)
    assert ran >= REQUESTS
    assert gap <= 2 * max(1.0 * 32, 2.0 * CAPACITY)


async def test_first_come_first_served_does_not_keep_it(users: list[str]) -> None:
    gap, _ = await overload("fcfs", users)
    assert gap > 2 * max(1.0 * 32, 2.0 * CAPACITY)


async def test_weights_share_a_backlog() -> None:
    ACCOUNTS["three"], ACCOUNTS["one"] = Account("three", weight=3.0), Account("one")
    stack, _ = stack_with_queue(Capacity(tokens=600))
    tokens = {"three": 0, "one": 0}
    body = {"model": "null", "prompt": [1] * 8, "max_tokens": 16, "stream": True}

    async def keep_asking(user: str) -> None:
        while sum(tokens.values()) < 30_000:
            answer = await post(stack.app, body, headers={"x-api-key": user})
            tokens[user] += answer.tokens

    await asyncio.gather(*(keep_asking(user) for user in tokens for _ in range(40)))
    assert tokens["three"] / tokens["one"] == pytest.approx(3.0, rel=0.1)
