"""The card's script as a server, with `generate` replaced: what it is asked for, and who waits for whom."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from synthia_vllm.bench.card_server import Job, Queue, application, sampling
from synthia_vllm.bench.client import Call, Client, Target
from synthia_vllm.bench.run_file import Request
from tests.gateway.live import serving


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Job]]:
    found: list[list[Job]] = []

    def generate(self: Queue, jobs: list[Job]) -> list[list[int]]:
        found.append(jobs)
        time.sleep(0.3)
        return [[7] * job.tokens for job in jobs]

    monkeypatch.setattr(Queue, "_generate", generate)
    return found


@contextmanager
def card() -> Iterator[int]:
    app = application(None)
    with serving(app, beside=app.router.lifespan_context(app)) as port:
        yield port


async def ask(port: int, way: str, count: int, **options: Any) -> list[Request]:
    async with Client(Target(f"http://127.0.0.1:{port}/{way}", "card"), **options) as client:
        calls = (Call(4 + number, prompt=[1000 + number] * 8) for number in range(count))
        sent = (client.send(call, start=time.perf_counter(), due_s=0.0) for call in calls)
        return list(await asyncio.gather(*sent))


@pytest.mark.parametrize(("way", "sizes"), [("single", [1, 1, 1]), ("batched", [3])])
async def test_one_at_a_time_or_all_that_wait(batches: list[list[Job]], way: str, sizes: list[int]) -> None:
    with card() as port:
        found = await ask(port, way, 3)
    assert [request.error for request in found] == [None] * 3
    assert [request.seen_tokens for request in found] == [4, 5, 6]
    assert [len(request.chunk_s) for request in found] == [1, 1, 1]  # `generate` does not stream
    assert [len(jobs) for jobs in batches] == sizes


async def test_who_left_is_not_served(batches: list[list[Job]]) -> None:
    with card() as port:
        leaving = asyncio.create_task(ask(port, "single", 3))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await asyncio.sleep(0.4)  # the one that ran
        await ask(port, "single", 1)
    assert len(batches) <= 2


async def test_the_cards_sampling_is_asked_for_and_else_greedy() -> None:
    card = {"temperature": 0.75, "top_p": 1.0, "top_k": 50, "max_tokens": 9}
    assert sampling(card) == {"do_sample": True, "temperature": 0.75, "top_p": 1.0, "top_k": 50}
    assert sampling({"temperature": 0}) == {"do_sample": False}


async def test_text_is_refused() -> None:
    with card() as port:
        async with Client(Target(f"http://127.0.0.1:{port}/single", "card")) as client:
            found = await client.send(Call(4, prompt="text"), start=time.perf_counter(), due_s=0.0)
    assert found.error == "http 400"
