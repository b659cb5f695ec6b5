import asyncio
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest

from synthia_vllm.gateway.store.threads import DaemonThreads

_PATIENCE_S = 10


def test_calls_run_side_by_side_up_to_so_many() -> None:
    threads = DaemonThreads(3, "test")
    together = threading.Barrier(3)
    calls: list[Future[int]] = [threads.submit(together.wait, _PATIENCE_S) for _ in range(3)]
    assert sorted(call.result(_PATIENCE_S) for call in calls) == [0, 1, 2]
    names = {threads.submit(lambda: threading.current_thread().name).result(_PATIENCE_S) for _ in range(20)}
    assert names <= {"test-0", "test-1", "test-2"}
    threads.shutdown()


def test_one_thread_does_all_if_there_is_one() -> None:
    threads = DaemonThreads(1, "test")
    done: list[int] = []
    calls = [threads.submit(done.append, number) for number in range(50)]
    for call in calls:
        call.result(_PATIENCE_S)
    assert done == list(range(50))
    threads.shutdown()


async def test_an_error_comes_to_who_waits_for_it() -> None:
    threads = DaemonThreads(1, "test")
    with pytest.raises(ZeroDivisionError):
        await asyncio.get_running_loop().run_in_executor(threads, lambda: 1 // 0)
    assert await asyncio.get_running_loop().run_in_executor(threads, lambda: 1) == 1
    threads.shutdown()


def test_a_call_that_was_given_up_is_not_made() -> None:
    threads = DaemonThreads(1, "test")
    begun, go = threading.Event(), threading.Event()
    first = threads.submit(lambda: (begun.set(), go.wait(_PATIENCE_S)))
    made: list[int] = []
    assert begun.wait(_PATIENCE_S)
    second = threads.submit(made.append, 2)
    third = threads.submit(made.append, 3)
    assert second.cancel()
    go.set()
    third.result(_PATIENCE_S)
    assert first.done()
    assert made == [3]
    threads.shutdown()


def test_where_no_more_threads_start_those_that_run_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = DaemonThreads(2, "test")
    go = threading.Event()
    first = threads.submit(go.wait, _PATIENCE_S)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    second = threads.submit(lambda: 2)
    go.set()
    assert second.result(_PATIENCE_S) == 2
    assert first.result(_PATIENCE_S)
    with pytest.raises(RuntimeError, match="new thread"):
        DaemonThreads(1, "another").submit(lambda: 1)
    threads.shutdown()


def test_a_thread_that_hangs_holds_up_no_process() -> None:
    code = (
        "import threading; from synthia_vllm.gateway.store.threads import DaemonThreads\n"
        "threads = DaemonThreads(1, 'test'); threads.submit(threading.Event().wait); threads.shutdown()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
