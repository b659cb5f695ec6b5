"""The layer in which requests wait for their turn."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import Overloaded, QueueTimeout
from synthia_vllm.gateway.fair.scheduler import Scheduler
from synthia_vllm.gateway.fair.tickets import Ticket
from synthia_vllm.gateway.request import Layer, Request


class FairQueue:
    """Holds a request until the scheduler says go, the client leaves, or it has waited too long.

    Its place in the engine is free when the engine is done, whether the client has read the reply or not. Raises
    Overloaded at once for what would wait longer than it may, and as soon as the queue is full for what is the newest
    of the user with most in it; QueueTimeout for what did wait that long. All are 503 with a `Retry-After`.
    """

    def __init__(
        self,
        engine: Layer,
        *,
        scheduler: Scheduler,
        max_wait: float = 60.0,
        max_requests: int = 2048,
        max_tokens: int = 4_000_000,
    ) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.max_wait = max_wait
        self.max_requests = max_requests
        self.max_tokens = max_tokens

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        allowed = min(self.max_wait, request.queue_timeout or self.max_wait)
        scheduler = self.scheduler
        if not request.keeps_its_place and (predicted := self._predicted(request)) > allowed:
            raise Overloaded(
                f"a wait of about {predicted:.0f} s is to be expected, more than the {allowed:g} s allowed",
                predicted - allowed,
            )
        turn = asyncio.get_running_loop().create_future()
        ticket = scheduler.ticket(
            request.account, request.prompt_tokens, request.max_generated, partial(_set_done, turn)
        )
        (scheduler.admit if request.keeps_its_place else scheduler.join)(ticket)
        failed = False
        try:
            if not ticket.running:
                await self._wait(ticket, turn, request, allowed)
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    if count := len(delta.ids):
                        scheduler.add_tokens(ticket, count)
                    yield delta
        except Exception:
            failed = True
            raise
        finally:
            self._release(ticket, request, learn=not failed)

    async def _wait(self, ticket: Ticket, turn: asyncio.Future[None], request: Request, allowed: float) -> None:
        scheduler = self.scheduler
        if not scheduler.make_place(ticket, self.max_requests, self.max_tokens):
            raise self._full(request)
        await asyncio.wait((turn,), timeout=allowed)
        if ticket.waiting:
            raise QueueTimeout(f"waited {allowed:g} s for a turn", self._predicted(request) - allowed)
        if not ticket.running:
            raise self._full(request)

    def _full(self, request: Request) -> Overloaded:
        tokens, queued = request.prompt_tokens + request.max_generated, self.scheduler.queued_tokens
        part = tokens / max(tokens, queued)  # of the queue: when so much of it has gone, there is a place
        return Overloaded("the queue is full, and no user has more in it", part * self._predicted(request))

    def _predicted(self, request: Request) -> float:
        return self.scheduler.predicted_wait(request.account, request.prompt_tokens, request.max_generated)

    def _release(self, ticket: Ticket, request: Request, *, learn: bool) -> None:
        if ticket.running:
            if unseen := request.usage.generated - ticket.generated:  # generated, and never taken
                self.scheduler.add_tokens(ticket, unseen)
            self.scheduler.finish(ticket, learn=learn)
        else:
            self.scheduler.leave(ticket)


def _set_done(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
