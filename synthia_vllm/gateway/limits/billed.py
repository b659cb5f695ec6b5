"""What a month has cost already: asked of the ledger's database, which may be gone."""

import asyncio
import time
from collections.abc import Callable

import structlog

from synthia_vllm.errors import Overloaded
from synthia_vllm.gateway.limits.base import OnLoss
from synthia_vllm.metrics.limits import FALLBACKS

Spent = Callable[[str, float], int]
_PAUSE_S = 5.0  # while it is lost, it is asked no more often

_log = structlog.get_logger(__name__)


class Billed:
    """Where a month's counter starts. While the database is gone: `closed` raises Overloaded (503), `local` is None.

    A database that takes longer than `answer_s` counts as gone.

    None lets a request pass this limit, once: the next one asks again.
    """

    def __init__(
        self,
        spent: Spent | None,
        on_loss: OnLoss,
        *,
        answer_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spent = spent
        self._answer_s = answer_s
        self._on_loss = on_loss
        self._clock = clock
        self._lost: float | None = None  # when it did not answer

    async def since(self, user: str, start: float) -> int | None:
        """Tokens billed to a user since then."""
        if self._spent is None:
            return 0
        if self._lost is None or self._clock() - self._lost >= _PAUSE_S:
            told, self._lost = self._lost is not None, self._clock()  # the others don't wait for what this one finds
            try:
                async with asyncio.timeout(self._answer_s):
                    spent = await asyncio.to_thread(self._spent, user, start)
            except (
                Exception
            ) as error:  # the driver's, a time-out, a thread that can't be started: all the same to a user
                if not told:
                    _log.error("month_not_known", error=str(error).partition("\n")[0] or "no answer", now=self._on_loss)
            else:
                self._lost = None
                return spent
        FALLBACKS.labels(self._on_loss).inc()
        if self._on_loss == "closed":
            raise Overloaded("what this month has used can't be looked up now", _PAUSE_S)
        return None
