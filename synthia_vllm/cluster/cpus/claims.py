"""Which replica computes on which cores, where several share a machine without a GPU.

Each has its share (`share.py`). Beyond that:

- A newcomer starts on cores that no other computes on. Importing vLLM and loading the model takes most of a minute of
  CPU time, and the streams of the others would wait for that; most of all those that just lost the replica it replaces.
- A replica that finds itself alone computes on all cores from its next step on. What it takes over from one that was
  killed has to be computed again before it goes on.
- It gives them up as soon as a newcomer starts: with a thread on a core that another one uses, every step would wait
  for that thread.

Replicas know of one another by claims: a file each, which stands until a process that it names has ended.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from pathlib import Path

import msgspec
import platformdirs
import psutil

from synthia_vllm.engine.hardware import core_of, physical_cores, usable_cpus

_WORKER = "VLLM::Worker"  # vLLM's title of the process that computes
CAN_BIND = hasattr(os, "sched_setaffinity")  # Linux
_LOOK_S = 0.5  # for newcomers; that one has ended is told by the kernel


class Claim(msgspec.Struct, frozen=True):
    """CPUs that a replica computes on, and its processes as (process id, when it began)."""

    cpus: list[int]
    processes: list[tuple[int, float]]

    def stands(self) -> bool:
        return all(map(_lives, self.processes))


class Claims:
    """This process's claim and those of others on this machine."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or platformdirs.user_runtime_path("synthia-vllm") / "cores"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own = self._folder / f"{os.getpid()}.json"

    def make(self, cpus: Iterable[int], processes: Iterable[psutil.Process] = ()) -> None:
        """Claims these CPUs for this process and those, in place of what it claimed before."""
        named = [(process.pid, process.create_time()) for process in (psutil.Process(), *processes)]
        new = self._own.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(Claim(sorted(cpus), named)))
        new.replace(self._own)

    def others(self) -> list[Claim]:
        """Those that stand. Removes the files of those that don't."""
        found = []
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # another one has removed it
                if path == self._own:
                    continue
                claim = _read(path)
                if claim is not None and claim.stands():
                    found.append(claim)
                else:
                    path.unlink()
        return found


def _read(path: Path) -> Claim | None:
    """None for what is no claim: of another version, or cut off on a full disk."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Claim)
    except msgspec.DecodeError:
        return None


def start_on_free_cores(claims: Claims) -> None:
    """Binds this process to cores that no other claims, and claims them; where there are none, to half of them all."""
    if not CAN_BIND:
        return
    everything = _allowed()
    free = everything.difference(*(claim.cpus for claim in claims.others()))
    bind(free or set(sorted(everything)[len(everything) // 2 :]))
    claims.make(os.sched_getaffinity(0))


def bind(cpus: Set[int], process: psutil.Process | None = None) -> None:
    """Binds every thread of a process, by default this one, and so what it will start, to these CPUs. None: to all."""
    if not CAN_BIND:
        return
    with contextlib.suppress(psutil.Error):
        for thread in (process or psutil.Process()).threads():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread.id, cpus or _allowed())


async def share_cores(claims: Claims, base: Sequence[int], compute_on: Callable[[list[int]], Awaitable[None]]) -> None:
    """Has the engine that this process has started compute on the cores that are its to use, for as long as it runs.

    base        CPUs that it was started on, the one of its first thread first
    compute_on  tells the engine, as `engine.cpu_worker.Worker.compute_on`
    """
    engine = psutil.Process().children(recursive=True)
    claims.make(base, engine)
    # The server asks and answers: it may run anywhere.
    bind(set())
    now = list(base)
    if (everything := wanted_cpus(base, ())) != now:
        # What oneDNN prepares for so many threads takes a while, once: not when it is needed.
        await compute_on(everything)
        await compute_on(now)
    while True:
        others = claims.others()
        wanted = wanted_cpus(base, others)
        if wanted != now:
            # vLLM's engine core waits for its worker in a loop of `sched_yield`, and would take another engine's core.
            for process in engine:
                if not process.name().startswith(_WORKER):
                    bind(set(base) & set(wanted) or set(wanted), process)
            await compute_on(wanted)
            now = wanted
        await _one_ends(others, _LOOK_S)


def wanted_cpus(base: Sequence[int], others: Sequence[Claim]) -> list[int]:
    """All of its own that no other claims; if it is alone, the others of its NUMA node as well, one of each core."""
    if others:
        taken = {core_of(cpu) for claim in others for cpu in claim.cpus}
        return [cpu for cpu in base if core_of(cpu) not in taken] or list(base)
    own = {core_of(cpu) for cpu in base}
    more = (cpu for cpu in physical_cores(_allowed()) if core_of(cpu) not in own)
    return [*base, *(cpu for cpu in more if _node_of(cpu) == _node_of(base[0]))]


async def _one_ends(claims: Sequence[Claim], seconds: float) -> None:
    """Returns when a process of these claims has ended, at once, or when the time is up."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.ExitStack() as watched:
        for pid in {pid for claim in claims for pid, _ in claim.processes}:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:  # it has
                return
            except OSError:  # not allowed here, or too many open files: the time will do
                continue
            watched.callback(os.close, descriptor)
            loop.add_reader(descriptor, ended.set)
            watched.callback(loop.remove_reader, descriptor)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), seconds)


def _lives(process: tuple[int, float]) -> bool:
    pid, began = process
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid)
        return found.create_time() == began and found.status() != psutil.STATUS_ZOMBIE
    return False


def _allowed() -> set[int]:
    """The CPUs that this process may be bound to, whatever it is bound to now: its parent's, the raylet's."""
    return usable_cpus(os.getppid())


def _node_of(cpu: int) -> list[str]:
    return sorted(path.name for path in Path(f"/sys/devices/system/cpu/cpu{cpu}").glob("node*"))
