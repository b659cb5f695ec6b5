"""Whether a request would be answered now, which `/health` does not tell."""

import asyncio
from collections.abc import Callable
from time import perf_counter

from synthia_vllm.engine.port import Engine

_FRESH_S = 5.0  # a token is proof for so long


class Readiness:
    """True if the engine has generated a token in the last seconds, or says that it would now.

    `last_token` tells the time (`perf_counter`) of the last token of any running request: an engine that works needs no
    canary, and a busy one could not answer it in time. Probes that come together ask once.
    """

    def __init__(self, engine: Engine, *, last_token: Callable[[], float]) -> None:
        self.engine = engine
        self._last_token = last_token
        self._proved = float("-inf")
        self._asking: asyncio.Task[bool] | None = None

    async def __call__(self) -> bool:
        if max(self._proved, self._last_token()) >= perf_counter() - _FRESH_S:
            return True
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        ready = await self.engine.ready()
        if ready:
            self._proved = perf_counter()
        return ready
