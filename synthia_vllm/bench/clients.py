"""Several client processes that make one load: one alone is late with 256 requests at once or 10,000 chunks a second.

Each drives its share of the streams, or of the rate, from a moment that all of them agree on. The clock is the
machine's (`time.perf_counter` is CLOCK_MONOTONIC on Linux), so their times are of one measurement.
"""

import asyncio
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import uvloop

from synthia_vllm.bench.client import Call, Target
from synthia_vllm.bench.measuring import Collected, Terms, Workload, collect
from synthia_vllm.bench.workloads import ClosedLoop, OpenLoop

MOST_CLIENTS = 4
_AHEAD_S = 0.3  # in which all of them have read what they are to do
_READ_S = 20e6  # characters of prompts that they read a second, at least


class Clients:
    """Processes that stay between measurements. Used as a context manager."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))

    def __enter__(self) -> "Clients":
        # All at once, before anything is measured: a pool starts a process only when it has something to do.
        list(self._pool.map(time.sleep, [1.0] * self.count))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def collect(self, target: Target, workload: Workload, terms: Terms, seed: str) -> Collected:
        """As `measuring.collect`, from all processes where the workload can be shared out."""
        parts = shares(workload, self.count)
        start = time.perf_counter() + _AHEAD_S + _characters(workload) / _READ_S
        alone = replace(terms, clients=None)
        loop = asyncio.get_running_loop()
        found = await asyncio.gather(
            *(
                loop.run_in_executor(self._pool, _collect, target, part, alone, f"{seed}/{number}", start)
                for number, part in enumerate(parts)
            )
        )
        lost = [one.lost for one in found if one.lost is not None]
        return Collected([request for one in found for request in one.requests], sum(lost) if lost else None)


def client_processes() -> int:
    """A quarter of the cores, for servers on this machine need theirs."""
    return min(MOST_CLIENTS, max(1, len(os.sched_getaffinity(0)) // 4))


def shares(workload: Workload, count: int) -> list[Workload]:
    """What each of up to `count` processes does; the whole in one where it can't be shared out."""
    if isinstance(workload, ClosedLoop):
        count = min(count, workload.streams)
        streams, requests = _even(workload.streams, count), _even(workload.requests, count)
        calls = [workload.calls[number::count] for number in range(count)]
        parts = zip(streams, requests, calls, strict=True)
        return [replace(workload, streams=a, requests=b, calls=c) for a, b, c in parts]
    if isinstance(workload, OpenLoop):
        # Poisson processes laid over each other are one; a bursty one would be less so.
        count = count if workload.burstiness == 1 and workload.rate * workload.seconds >= count else 1
        return [replace(workload, rate=workload.rate / count)] * count
    return [workload]


def _characters(workload: Workload) -> int:
    return sum(map(Call.size, workload.calls)) if isinstance(workload, ClosedLoop) else 0


def _even(whole: int, count: int) -> list[int]:
    return [whole // count + (number < whole % count) for number in range(count)]


def _collect(target: Target, workload: Workload, terms: Terms, seed: str, start: float) -> Collected:
    async def run() -> Collected:
        await asyncio.sleep(start - time.perf_counter())
        return await collect(target, workload, terms, seed, start)

    found: Collected = uvloop.run(run())
    return found
