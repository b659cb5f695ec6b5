"""The replicas as their own metrics show them: asked all at once, on their own ports."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args
from urllib.parse import urlsplit

import aiohttp
import structlog

from synthia_vllm.metrics import series
from synthia_vllm.metrics.cells import Counts
from synthia_vllm.metrics.engines import EnginePage, Gone
from synthia_vllm.metrics.exposition import Exposition
from synthia_vllm.metrics.replicas import ReplicaSource, ReplicaState, ReplicaView, read_page
from synthia_vllm.supervise import spawn

ANSWER_S = 5.0  # an engine that takes longer is stale
_KEEP_GONE_S = 15 * 60.0  # so long one that is gone is shown as down
_MOST_GONE_SHOWN = 32

LIVE_IN_FLIGHT = series.Family("live_in_flight", "gauge", ("replica",), "Requests at a replica, for the live view.")

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Engine:
    """One replica and what it told."""

    view: ReplicaView
    page: EnginePage
    fresh: bool = False  # its last answer came in time
    asking: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def serves(self) -> bool:
        """Whether it can generate now. One that has never told of itself, as an engine without metrics, is trusted."""
        return self.view.state in ("up", "draining") and (self.fresh or not self.page.blocks)


class Fleet:
    """Asks every replica for its metrics, side by side, never twice at once.

    `refresh(wait)` returns when all have answered, at the latest after `wait` seconds: then what was told before
    stands, and the late answer is taken when it comes. Pages are read on the event loop, one at a time (about 2 ms
    for vLLM's).
    """

    def __init__(
        self,
        source: ReplicaSource,
        *,
        headers: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engines: dict[str, Engine] = {}
        self.gone_since: dict[str, tuple[float, ReplicaView]] = {}
        self._source = source
        self._gone = Gone()
        self._headers = {"Accept": "text/plain;version=0.0.4", **(headers or {})}
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def refresh(self, wait: float) -> None:
        self.follow()
        for engine in self.engines.values():
            if engine.asking is None or engine.asking.done():
                engine.asking = spawn("fleet", self._ask(engine))
        asked = [engine.asking for engine in self.engines.values() if engine.asking]
        if asked:
            await asyncio.wait(asked, timeout=wait)

    async def add_to(self, page: Exposition) -> None:
        """Our series on replicas, and all that the replicas told."""
        self.follow()
        states, up = Counts(series.REPLICAS), Counts(series.REPLICA_UP)
        counts = Counter(engine.view.state for engine in self.engines.values())
        for state in get_args(ReplicaState):
            states.cell(state).value = counts[state]
        for name, engine in self.engines.items():
            up.cell(name).value = int(engine.view.state == "up" and engine.fresh)
        for name in self.gone_since:
            up.cell(name).value = 0
        await page.add_table(states)
        await page.add_table(up)
        for engine in self.engines.values():
            await page.add_blocks(engine.page.lines())
        await page.add_blocks(self._gone.lines())

    def in_flight(self) -> Counts:
        """Requests of this gateway, by replica."""
        found = Counts(LIVE_IN_FLIGHT)
        for name, engine in self.engines.items():
            found.cell(name).value = engine.view.in_flight
        return found

    def targets(self) -> list[dict[str, Any]]:
        """For Prometheus' `http_sd_config`: where each replica is to be scraped."""
        found = []
        for view in self._source.replicas():
            parts = urlsplit(view.url)
            path = f"{parts.path.rstrip('/')}/metrics"
            labels = {"replica": view.name, "__metrics_path__": path, "__scheme__": parts.scheme}
            found.append({"targets": [parts.netloc.rpartition("@")[2]], "labels": labels})
        return found

    @property
    def serving(self) -> int:
        """How many can generate now."""
        return sum(engine.serves for engine in self.engines.values())

    def follow(self) -> None:
        """Looks which replicas there are, and in which state; asks none of them."""
        there = {view.name: view for view in self._source.replicas()}
        now = self._clock()
        for name in self.engines.keys() - there.keys():
            engine = self.engines.pop(name)
            if engine.asking is not None:
                engine.asking.cancel()
            self._gone.add(name, engine.page)
            self.gone_since[name] = (now, engine.view)
        for name, view in there.items():
            if name in self.engines:
                self.engines[name].view = view
            else:
                self.engines[name] = Engine(view, self._gone.take_back(name) or EnginePage(name))
                self.gone_since.pop(name, None)
        kept = [
            (name, gone) for name, gone in self.gone_since.items() if now - gone[0] < _KEEP_GONE_S and name not in there
        ]
        self.gone_since = dict(kept[-_MOST_GONE_SHOWN:])

    async def close(self) -> None:
        tasks = [engine.asking for engine in self.engines.values() if engine.asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _ask(self, engine: Engine) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                text = await self._read(f"{engine.view.url.rstrip('/')}/metrics")
            engine.page.update(text)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if engine.fresh:
                reason = f"{type(error).__name__}: {error}"
                _log.warning("replica_metrics_stale", replica=engine.view.name, error=reason)
            engine.fresh = False
            engine.page.lose()
        else:
            engine.fresh = True

    async def _read(self, url: str) -> str:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return await read_page(self._session, url, self._headers)
