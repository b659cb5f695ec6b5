"""Ten times the sustainable rate around the null engine, in virtual time: the same on every machine."""

import asyncio
import os
from collections import Counter

import psutil

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Capacity
from synthia_vllm.gateway.fair.layer import FairQueue
from synthia_vllm.gateway.fair.scheduler import Scheduler
from tests.gateway.asgi import Answer, post
from tests.gateway.stack import Stack
from tests.gateway.virtual_time import run

SECONDS = float(os.environ.get("SYNTHIA_OVERLOAD_SECONDS", "15"))
SLOTS, TOKENS, TOKENS_PER_SECOND = 16, 20, 100.0
SUSTAINABLE = SLOTS * TOKENS_PER_SECOND / TOKENS  # requests a second
MAX_WAIT_S = 2.0


def test_what_is_admitted_finishes_and_what_is_refused_is_told_when_to_come_back() -> None:
    run(overload())


async def overload() -> None:
    engine = NullEnginePort(tokens_per_second=TOKENS_PER_SECOND, max_num_seqs=SLOTS)
    now = asyncio.get_running_loop().time
    scheduler = Scheduler(Capacity(requests=SLOTS), clock=now)
    stack = Stack(engine, between=lambda layer: FairQueue(layer, scheduler=scheduler, max_wait=MAX_WAIT_S))
    body = {"model": "null", "prompt": "x", "max_tokens": TOKENS, "stream": True}
    memory: list[int] = []
    tasks: list[asyncio.Task[Answer]] = []
    process = psutil.Process()
    while now() < SECONDS:
        while len(tasks) < 10 * SUSTAINABLE * now():
            tasks.append(asyncio.create_task(post(stack.app, body, headers={"x-api-key": "sk-alice"})))
        memory.append(process.memory_info().rss)
        await asyncio.sleep(0.02)
    answers = await asyncio.gather(*tasks)

    statuses = Counter(answer.status for answer in answers)
    print(f"{len(answers)} requests, {dict(statuses)}")
    assert set(statuses) == {200, 503}
    admitted = [answer for answer in answers if answer.status == 200]
    assert all(answer.whole and answer.tokens == TOKENS for answer in admitted)
    assert all(int(answer.headers[b"retry-after"]) >= 1 for answer in answers if answer.status == 503)
    waits = [answer.first_token_s for answer in admitted if answer.first_token_s is not None]
    print(f"longest time to first token {max(waits):.3f} s")
    # The engine's own part of the wait is its first step.
    assert max(waits) <= MAX_WAIT_S + 2 / TOKENS_PER_SECOND
    # The engine was kept busy. One user alone never has the slots that are kept for those who come.
    assert len(admitted) > 0.85 * SUSTAINABLE * SECONDS
    assert scheduler.queued_requests == scheduler.room.requests == 0
    assert engine.running == 0
    # Flat: the answers themselves, which this test keeps, are a few hundred bytes each.
    assert memory[-1] - memory[len(memory) // 3] < 20 * 2**20 + 4000 * len(answers)
