"""Keeps the start of one replica off the cores that the engines of others compute on.

Importing vLLM and loading the model takes most of a minute of CPU time. On a machine without a GPU the streams of the
other replicas would wait for that, and most of all those that just lost the replica that this one replaces.
"""

import contextlib
import os
from collections.abc import Set

import psutil

_WORKER = "VLLM::Worker"  # vLLM's title of a process that computes; bound to its cores while it starts
_CAN_BIND = hasattr(os, "sched_setaffinity")  # Linux


def leave_busy_cores(worker: str = _WORKER) -> None:
    """Moves this process to cores that no process of this name is bound to, if there are any."""
    if _CAN_BIND and (free := _allowed() - _bound(worker)):
        stay_on(free)


def stay_on(cores: Set[int]) -> None:
    """Binds every thread of this process, and so what it will start, to these cores. No cores: to all."""
    if _CAN_BIND:
        _bind(psutil.Process(), cores or _allowed())


def return_to_all_cores() -> None:
    """After the start, for the server. Its engine core and worker stay where they are: they work in turns.

    The engine core waits for its worker in a loop of `sched_yield` (vLLM's `shm_broadcast.SpinCondition`), and would
    take a core of another engine for that. Beside its worker it only makes room.
    """
    if _CAN_BIND:
        _bind(psutil.Process(), _allowed())


def make_room(share: Set[int], worker: str = _WORKER) -> None:
    """Moves the engine that this process has started off those cores of its share that others are bound to.

    An empty share is all cores. To call now and then: replicas come and go. One that has the machine to itself has a
    thread on each core, and every step would wait for the one that shares its core with a newcomer: ten times slower.
    It keeps its number of threads.
    """
    if not _CAN_BIND:
        return
    engine = psutil.Process().children(recursive=True)
    cores = share or _allowed()
    wanted = (cores - _bound(worker, but={process.pid for process in engine})) or cores
    if wanted != (set().union(*map(_threads_on, engine)) or _allowed()):
        for process in engine:
            _bind(process, wanted)


def _allowed() -> set[int]:
    """The CPUs that this process may be bound to, whatever it is bound to now: its parent's, the raylet's."""
    return os.sched_getaffinity(os.getppid())


def _bound(worker: str, but: Set[int] = frozenset()) -> set[int]:
    """CPUs that threads of workers are bound to; vLLM binds each thread that computes to a core of its own."""
    found: set[int] = set()
    for process in psutil.process_iter(["name"]):
        if (process.info["name"] or "").startswith(worker) and process.pid not in but:
            found |= _threads_on(process)
    return found


def _threads_on(process: psutil.Process) -> set[int]:
    """CPUs of those threads that are bound to some, and not to all of the machine's."""
    everywhere, found = _allowed(), set[int]()
    with contextlib.suppress(psutil.Error):
        for thread in process.threads():
            with contextlib.suppress(OSError):  # it has ended
                cores = os.sched_getaffinity(thread.id)
                found |= cores if cores < everywhere else set()
    return found


def _bind(process: psutil.Process, cores: Set[int]) -> None:
    with contextlib.suppress(psutil.Error):
        for thread in process.threads():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread.id, cores)
