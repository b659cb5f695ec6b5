"""The exporter of one gateway: `/metrics`, `/sd` and the live view, and what keeps them up to date."""

import asyncio
import gzip
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from starlette.types import Receive, Scope, Send

from synthia_vllm import __version__
from synthia_vllm.metrics import series
from synthia_vllm.metrics.busy import LoopBusy
from synthia_vllm.metrics.cells import Cap, Counts, Table, single
from synthia_vllm.metrics.exposition import OPENMETRICS, TEXT, Exposition, read_page, sample_lines
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.growth import COUNTERS, Totals
from synthia_vllm.metrics.history import STEP_S, History
from synthia_vllm.metrics.live import live_view
from synthia_vllm.metrics.local import LocalEngine, of_all_processes
from synthia_vllm.metrics.rates import TICK_S
from synthia_vllm.metrics.recorder import Recorder, Tables, Waiting
from synthia_vllm.metrics.shared import SharedMetrics
from synthia_vllm.metrics.snapshot import of_process
from synthia_vllm.supervise import supervise

# Builds what shares the tables, given them and the labels that are bounded.
Share = Callable[[Callable[[], Iterable[Table]], Mapping[str, Cap]], SharedMetrics]

_VARY = ((b"vary", b"accept, accept-encoding"),)


class Exporter:
    """What a gateway's recorder, its process and its replicas tell, as one page.

    Without a fleet the engine is in this process and tells in prometheus_client's registry. `async with` keeps the
    window of tokens a second and the history of the live view going.
    """

    def __init__(
        self,
        recorder: Recorder,
        waiting: Callable[[], Waiting],
        *,
        fleet: Fleet | None = None,
        registry: CollectorRegistry = REGISTRY,
        wait: float = 0.2,
        more: Callable[[], Iterable[Table]] = tuple,
        model: Callable[[], str | None] = lambda: None,
        share: Share | None = None,
    ) -> None:
        """`model`: its folder or its id on the hub, for the live view. `share`: counts are told to other gateways."""
        self.recorder = recorder
        self.fleet = fleet
        self.shared = share(self._own, {"user": recorder.users, "model": recorder.models}) if share else None
        self.history = History(self._tables, begun=self.shared is None, clock=recorder.clock)
        self._waiting = waiting
        self._registry = registry
        self._told = of_all_processes(registry)
        self._local = LocalEngine(registry)
        self._wait = wait
        self._more = more
        self._model = model
        self._busy = LoopBusy()
        self._began = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Exporter":
        if self.shared is not None:
            await self.shared.__aenter__()
        self._task = supervise("exporter", self._keep)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.shared is not None:
            await self.shared.__aexit__()
        if self.fleet is not None:
            await self.fleet.close()

    async def page(self, openmetrics: bool = False, own: bool = False) -> bytes:
        """All series. Waits for the replicas, as long as was said at most; gives way to streams in between.

        What is counted is of all gateways that share it, but for `own`.
        """
        asking = [self.fleet.refresh(self._wait)] if self.fleet is not None else []
        if not own:
            asking.append(self.refresh())
        await asyncio.gather(*asking)
        sums = self.shared.tables if self.shared is not None and not own else {}
        page = Exposition(openmetrics)
        for table in self._series():
            await page.add_table(sums.get(table.family.name, table))
        if self.shared is not None:
            await page.add_table(single(series.GATEWAYS, 1 if own else self.shared.gateways))
        if self.fleet is not None:
            await self.fleet.add_to(page)
        else:
            for table in _local_replica():
                await page.add_table(table)
        for table in self._more():
            await page.add_table(sums.get(table.family.name, table))
        await asyncio.sleep(0)
        blocks = read_page(generate_latest(self._told).decode())
        for name in blocks.keys() & sums.keys():
            await page.add_table(sums[name])
            del blocks[name]
        await page.add_blocks((block, sample_lines(block.samples)) for block in blocks.values())
        return await page.bytes()

    async def refresh(self) -> None:
        """Asks what the other gateways have counted, where it is shared: for `live`, and for the history."""
        if self.shared is not None:
            await self.shared.refresh()

    def targets(self) -> list[dict[str, Any]]:
        """For Prometheus' HTTP service discovery. On one machine there is nothing beside `/metrics`."""
        return self.fleet.targets() if self.fleet is not None else []

    def live(self) -> dict[str, Any]:
        """The live view: now, who, and the last 15 minutes."""
        if self.fleet is not None:
            self.fleet.follow()
        server = {"model": self._model(), "version": __version__, "uptime_s": time.monotonic() - self._began}
        if self.shared is not None:
            server["gateways"] = self.shared.gateways
        return {"server": server} | live_view(self._tables(), self.recorder.slo, self.history, self.fleet, self._local)

    def _own(self) -> Iterable[Table]:
        """What other gateways are told."""
        return [*self._live_tables(), *self._more(), *of_process(self._registry)]

    def _live_tables(self) -> list[Table]:
        in_flight = [self.fleet.in_flight()] if self.fleet is not None else []
        return [*self._series(), *self.recorder.live_tables(), *in_flight]

    def _series(self) -> list[Table]:
        return [*self.recorder.tables(self._waiting()), single(series.EVENT_LOOP_BUSY, self._busy.share)]

    def _tables(self) -> Tables:
        """What the live view shows; where it is shared, as it was at the last `refresh`."""
        if self.shared is not None and self.shared.tables:
            return self.shared.tables
        return {table.family.name: table for table in self._live_tables()}

    async def _keep(self) -> None:
        began = stepped = time.monotonic()
        for tick in range(1, 2**62):
            await asyncio.sleep(max(0.0, began + tick * TICK_S - time.monotonic()))
            self.recorder.rates.tick()
            self._busy.tick()
            if time.monotonic() - stepped < STEP_S - TICK_S / 2:
                continue
            stepped = time.monotonic()
            if self.fleet is not None:
                await self.fleet.refresh(self._wait)
            await self.refresh()
            in_flight, queued = (
                sum(cell.value for cell in self._tables()[family.name].cells.values())
                for family in (series.REQUESTS_IN_FLIGHT, series.REQUESTS_QUEUED)
            )
            serving = self.fleet is None or self.fleet.serving
            self.history.step(in_flight if serving else None, queued, self._counted())

    def _counted(self) -> dict[str, Totals]:
        """What the engines have counted, by engine."""
        if self.fleet is None:
            local = self._local.values()
            return {series.LOCAL: {name: local.get(counter) for name, counter in COUNTERS.items()}}
        return {
            replica: {name: engine.page.value(counter) for name, counter in COUNTERS.items()}
            for replica, engine in self.fleet.engines.items()
        }


