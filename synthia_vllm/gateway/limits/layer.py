"""The layer that holds each user to its limits."""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import LimitExceeded, RequestError
from synthia_vllm.gateway.accounts import UNLIMITED, Account, UserLimits
from synthia_vllm.gateway.limits.base import Limiter, Refusal
from synthia_vllm.gateway.request import Layer, Request

_ANSWERED = " (answered here)"  # no user's name ends like this: they have no blanks


class Limits:
    """Reserves the most that a request may use, and settles what it did use when the engine is done with it.

    Raises LimitExceeded (429) with the wait after which the same request gets in; RequestError (400) for one that
    never can. Users without limits pass untouched.
    """

    def __init__(self, engine: Layer, *, limiter: Limiter, defaults: UserLimits = UNLIMITED) -> None:
        self.engine = engine
        self.limiter = limiter
        self.defaults = defaults
        self.arrivals = Arrivals(limiter, defaults)
        self._settling: set[asyncio.Task[None]] = set()

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        limits = merge(request.account.limits, self.defaults)
        return self.engine.generate(request) if limits == UNLIMITED else self._within(limits, request)

    async def _within(self, limits: UserLimits, request: Request) -> AsyncGenerator[Delta, None]:
        user = request.account.user
        most = request.prompt_tokens + request.max_generated
        reserving = asyncio.ensure_future(self.limiter.reserve(user, limits, request.id, most))
        try:
            refusal = await asyncio.shield(reserving)
        except asyncio.CancelledError:
            await self._to_its_end(self._give_back(reserving, request))
            raise
        finally:
            self.arrivals.decided(request.id)
        if refusal is not None:
            raise _error(refusal)
        try:
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            usage = request.usage
            used = usage.billed_prompt + usage.billed_generated
            await self._to_its_end(self.limiter.settle(user, request.id, used))

    async def _give_back(self, reserving: "asyncio.Future[Refusal | None]", request: Request) -> None:
        """For one who left while it was reserved: it may be booked all the same."""
        with contextlib.suppress(RequestError):
            await reserving
            await self.limiter.settle(request.account.user, request.id, 0)

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs it in a task of its own: it goes on where this one is cancelled."""
        task = asyncio.create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.shield(task)


class Arrivals:
    """Looks at a user's limits before the work that a request makes, which may be a second of a processor.

    Books nothing: how much is asked for is known after that work, and reserved then by `Limits`. Of a user with limits
    one long request at a time is worked on, until that is decided: else all that come at once would pass the look.
    """

    def __init__(self, limiter: Limiter, defaults: UserLimits) -> None:
        self.limiter = limiter
        self.defaults = defaults
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._held: dict[str, asyncio.Lock] = {}  # request: its user's turn

    async def look(self, account: Account) -> None:
        """Raises LimitExceeded for what would be refused whatever it asks for."""
        limits = merge(account.limits, self.defaults)
        if limits != UNLIMITED and (refusal := await self.limiter.look(account.user, limits)) is not None:
            raise _error(refusal)

    async def count(self, account: Account, request_id: str) -> None:
        """Raises LimitExceeded for more questions a minute, of those that no engine is asked, than a user may have
        requests. They are counted apart: asking how long a prompt is takes nothing from what it may generate.
        """
        limit = merge(account.limits, self.defaults).requests_per_minute
        if limit is None:
            return
        name = f"{account.user}{_ANSWERED}"
        own = UserLimits(requests_per_minute=limit)
        if (refusal := await self.limiter.reserve(name, own, request_id, 0)) is not None:
            raise _error(refusal)
        await self.limiter.settle(name, request_id, 0)

    async def take_turn(self, account: Account, request_id: str) -> None:
        """Waits until it is its user's turn, and looks again. `decided` must follow, whatever becomes of it."""
        if merge(account.limits, self.defaults) == UNLIMITED:
            return
        turn = self._turns.get(account.user) or asyncio.Lock()
        self._turns[account.user] = turn
        await turn.acquire()
        self._held[request_id] = turn
        await self.look(account)

    def decided(self, request_id: str) -> None:
        """It is reserved or refused, or will never be; may be told twice."""
        if (turn := self._held.pop(request_id, None)) is not None:
            turn.release()


def merge(own: UserLimits, defaults: UserLimits) -> UserLimits:
    """A user's own limits; where it has none, the default."""
    if defaults == UNLIMITED:
        return own
    missing = {name: getattr(defaults, name) for name in own.__slots__ if getattr(own, name) is None}
    return replace(own, **missing)


def _error(refusal: Refusal) -> RequestError:
    if refusal.retry_after == math.inf:
        name = refusal.reason.replace("_", " ")
        error = RequestError(
            f"prompt and max_tokens together are over your limit of {refusal.limit} {name}: "
            "this request never gets in; ask for fewer tokens",
            param="max_tokens",
        )
        error.reason = refusal.reason
        return error
    return LimitExceeded(refusal.reason, refusal.limit, refusal.retry_after)
