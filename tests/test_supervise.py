import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from synthia_vllm import supervise as module
from synthia_vllm.supervise import spawn, supervise

_PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)


@asynccontextmanager
async def supervised(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator["asyncio.Task[None]"]:
    task = supervise(name, work)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def restarts(task: str) -> float | None:
    return REGISTRY.get_sample_value("synthia_background_restarts_total", {"task": task})


@pytest.mark.parametrize(
    "surprise", [RuntimeError("can't start new thread"), OverflowError(), asyncio.CancelledError(), MemoryError()]
)
async def test_whatever_ends_a_task_it_begins_again_and_it_is_counted_and_told(surprise: BaseException) -> None:
    name = f"test {type(surprise).__name__}"
    runs = 0
    steady = asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 4:
            raise surprise
        steady.set()
        await asyncio.Event().wait()

    with capture_logs() as logs:
        async with supervised(name, work):
            assert restarts(name) == 0  # there before the first failure
            await steady.wait()
    assert restarts(name) == 3
    pauses = [line["again_in_s"] for line in logs if (line["event"], line["task"]) == ("background_task_failed", name)]
    assert pauses == [0.001, 0.002, 0.004]


async def test_the_pause_has_a_bound_and_is_short_again_after_a_steady_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PAUSE_S", 0.002)
    runs, over = 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 5:
            monkeypatch.setattr(module, "_STEADY_S", 0.0)
        if runs == 6:
            over.set()
        raise ValueError

    with capture_logs() as logs:
        async with supervised("bounded", work):
            await over.wait()
    assert [line["again_in_s"] for line in logs[:5]] == [0.001, 0.002, 0.002, 0.002, 0.001]


async def test_a_task_that_is_cancelled_ends() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with supervised("cancelled", work) as task:
        await begun.wait()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
    assert restarts("cancelled") == 0


async def test_a_task_that_is_done_is_not_begun_again() -> None:
    async def work() -> None:
        return

    async with supervised("done", work) as task:
        await task
    assert restarts("done") == 0


async def test_a_question_that_fails_is_counted_and_told() -> None:
    async def work() -> None:
        raise KeyError("what nobody thought of")

    with capture_logs() as logs:
        await asyncio.wait((spawn("question of a test", work()),))
        await asyncio.sleep(0)
    assert [(line["event"], line["task"]) for line in logs] == [("background_task_failed", "question of a test")]
    assert restarts("question of a test") == 1


async def test_a_question_that_is_cancelled_is_no_failure() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    task = spawn("cancelled question", work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    assert restarts("cancelled question") == 0
