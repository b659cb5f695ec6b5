"""One workload on one server: sends what is due when it is due, keeps what came of it, says if it can be trusted."""

import asyncio
import gc
import random
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from synthia_vllm.bench.client import GREEDY, Call, Client, Patience, Reply, Target
from synthia_vllm.bench.prompts import Prompts
from synthia_vllm.bench.run_file import Measurement, Request

if TYPE_CHECKING:
    from synthia_vllm.bench.clients import Clients

Kind = Literal["closed", "open", "conversations", "trace", "users"]
# A client whose p99 lateness is above both bent the load that it was to make.
LATE_S, LATE_SHARE = 0.005, 0.05
# A measurement that is ended early leaves out what was under way: that may be so little of all tokens.
LEFT_OUT_SHARE = 0.05
_LAST_S = 60.0


class Workload(Protocol):
    """What is sent when. `drive` ends when all replies are there.

    It draws lengths and moments from `load.random`, which is the same for all servers of a round, and prompts from
    `load.prompts`.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def streams(self) -> int | None: ...
    @property
    def rate(self) -> float | None: ...
    @property
    def weights(self) -> Mapping[str, float]: ...

    async def drive(self, load: "Load") -> None: ...


class Load:
    """The measurement's clock, and the requests so far. `start`: when it begins, by `time.perf_counter`."""

    def __init__(self, client: Client, *, seed: str, salt: str = "", start: float | None = None) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.prompts = Prompts(f"{seed}{client.target.salt}/{salt}")
        self.requests: list[Request] = []
        self.under_way: list[Reply] = []
        self._start = time.perf_counter() if start is None else start

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def send(self, call: Call, due_s: float, into: Reply | None = None) -> Request:
        """Sends at that moment and waits for the whole reply."""
        if (wait := due_s - self.now()) > 0:
            await asyncio.sleep(wait)
        reply = into or Reply()
        self.under_way.append(reply)
        request = await self.client.send(call, start=self._start, due_s=due_s, into=reply)
        self.under_way.remove(reply)
        self.requests.append(request)
        return request


@dataclass(frozen=True)
class Terms:
    """How measurements are taken.

    salt      of prompts: without one, a run with the seed of an earlier one finds its prompts in the prefix cache
    limit_s   after which what is under way is left out; None: all replies are waited for
    clients   processes that send, for loads that are too much for one
    """

    seed: int = 1
    sampling: Mapping[str, Any] = field(default_factory=lambda: GREEDY)
    patience: Patience = Patience()  # noqa: RUF009
    limit_s: float | None = None
    salt: str = field(default_factory=lambda: secrets.token_hex(4))
    clients: "Clients | None" = None


@dataclass(frozen=True)
class Collected:
    """What a client saw. `lost`: chunks of replies that the terms' limit left out; None: it came to its end."""

    requests: list[Request]
    lost: int | None


async def measure(target: Target, workload: Workload, terms: Terms, *, server: str, number: int) -> Measurement:
    """Runs a workload once. One that the terms' limit ended tells whether it still counts."""
    gc.collect()
    started = time.time()
    seed = f"{terms.seed}/{workload.name}/{workload.streams}/{workload.rate}/{number}"
    if terms.clients is None:
        found = await collect(target, workload, terms, seed)
    else:
        found = await terms.clients.collect(target, workload, terms, seed)
    requests = sorted(found.requests, key=lambda request: request.sent_s)
    return Measurement(
        server=server,
        workload=workload.name,
        round=number,
        kind=workload.kind,
        streams=workload.streams,
        rate=workload.rate,
        started_at=round(started, 3),
        duration_s=max((request.done_s for request in requests), default=time.time() - started),
        requests=requests,
        invalid=[*lateness(requests), *left_out(found, terms.limit_s)],
        weights=dict(workload.weights),
    )


async def collect(target: Target, workload: Workload, terms: Terms, seed: str, start: float | None = None) -> Collected:
    """Sends it from this process; `start` is `Load`'s."""
    async with Client(target, sampling=terms.sampling, patience=terms.patience) as client:
        load = Load(client, seed=seed, salt=terms.salt, start=start)
        collecting = gc.isenabled()
        gc.disable()  # a collection of all these lists would make the client late
        try:
            ended = await _drive(workload, load, terms.limit_s)
        finally:
            if collecting:
                gc.enable()
    return Collected(load.requests, None if ended else sum(len(reply.chunks) for reply in load.under_way))


async def _drive(workload: Workload, load: Load, limit_s: float | None) -> bool:
    """True if it came to its end, False if the limit ended it: then at least one reply is there, if any comes."""
    running = asyncio.create_task(workload.drive(load))
    try:
        done, _ = await asyncio.wait((running,), timeout=limit_s)
        waited = time.monotonic()
        while not done and not load.requests and time.monotonic() - waited < _LAST_S:
            done, _ = await asyncio.wait((running,), timeout=0.5)
        if done:
            running.result()
        return bool(done)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def whole(found: Measurement) -> bool:
    """Whether the server answered anything."""
    return any(request.error is None for request in found.requests)


def lateness(requests: Sequence[Request]) -> list[str]:
    """Why the client did not make the load that was asked for, if so."""
    if not requests:
        return ["no request ended"]
    late = quantile([request.sent_s - request.due_s for request in requests], 0.99)
    waits = [request.chunk_s[0] - request.sent_s for request in requests if request.chunk_s]
    allowed = max(LATE_S, LATE_SHARE * statistics.median(waits)) if waits else LATE_S
    if late <= allowed:
        return []
    return [
        f"the client could not keep its schedule: p99 of its lateness is {1000 * late:.1f} ms, "
        f"and {1000 * allowed:.1f} ms is allowed (the more of {1000 * LATE_S:.0f} ms and {LATE_SHARE:.0%} of the "
        "median TTFT)"
    ]


def left_out(found: Collected, limit_s: float | None) -> list[str]:
    """Why a measurement that was ended early does not count, if so: its throughput is that of whole replies."""
    if found.lost is None:
        return []
    kept = sum(len(request.chunk_s) for request in found.requests)
    if found.lost <= LEFT_OUT_SHARE * (found.lost + kept):
        return []
    share = found.lost / (found.lost + kept)
    return [f"ended after {limit_s:.0f} s with {share:.0%} of its chunks in replies that were under way"]


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