class Source(Protocol):
    """Whatever can be exported: a gateway (Exporter), or engines that stand alone (Sidecar)."""

    async def page(self, openmetrics: bool = False, own: bool = False) -> bytes: ...

    def targets(self) -> list[dict[str, Any]]: ...


class MetricsRoutes:
    """Answers `/metrics` (OpenMetrics with exemplars, and gzip, to who asks for them) and `/sd`. A pure ASGI app.

    `/metrics?scope=own` tells of the gateway that is asked, where several share what they count: for a Prometheus that
    scrapes each of them.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/sd":
            return await _answer(send, b"application/json", msgspec.json.encode(self.source.targets()))
        openmetrics = any(
            b"application/openmetrics-text" in value for name, value in scope["headers"] if name == b"accept"
        )
        own = b"scope=own" in scope["query_string"].split(b"&")
        page = await self.source.page(openmetrics, own)
        kind = OPENMETRICS if openmetrics else TEXT
        if not _takes_gzip(scope):
            return await _answer(send, kind, page, *_VARY)
        # Beside the streams: a large page takes tens of milliseconds.
        packed = await asyncio.to_thread(gzip.compress, page, 1)
        return await _answer(send, kind, packed, *_VARY, (b"content-encoding", b"gzip"))


def _local_replica() -> tuple[Counts, Counts]:
    states, up = Counts(series.REPLICAS), Counts(series.REPLICA_UP)
    for state in ("up", "unproven", "draining", "out"):
        states.cell(state).value = int(state == "up")
    up.cell(series.LOCAL).value = 1
    return states, up


def _takes_gzip(scope: Scope) -> bool:
    """By RFC 9110, 12.5.3: named, and not with a weight of zero."""
    given = b",".join(value for name, value in scope["headers"] if name == b"accept-encoding").decode("latin-1")
    for coding, _, weight in (part.replace(" ", "").lower().partition(";") for part in given.split(",")):
        if coding in ("gzip", "x-gzip"):
            return weight.removeprefix("q=").strip("0.") != "" if weight else True
    return False


async def _answer(send: Send, kind: bytes, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
