"""The layer that holds each user to its limits."""

import asyncio
import math
from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.errors import LimitExceeded, RequestError
from synthia_vllm.gateway.accounts import UNLIMITED, UserLimits
from synthia_vllm.gateway.call import call_of
from synthia_vllm.gateway.limits.base import Limiter, Refusal


class Limits:
    """Reserves the most that a call may use, and settles what it did use, however it ends. A pure ASGI layer.

    Raises LimitExceeded (429) with the wait after which the same request gets in; RequestError (400) for one that
    never can. Users without limits pass untouched.
    """

    def __init__(self, app: ASGIApp, *, limiter: Limiter, defaults: UserLimits = UNLIMITED) -> None:
        self.app = app
        self.limiter = limiter
        self.defaults = defaults
        self._settling: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope)
        if call is None or call.max_generated == 0:
            return await self.app(scope, receive, send)
        limits = merge(call.account.limits, self.defaults)
        if limits == UNLIMITED:
            return await self.app(scope, receive, send)
        user = call.account.user
        refusal = await self.limiter.reserve(user, limits, call.id, call.prompt_tokens + call.max_generated)
        if refusal is not None:
            raise _error(refusal)
        try:
            return await self.app(scope, receive, send)
        finally:
            # A task of its own: it goes on where this one is cancelled.
            settling = asyncio.create_task(
                self.limiter.settle(user, call.id, call.billed_prompt + call.billed_generated)
            )
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)


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
