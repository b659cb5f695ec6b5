"""Tasks that run beside the requests for as long as their process does, and never end without a word."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from prometheus_client import Counter

RESTARTS = Counter(
    "synthia_background_restarts_total", "Background tasks that failed and are begun again, by task.", ["task"]
)
_FIRST_PAUSE_S = 0.1
_MOST_PAUSE_S = 5.0
_STEADY_S = 30.0  # one that has run for so long begins again at once, whatever it did before

_log = structlog.get_logger(__name__)


def supervise(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
    """Starts a background task that is begun again, later each time, whatever ends it but its own return.

    Who calls owns the task: cancelling it ends the work.
    """
    RESTARTS.labels(name)  # a series that begins with its first failure would hide that one from `increase`
    return asyncio.create_task(_keep(name, work), name=name)


def spawn(name: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """Starts a background task that ends by itself and comes again, as a question does.

    Who calls owns the task, and need not wait for it: what it fails with is logged and counted.
    """
    RESTARTS.labels(name)
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell)
    return task


async def stop(task: "asyncio.Task[None]", *, again_s: float = 1.0) -> None:
    """Cancels a task until it has ended: Redis' client loses a cancellation where its answer is late just then."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=again_s)


def _tell(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        RESTARTS.labels(task.get_name()).inc()
        _log.error("background_task_failed", task=task.get_name(), exc_info=error)


async def _keep(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    pause = _FIRST_PAUSE_S
    while True:
        began = time.monotonic()
        try:
            return await work()
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            failure: BaseException = error  # it waited for something that another has cancelled
        except Exception as error:
            failure = error
        if time.monotonic() - began >= _STEADY_S:
            pause = _FIRST_PAUSE_S
        RESTARTS.labels(name).inc()
        _log.error("background_task_failed", task=name, again_in_s=pause, exc_info=failure)
        await asyncio.sleep(pause)
        pause = min(_MOST_PAUSE_S, 2 * pause)
