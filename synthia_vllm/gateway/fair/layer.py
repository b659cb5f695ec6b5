"""The layer in which requests wait for their turn."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import Overloaded, QueueTimeout
from synthia_vllm.gateway.fair.scheduler import Scheduler, Ticket
from synthia_vllm.gateway.request import Layer, Request


class FairQueue:
    """Holds a request until the scheduler says go, the client leaves, or it has waited too long.

    Its place in the engine is free when the engine is done, whether the client has read the reply or not. Raises
    Overloaded at once for what would wait longer than it may, or has no place in the queue, and QueueTimeout for what
    did wait that long; both are 503 with a `Retry-After`.
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
        self._check(request, allowed)
        scheduler = self.scheduler
        turn = asyncio.get_running_loop().create_future()
        ticket = scheduler.ticket(
            request.account, request.prompt_tokens, request.max_generated, partial(_set_done, turn)
        )
        scheduler.join(ticket)
        try:
            if not ticket.running:
                await self._wait(turn, allowed)
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    if count := len(delta.ids):
                        scheduler.add_tokens(ticket, count)
                    yield delta
        finally:
            self._release(ticket, request)

    def _check(self, request: Request, allowed: float) -> None:
        scheduler = self.scheduler
        tokens = request.prompt_tokens + request.max_generated
        if scheduler.queued_requests >= self.max_requests or (
            scheduler.queued_requests and scheduler.queued_tokens + tokens > self.max_tokens
        ):
            raise Overloaded("the queue is full", scheduler.seconds_for(tokens))
        predicted = scheduler.predicted_wait(request.account)
        if predicted > allowed:
            raise Overloaded(
                f"a wait of about {predicted:.0f} s is to be expected, more than the {allowed:g} s allowed",
                predicted - allowed,
            )

    async def _wait(self, turn: asyncio.Future[None], allowed: float) -> None:
        await asyncio.wait((turn,), timeout=allowed)
        if not turn.done():
            raise QueueTimeout(f"waited {allowed:g} s for a turn", self.scheduler.seconds_for(1))

    def _release(self, ticket: Ticket, request: Request) -> None:
        if ticket.running:
            if unseen := request.usage.generated - ticket.generated:  # generated, and never taken
                self.scheduler.add_tokens(ticket, unseen)
            self.scheduler.finish(ticket, whole=request.usage.completed)
        else:
            self.scheduler.leave(ticket)


def _set_done(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
