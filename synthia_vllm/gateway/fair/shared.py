"""Several gateways before the same engines share one fair queue, through Redis."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from importlib.resources import files

import structlog

from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.fair.settlement import IDLE_S, PERIOD_S, Settlement
from synthia_vllm.redis_client import REDIS_GONE, open_redis

_LEAST_S = 0.02  # between two settlements

_log = structlog.get_logger(__name__)


class SharedQueue:
    """Settles a gateway's queue with those of the others (`Settlement`), beside the requests and never on their way.

    Ten times a second while something waits or runs here and others are about, else once; and as soon as a request
    waits where none did. `engines` are names of these that are the same for all gateways before them.
    """

    def __init__(
        self,
        url: str,
        engines: Sequence[str],
        scheduler: Scheduler,
        on_gateways: Callable[[int], None],
        *,
        least: int = 1,
        timeout: float = 1.0,
    ) -> None:
        self._redis = open_redis(url, timeout)
        self._script = self._redis.register_script((files(__package__) / "settle.lua").read_text())
        self._scheduler = scheduler
        self._settlement = Settlement(scheduler, engines, on_gateways, least=least)
        self._waits = asyncio.Event()
        self._lost = False
        scheduler.on_wait = self._hurry

    async def run(self) -> None:
        """Settles until it is cancelled."""
        while True:
            await self.settle()
            await asyncio.sleep(_LEAST_S)
            wait = PERIOD_S if self._settlement.busy else IDLE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait - _LEAST_S):
                    await self._waits.wait()
            self._waits.clear()

    async def settle(self, *, leaves: bool = False) -> None:
        """Once; raises nothing where Redis is gone."""
        settlement = self._settlement
        try:
            answer = await self._script(keys=settlement.keys, args=settlement.question(leaves=leaves))
        except REDIS_GONE as error:
            if settlement.lost() and not self._lost:
                self._lost = True
                _log.error("shared_queue_lost", error=str(error), gateways=settlement.gateways)
            return
        if self._lost:
            self._lost = False
            _log.warning("shared_queue_back")
        if not leaves:
            settlement.learn(answer)

    async def close(self) -> None:
        """Leaves its part to the others at once; where Redis is gone they find out by its beat."""
        self._scheduler.on_wait = None
        await self.settle(leaves=True)
        await self._redis.aclose()

    def _hurry(self) -> None:
        if self._settlement.gateways > 1:
            self._waits.set()
