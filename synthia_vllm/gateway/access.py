"""The outermost layer of ours behind the routes: who asks, what, and what came of it."""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.errors import Forbidden, NotFound, RequestError, Unauthorized
from synthia_vllm.gateway.accounts import ANONYMOUS, Account
from synthia_vllm.gateway.call import Call, Outcome, attach
from synthia_vllm.gateway.delivery import Delivery, Metering
from synthia_vllm.gateway.demand import Demand
from synthia_vllm.gateway.intake import DEFAULT_MAX_BODY_BYTES, decode_object, read_body, replay
from synthia_vllm.gateway.replies import header, send_error
from synthia_vllm.gateway.routes import ADMIN_PREFIX
from synthia_vllm.gateway.tracing import TRACE_HEADERS, Tracing

# Told without a key: probes have none.
_PUBLIC = ("/health", "/ready")
# Tells of all users: the operator's.
_OPERATORS = ("/metrics", "/sd")
_LIVE = f"{ADMIN_PREFIX}live"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_WANTED_HEADERS = (b"authorization", b"x-api-key", b"x-request-id", b"x-queue-timeout-s", *TRACE_HEADERS)

Lookup = Callable[[str], Awaitable[Account | None]]


class Access:
    """Knows the user by the key, reads the body, and keeps the record of the call. A pure ASGI layer.

    Errors that the layers below raise (RequestError) are answered here, once. `on_end` is told of every call, whatever
    became of it; `open` holds those under way. Without `keys_required`, a request without a known key is anonymous.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        lookup: Lookup,
        keys_required: bool,
        on_end: Callable[[Call], None],
        demand: Demand | None = None,
        metering: Metering | None = None,
        tracing: Tracing | None = None,
        admin: ASGIApp | None = None,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        body_timeout: float | None = None,
    ) -> None:
        self.app = app
        self.lookup = lookup
        self.keys_required = keys_required
        self.on_end = on_end
        self.demand = demand or Demand()
        self.metering = metering
        self.tracing = tracing
        self.admin = admin
        self.max_body_bytes = max_body_bytes
        self.body_timeout = body_timeout
        self.open: dict[str, Call] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value for name, value in reversed(scope["headers"]) if name in _WANTED_HEADERS}
        call = _new_call(scope["path"], headers.get(b"x-request-id", b""))
        if self.metering is not None:
            self.metering.open(call)
        if self.tracing is not None:
            self.tracing.open(call, scope["method"], headers)
        reply = RecordedReply(call, send)
        self.open[call.id] = call
        failed = stopped = False
        try:
            await self._answer(call, headers, scope, receive, reply)
        except RequestError as error:
            call.reason = call.reason or error.reason
            if reply.started:
                failed = True
                raise
            await send_error(error, reply)
        except Exception:
            failed = True
            raise
        except asyncio.CancelledError:
            stopped = True
            raise
        finally:
            del self.open[call.id]
            call.ended = perf_counter()
            call.outcome = "stopped" if stopped else "failed" if failed else _outcome(call, reply)
            self.on_end(call)

    async def _answer(
        self, call: Call, headers: dict[bytes, bytes], scope: Scope, receive: Receive, reply: "RecordedReply"
    ) -> None:
        if call.route in _PUBLIC:
            return await self.app(scope, receive, reply)
        account = await self._account(headers)
        call.account = account or ANONYMOUS
        if call.route.startswith(ADMIN_PREFIX):
            if self.keys_required or call.route != _LIVE:  # which tells what /metrics tells, and is as open as that
                if account is None:
                    raise Unauthorized
                if not account.admin:
                    raise Forbidden("this needs an admin key: `synthia-vllm keys create --admin`")
            if self.admin is None:
                raise NotFound(call.route)
            body = await read_body(scope, receive, self.max_body_bytes, self.body_timeout)
            return None if body is None else await self.admin(scope, replay(lambda: body, receive), reply)
        if self.keys_required:
            if account is None:
                raise Unauthorized
            if account.admin != (call.route in _OPERATORS):
                raise Forbidden(
                    "an admin key opens /admin, /metrics and /sd only; use a user's key"
                    if account.admin
                    else "this needs an admin key: `synthia-vllm keys create --admin`"
                )
        if scope["method"] != "POST":
            return await self.app(scope, receive, reply)
        call.body = await read_body(scope, receive, self.max_body_bytes, self.body_timeout)
        if call.body is None:
            return None
        call.request = decode_object(call.body)
        _check_model(call)
        call.queue_timeout = _seconds(headers.get(b"x-queue-timeout-s"))
        await self.demand.measure(call)
        attach(scope, call)
        return await self.app(with_request_id(scope, call), receive, reply)

    async def _account(self, headers: dict[bytes, bytes]) -> Account | None:
        given = headers.get(b"x-api-key", b"")
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and token:
            given = token.strip()
        return await self.lookup(given.decode("latin-1")) if given else None


class RecordedReply:
    """The reply on its last step to the client: the request id goes in, the status and the end are noted."""

    def __init__(self, call: Call, send: Send) -> None:
        self.started = False
        self.ended = False
        self._call = call
        self._send = send
        self._delivery: Delivery | None = None  # of a stream

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._call.status = message["status"]
            if header(message, b"content-type").startswith(b"text/event-stream"):
                self._delivery = self._call.delivery
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            headers.append((b"x-request-id", self._call.request_id.encode()))
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            self.ended = True
        await self._send(message)
        if self._delivery is not None:
            self._delivery.sent(message.get("body", b""))


def with_request_id(scope: Scope, call: Call) -> Scope:
    """The scope for upstream: our unique id, so that one user can't name another's request, and no keys.

    The client's trace goes on as it is, or with our span in it.
    """
    traced = TRACE_HEADERS if call.trace is not None else ()
    hidden = (b"x-request-id", b"authorization", b"x-api-key", b"cookie", *traced)
    headers = [pair for pair in scope["headers"] if pair[0] not in hidden]
    spans = call.trace.headers() if call.trace is not None else []
    return {**scope, "headers": [*headers, (b"x-request-id", call.id.encode()), *spans]}


def _new_call(route: str, given: bytes) -> Call:
    unique = secrets.token_hex(8)
    if _REQUEST_ID.fullmatch(given):
        name = given.decode()
        return Call(id=f"{name}-{unique}", request_id=name, route=route)
    return Call(id=unique, request_id=unique, route=route)


def _check_model(call: Call) -> None:
    assert call.request is not None
    model = call.request.get("model")
    call.model = model if isinstance(model, str) else ""
    models = call.account.models
    if models is not None and call.model not in models:
        raise Forbidden(f"your key is for {', '.join(sorted(models))}, not for {call.model!r}", param="model")


def _seconds(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise RequestError("X-Queue-Timeout-S is a number of seconds over 0", param="X-Queue-Timeout-S")
    return seconds


def _outcome(call: Call, reply: RecordedReply) -> Outcome:
    if not reply.ended:
        return "cancelled"  # or upstream broke off, which has set a reason
    if call.status < 400:
        return "finished"
    return "rejected" if call.dispatched is None or call.status < 500 else "failed"
