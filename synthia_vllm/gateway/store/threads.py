"""Threads for a database that may never answer."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(Executor):
    """Some threads that a process doesn't wait for at its end: those of a ThreadPoolExecutor hold it up for good.

    `submit` raises RuntimeError where not even the first thread can be started.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._started = 0
        self._idle = Semaphore(0)
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """From one thread only: the event loop's."""
        if not self._idle.acquire(blocking=False) and self._started < self._most:
            self._start()
        future: Future[T] = Future()
        self._work.put((future, partial(call, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Lets idle threads end; waits for none."""
        for _ in range(self._started):
            self._work.put(None)

    def _start(self) -> None:
        thread = Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._started:
                raise
        else:
            self._started += 1

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, call
            self._idle.release()
