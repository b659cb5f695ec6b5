"""The outermost layer of ours behind the routes: who asks, and what came of it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.api.errors import ErrorForm, form_of
from synthia_vllm.errors import (
    Forbidden,
    NotFound,
    Overloaded,
    RequestAborted,
    RequestError,
    SynthiaError,
    Unauthorized,
)
from synthia_vllm.gateway.accounts import ANONYMOUS, Account
from synthia_vllm.gateway.apis import Apis
from synthia_vllm.gateway.delivery import ClientLeft
from synthia_vllm.gateway.edge.body import DEFAULT_MAX_BODY_BYTES, Bodies, read_body
from synthia_vllm.gateway.edge.replies import UNBOUNDED_SEND, header, request_ids, send_error, send_json
from synthia_vllm.gateway.edge.routes import ADMIN_PREFIX, METRICS, for_operators
from synthia_vllm.gateway.own_usage import USER, is_usage
from synthia_vllm.gateway.request import Exchange, Observer, Outcome

# Tells of all users: the operator's.
_LIVE = f"{ADMIN_PREFIX}live"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_WANTED_HEADERS = (
    b"authorization", b"x-api-key", b"x-request-id", b"x-queue-timeout-s", b"x-session-id",
    b"last-event-id", b"anthropic-version", *_TRACE_HEADERS,
)  # fmt: skip
_UNREADY_S = 5.0  # after which a probe that was answered 503 may ask again

_log = structlog.get_logger(__name__)

Lookup = Callable[[str], Awaitable[Account | None]]


class Access:
    """Knows the user by the key, reads the body, keeps the record of the exchange, and answers errors. An ASGI app.

    `observers` are told of every exchange, whatever became of it; `open` holds those under way. Without
    `keys_required`, a request without a known key is anonymous.
    """

    def __init__(
        self,
        apis: Apis | None,
        *,
        lookup: Lookup,
        keys_required: bool,
        observers: Sequence[Observer] = (),
        ready: Callable[[], Awaitable[bool]] | None = None,
        metrics: ASGIApp | None = None,
        admin: ASGIApp | None = None,
        usage: ASGIApp | None = None,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        body_timeout: float | None = None,
    ) -> None:
        self.apis = apis
        self.lookup = lookup
        self.keys_required = keys_required
        self.observers = observers
        self.ready = ready
        self.metrics = metrics
        self.admin = admin
        self.usage = usage
        self.max_body_bytes = max_body_bytes
        self.body_timeout = body_timeout
        self.open: dict[str, Exchange] = {}
        self.bodies = Bodies(max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value for name, value in reversed(scope["headers"]) if name in _WANTED_HEADERS}
        exchange = _new_exchange(scope, headers)
        reply = RecordedReply(exchange, send, form_of(exchange.route, headers))
        self.open[exchange.id] = exchange
        for observer in self.observers:
            observer.opened(exchange)
        broken = stopped = left = False
        try:
            broken = not await self._answer(exchange, headers, scope, receive, reply)
        except ClientLeft as leaving:
            left = True
            if leaving.connected:
                await reply.cut()
        except RequestError as error:
            exchange.reason = exchange.reason or error.reason
            await reply.refuse(error)
        except asyncio.CancelledError:
            stopped = True
            raise
        except Exception:
            broken = True
            exchange.reason = "internal"
            _log.exception("request_failed", request=exchange.id)
            await reply.refuse(SynthiaError())
        finally:
            del self.open[exchange.id]
            exchange.ended = perf_counter()
            exchange.outcome = "stopped" if stopped else "failed" if broken else _outcome(exchange, reply, left)
            for observer in self.observers:
                observer.ended(exchange)

    async def _answer(
        self, exchange: Exchange, headers: dict[bytes, bytes], scope: Scope, receive: Receive, reply: "RecordedReply"
    ) -> bool:
        """True where the whole reply went out."""
        route = exchange.route
        if route == "/health":
            await send_json(200, {}, reply)
            return True
        if route == "/ready":
            if self.ready is not None and not await self.ready():
                raise Overloaded("the engine generates nothing", _UNREADY_S)
            await send_json(200, {}, reply)
            return True
        account = await self._account(headers)
        exchange.account = account or ANONYMOUS
        self._check(route, account)
        if route.startswith(ADMIN_PREFIX) or is_usage(route):
            return await self._tell(exchange, scope, receive, reply)
        if route in METRICS:
            if self.metrics is None:
                raise NotFound(route)
            await self.metrics(scope, receive, reply)
            return True
        if self.apis is None:
            raise NotFound(route)
        unbounded = UNBOUNDED_SEND in scope.get("extensions", ())
        held = self.bodies.body(account.user if account is not None else None)
        try:
            if exchange.method == "POST":
                if b"last-event-id" not in headers:  # else what its predecessor holds may be in its way
                    await self.apis.look(exchange, _length(scope))
                exchange.body = await read_body(scope, receive, self.max_body_bytes, self.body_timeout, hold=held.add)
                if exchange.body is None:
                    raise ClientLeft
            return await self.apis.answer(
                exchange, headers, receive, reply, unbounded=unbounded, on_read=held.give_back
            )
        finally:
            held.give_back()

    async def _tell(self, exchange: Exchange, scope: Scope, receive: Receive, reply: "RecordedReply") -> bool:
        """What is in the database: of everyone for an admin, else of the user himself, as often as he may ask."""
        app = self.usage if is_usage(exchange.route) else self.admin
        if app is None:
            raise NotFound(exchange.route)
        if app is self.usage and self.apis is not None:
            await self.apis.look(exchange, None)
        body = await read_body(scope, receive, self.max_body_bytes, self.body_timeout)
        if body is None:
            raise ClientLeft
        pending = [body]

        async def replayed() -> Message:
            return {"type": "http.request", "body": pending.pop(), "more_body": False} if pending else await receive()

        await app({**scope, USER: exchange.account.user}, replayed, reply)
        return True

    def _check(self, route: str, account: Account | None) -> None:
        """Raises Unauthorized or Forbidden where this key does not open this route."""
        of_admin = route.startswith(ADMIN_PREFIX)
        # The live view tells what /metrics tells, and is as open as that.
        if not self.keys_required and (not of_admin or route == _LIVE):
            return
        if account is None:
            raise Unauthorized
        operators = for_operators(route)
        if operators and not account.admin:
            raise Forbidden("this needs an admin key: `synthia-vllm keys create --admin`")
        if account.admin and not operators:
            raise Forbidden("an admin key opens /admin, /metrics and /sd only; use a user's key")

    async def _account(self, headers: dict[bytes, bytes]) -> Account | None:
        """By `Authorization: Bearer` or `x-api-key`: either may be the right one."""
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        bearer = token.strip() if kind.lower() == b"bearer" else b""
        for given in dict.fromkeys((bearer, headers.get(b"x-api-key", b"").strip())):
            if given and (account := await self.lookup(given.decode("latin-1"))) is not None:
                return account
        return None


class RecordedReply:
    """The reply on its last step to the client: the request id goes in, the status and the end are noted."""

    def __init__(self, exchange: Exchange, send: Send, form: ErrorForm) -> None:
        self.started = False
        self.ended = False
        self._exchange = exchange
        self._send = send
        self._form = form

    def __call__(self, message: Message) -> Awaitable[None]:
        """Not a coroutine of its own: it is called for each token."""
        if message["type"] == "http.response.start":
            self.started = True
            self._exchange.status = message["status"]
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            headers.append((b"x-request-id", self._exchange.request_id.encode()))
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            self.ended = True
        return self._send(message)

    async def refuse(self, error: SynthiaError) -> None:
        """Answers with an error in the form of the API that was asked; nothing where a status is out already."""
        if not self.started:
            await send_error(error, self, form=self._form, request_id=self._exchange.request_id)

    async def cut(self) -> None:
        """Ends it where it is, for a client who has said that he wants no more, and may still be there."""
        if self.started:
            await self({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self.refuse(RequestAborted())


def _new_exchange(scope: Scope, headers: dict[bytes, bytes]) -> Exchange:
    unique, told = request_ids(headers.get(b"x-request-id", b""))
    return Exchange(
        id=unique,
        request_id=told,
        route=scope["path"],
        method=scope["method"],
        trace={key.decode(): headers[key].decode("latin-1") for key in _TRACE_HEADERS if key in headers},
    )


def _length(scope: Scope) -> int | None:
    """Of the body, as announced; None where that tells nothing, as of one that is coded."""
    told = b"" if header(scope, b"content-encoding") else header(scope, b"content-length")
    return int(told) if told.isdigit() else None


def _outcome(exchange: Exchange, reply: RecordedReply, left: bool) -> Outcome:
    if left or not reply.ended:
        return "cancelled"
    if exchange.status < 400:
        return "finished"
    return "rejected" if exchange.usage.dispatched is None or exchange.status < 500 else "failed"
