"""The exporter beside engines that no gateway of ours stands in front of: what they tell themselves, on one page."""

import asyncio
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from synthia_vllm.metrics.exposition import Exposition
from synthia_vllm.metrics.fleet import Fleet
from synthia_vllm.metrics.rates import TokenRates
from synthia_vllm.metrics.replicas import ReplicaView, engine_name
from synthia_vllm.supervise import supervise

_POLL_S = 2.0  # the window of tokens a second is that exact
_MODEL = re.compile(r'\bmodel_name="((?:[^"\\]|\\.)*)"')
_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


class Sidecar:
    """`vllm:*` of every engine with a `replica` label, and of ours what can be told from outside.

    That is `synthia_tokens_per_second`, `synthia_replicas` and `synthia_replica_up`. What clients get can't be seen
    from here. `async with` keeps asking the engines.
    """

    def __init__(self, urls: Sequence[str], *, headers: dict[str, str] | None = None, wait: float = 0.2) -> None:
        self._urls = {engine_name(url): url.rstrip("/") for url in urls}
        self._fleet = Fleet(self, headers=headers)
        self._rates = TokenRates()
        self._wait = wait
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Sidecar":
        self._task = supervise("exporter", self._keep)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._fleet.close()

    def replicas(self) -> list[ReplicaView]:
        """`out` is one that does not answer."""
        engines = self._fleet.engines
        return [
            ReplicaView(name, url, "up" if name in engines and engines[name].fresh else "out", 0)
            for name, url in self._urls.items()
        ]

    async def page(self, openmetrics: bool = False, own: bool = False) -> bytes:
        await self._fleet.refresh(self._wait)
        self._note()
        page = Exposition(openmetrics)
        await page.add_table(self._rates.table())
        await self._fleet.add_to(page)
        return await page.bytes()

    def targets(self) -> list[dict[str, Any]]:
        return self._fleet.targets()

    def _note(self) -> None:
        for name, engine in self._fleet.engines.items():
            totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
            for place, counter in enumerate(_COUNTERS):
                block = engine.page.blocks.get(counter)
                for key, value in block.samples.items() if block else ():
                    found = _MODEL.search(key)
                    totals[found[1] if found else ""][place] += float(value)
            for model, (prompt, generation) in totals.items():
                self._rates.set(model, name, prompt, generation)

    async def _keep(self) -> None:
        while True:
            await self._fleet.refresh(_POLL_S)
            self._note()
            self._rates.tick()
            await asyncio.sleep(_POLL_S)
