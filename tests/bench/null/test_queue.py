"""The null engine's queue and what it tells of it, drains and lies, as vLLM and Ray Serve do."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.queue import MOST_A_STEP, Queue, Seat
from synthia_vllm.free_ports import free_port
from tests.gateway.live import serving
from tests.running import null_engine, until

BODY: dict[str, Any] = {"model": "m", "prompt": "What is an orca?", "max_tokens": 5, "stream": True}


def ids(count: int) -> list[int]:
    return [5] * count


@asynccontextmanager
async def client(app: NullEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://null") as found:
        yield found


async def metrics(asked: httpx.AsyncClient) -> dict[str, float]:
    lines = [line for line in (await asked.get("/metrics")).text.splitlines() if line and line[0] != "#"]
    return {line.split("{")[0].removeprefix("vllm:"): float(line.rsplit(" ", 1)[1]) for line in lines}


async def served(queue: Queue, seat: Seat) -> None:
    await queue.prefill(seat, asyncio.get_running_loop().create_future())


async def test_who_came_first_runs_first() -> None:
    queue = Queue(max_num_seqs=2)
    seats = [queue.arrive(3) for _ in range(4)]
    assert [seat.prefilled.done() for seat in seats] == [True, True, False, False]
    assert queue.told()[:2] == (2, 2)
    queue.leave(seats[2])  # gave up
    queue.leave(seats[0])
    assert seats[3].prefilled.done()
    assert queue.told()[:2] == (2, 0)


async def test_a_prompt_waits_for_room_in_the_cache() -> None:
    queue = Queue(max_num_seqs=9, blocks=10)
    first, second = queue.arrive(100), queue.arrive(100)
    await served(queue, first)
    assert (first.prefilled.done(), second.prefilled.done()) == (True, False)
    assert queue.told() == (1, 1, 7)
    queue.leave(first)
    assert second.prefilled.done()


async def test_prompts_are_computed_in_steps_and_told_at_their_ends() -> None:
    queue = Queue(max_num_seqs=9, tokens_per_second=400_000, blocks=9999)
    long, short = queue.arrive(MOST_A_STEP + 16), queue.arrive(16)
    assert queue.told() == (0, 0, 0)  # nothing has come back from the first step yet
    step = queue.step
    assert step is not None
    await step
    assert (long.computed, short.computed, queue.prompt_tokens) == (MOST_A_STEP, 0, 0)
    assert queue.told() == (1, 0, MOST_A_STEP // 16)  # when that step was planned, the second prompt was not there
    late = queue.arrive(16)
    assert (queue.told().waiting, queue.unseen) == (0, 1)
    await served(queue, short)
    assert queue.prompt_tokens == MOST_A_STEP + 32  # both fitted into the second step
    await served(queue, late)
    assert queue.told() == (3, 0, MOST_A_STEP // 16 + 3)


async def test_a_stuck_step_does_not_end() -> None:
    stuck = True
    queue = Queue(tokens_per_second=1e9, stuck=lambda: stuck)
    seat = queue.arrive(5)
    done, _ = await asyncio.wait((seat.prefilled,), timeout=0.1)
    assert not done
    stuck = False
    await seat.prefilled


async def test_the_metrics_count_tokens_as_they_are_made() -> None:
    engine = NullEngine(tokens_per_second=50, max_num_seqs=1, blocks=100)
    async with client(engine) as asked:
        told = await metrics(asked)
        assert (told["cache_config_info"], told["synthia_max_num_seqs"], told["generation_tokens_total"]) == (1, 1, 0)
        running = [
            asyncio.create_task(asked.post("/v1/completions", json={**BODY, "prompt": ids(32), "stream": stream}))
            for stream in (False, True)
        ]
        seen, full = set(), set()
        while not all(task.done() for task in running):
            told = await metrics(asked)
            seen.add((told["num_requests_running"], told["num_requests_waiting"]))
            full.add(told["kv_cache_usage_perc"])
            await asyncio.sleep(0.005)
        assert seen >= {(1, 1), (1, 0)}
        assert max(full) == 0.03  # two blocks of prompt, one of reply
        told = await metrics(asked)
        assert (told["generation_tokens_total"], told["prompt_tokens_total"]) == (10, 64)
        assert told["kv_cache_usage_perc"] == 0


async def test_a_prompts_time_is_told_when_its_reply_has_ended_and_not_before() -> None:
    engine = NullEngine(tokens_per_second=20, prefill_tokens_per_second=1000)
    async with client(engine) as asked:
        running = asyncio.create_task(asked.post("/v1/completions", json={**BODY, "prompt": ids(100)}))
        while not engine.generated:
            await asyncio.sleep(0.01)
        told = await metrics(asked)
        assert (told["prompt_tokens_total"], told.get("request_prefill_time_seconds_sum", 0.0)) == (100, 0)
        await running
        told = await metrics(asked)
        assert told["request_prompt_tokens_sum"] == 100
        assert told["request_prefill_time_seconds_sum"] >= 0.1


@pytest.mark.parametrize("early", [False, True])
async def test_headers_come_with_the_turn_or_as_vllms_do_before_it(early: bool) -> None:
    engine = NullEngine(max_num_seqs=1, early_headers=early, faults=Faults(stall_after=2))
    with serving(engine) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as asked:
            async with asked.stream("POST", "/v1/completions", json=BODY) as first:
                lines = first.aiter_lines()
                await anext(lines)
                second = asked.build_request("POST", "/v1/completions", json=BODY)
                waiting = asyncio.create_task(asked.send(second, stream=True))
                done, _ = await asyncio.wait((waiting,), timeout=0.3)
                assert bool(done) == early
                assert engine.waiting == 1
                engine.faults.change({"stall_after": None})
            reply = await waiting
            assert b"[DONE]" in await reply.aread()
            await reply.aclose()


async def test_counters_that_lie() -> None:
    engine = NullEngine()
    async with client(engine) as asked:
        await asked.post("/v1/completions", json=BODY)
        await asked.post("/fault", json={"metrics": "still"})
        await asked.post("/v1/completions", json=BODY)
        assert (await metrics(asked))["generation_tokens_total"] == 5
        await asked.post("/fault", json={"metrics": "error"})
        assert (await asked.get("/metrics")).status_code == 500
        await asked.post("/fault", json={"metrics": "hang"})
        asking = asyncio.create_task(metrics(asked))
        done, _ = await asyncio.wait((asking,), timeout=0.2)
        assert not done
        await asked.post("/fault", json={"metrics": None})
        assert (await asking)["generation_tokens_total"] == 10
        assert (await asked.post("/fault", json={"metrics": "none"})).status_code == 400


async def test_a_stuck_engine_answers_but_makes_no_tokens() -> None:
    engine = NullEngine(tokens_per_second=100)
    async with client(engine) as asked:
        running = [
            asyncio.create_task(asked.post("/v1/completions", json={**BODY, "max_tokens": 40, "stream": stream}))
            for stream in (False, True)
        ]
        while engine.generated < 4:
            await asyncio.sleep(0.01)
        await asked.post("/fault", json={"stuck": True})
        await asyncio.sleep(0.05)
        before = await metrics(asked)
        done, _ = await asyncio.wait(running, timeout=0.3)
        assert not done
        assert await metrics(asked) == before
        assert before["num_requests_running"] == 2
        assert (await asked.get("/health")).status_code == 200
        await asked.post("/fault", json={"stuck": False})
        assert [reply.status_code for reply in await asyncio.gather(*running)] == [200, 200]
        assert engine.generated == 80


@pytest.mark.parametrize("how", ["signal", "fault"])
def test_a_draining_engine_refuses_who_is_new_and_ends_what_runs(tmp_path: Path, how: str) -> None:
    engine = null_engine(tmp_path / "log", "--tokens-per-second", "5").start()
    process = engine.process
    assert process is not None
    try:
        with (
            httpx.Client(base_url=engine.url, timeout=30) as asked,
            asked.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 45}) as reply,
        ):
            if how == "signal":
                process.send_signal(signal.SIGUSR1)
            else:
                httpx.post(f"{engine.url}/fault", json={"drain_s": 0.5})
            assert httpx.get(f"{engine.url}/health").status_code == 200  # for a while

            def refused() -> bool:
                try:
                    httpx.get(f"{engine.url}/health")
                except httpx.ConnectError:
                    return True
                return False

            until(refused, "the port is closed", 20)
            assert process.poll() is None
            assert reply.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0
    finally:
        engine.kill()


@pytest.mark.parametrize(
    ("options", "made"), [((), 0), (("--poison-at", "3"), 2), (("--poison-after", "3"), 2)], ids=["once", "at", "after"]
)
@pytest.mark.parametrize("stream", [True, False])
def test_poison_kills_whole_replies_and_streams_where_it_is_told_to(
    options: tuple[str, ...], made: int, stream: bool
) -> None:
    port = free_port()
    words = [
        "-m",
        "synthia_vllm.bench.null.engine",
        "--port",
        str(port),
        "--poison",
        "<300>",
        "--tokens-per-second",
        "50",
    ]
    engine = subprocess.Popen([sys.executable, *words, *options])
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: httpx.get(f"{url}/health").status_code == 200, "it listens", 20)
        got: list[str] = []
        body = {**BODY, "prompt": [5, 300], "stream": stream}
        with (
            pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)),
            httpx.stream("POST", f"{url}/v1/completions", json=body) as reply,
        ):
            got.extend(reply.iter_lines())
        assert sum(line.startswith("data: {") for line in got) == (made if stream else 0)
        assert engine.wait(10) == 1
    finally:
        engine.kill()
        engine.wait()
