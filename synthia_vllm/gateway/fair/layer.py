"""The layer in which requests wait for their turn."""

import asyncio
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.errors import Overloaded, QueueTimeout
from synthia_vllm.gateway.call import Call, call_of
from synthia_vllm.gateway.fair.scheduler import Scheduler, Ticket


class FairQueue:
    """Holds a request until the scheduler says go, the client leaves, or it has waited too long. A pure ASGI layer.

    Raises Overloaded at once for what would wait longer than it may, or has no place in the queue, and QueueTimeout
    for what did wait that long; both are 503 with a `Retry-After`. Calls that generate nothing pass.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        scheduler: Scheduler,
        max_wait: float = 60.0,
        max_requests: int = 2048,
        max_tokens: int = 4_000_000,
    ) -> None:
        self.app = app
        self.scheduler = scheduler
        self.max_wait = max_wait
        self.max_requests = max_requests
        self.max_tokens = max_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope)
        if call is None or call.max_generated == 0:
            return await self.app(scope, receive, send)
        allowed = min(self.max_wait, call.queue_timeout or self.max_wait)
        self._check(call, allowed)
        turn = asyncio.get_running_loop().create_future()
        ticket = self.scheduler.ticket(call.account, call.prompt_tokens, call.max_generated, partial(_set_done, turn))
        self.scheduler.join(ticket)
        try:
            if not ticket.running and not await self._wait(turn, receive, allowed):
                call.outcome = "cancelled"
                return None
            call.on_tokens = partial(self.scheduler.add_tokens, ticket)
            await self.app(scope, receive, send)
            return None
        finally:
            self._release(ticket, call)

    def _check(self, call: Call, allowed: float) -> None:
        scheduler = self.scheduler
        tokens = call.prompt_tokens + call.max_generated
        if scheduler.queued_requests >= self.max_requests or (
            scheduler.queued_requests and scheduler.queued_tokens + tokens > self.max_tokens
        ):
            raise Overloaded("the queue is full", scheduler.seconds_for(tokens))
        predicted = scheduler.predicted_wait(call.account)
        if predicted > allowed:
            raise Overloaded(
                f"a wait of about {predicted:.0f} s is to be expected, more than the {allowed:g} s allowed",
                predicted - allowed,
            )

    async def _wait(self, turn: asyncio.Future[None], receive: Receive, allowed: float) -> bool:
        """True when it is the request's turn, False when its client has left."""
        gone = asyncio.ensure_future(_left(receive))
        try:
            done, _ = await asyncio.wait((turn, gone), timeout=allowed, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if turn.done():
            return True
        if not done:
            raise QueueTimeout(f"waited {allowed:g} s for a turn", self.scheduler.seconds_for(1))
        return False

    def _release(self, ticket: Ticket, call: Call) -> None:
        if ticket.running:
            self.scheduler.finish(ticket, whole=call.completed)
        else:
            self.scheduler.leave(ticket)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _set_done(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
