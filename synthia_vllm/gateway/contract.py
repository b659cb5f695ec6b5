"""The layer that makes every chat route speak the Synthia format and nothing but it.

What differs between OpenAI's, Anthropic's and vLLM's own routes is in `dialects`; here is what is common: read the
request once, hand it on changed, and pass the reply through the dialect's filter event by event.
"""

from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.call import Call, call_of
from synthia_vllm.gateway.dialects import DIALECTS, Exchange
from synthia_vllm.gateway.events import is_one_event, take_events
from synthia_vllm.gateway.intake import DEFAULT_MAX_BODY_BYTES, decode_object, read_body, replay, without_body_headers
from synthia_vllm.gateway.replies import header, send_error
from synthia_vllm.prompt import MarkerPolicy


class Contract:
    """Enforces the prompt contract on requests and replies. A pure ASGI layer, usable alone as vLLM's `--middleware`.

    Requests: messages are checked (an OpenAI-shaped 400 that names the field), presets, stop strings and sampling
    defaults are added. Replies: the text ends before the first stop string and has no outer white space, streamed or
    not. `/v1/completions` and the token routes only have their JSON checked; their bytes are passed on as they are.
    """

    def __init__(
        self, app: ASGIApp, *, role_markers: MarkerPolicy = "allow", max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    ) -> None:
        self.app = app
        self.role_markers = role_markers
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        call = call_of(scope)
        if call is not None:  # errors are answered, and the body is handed on, by the layers around
            return await self._converse(call, scope, lambda: receive, send)
        try:
            body = await read_body(scope, receive, self.max_body_bytes)
            if body is None:
                return None
            call = Call(id="", request_id="", route=scope["path"], body=body, request=decode_object(body))
            bare = without_body_headers(scope)
            return await self._converse(call, bare, lambda: replay(call.encode, receive), send)
        except RequestError as error:
            return await send_error(error, send)

    async def _converse(self, call: Call, scope: Scope, receive: Callable[[], Receive], send: Send) -> None:
        """Asks upstream; once more where only our own default for the reply's length made the request too long."""
        dialect = DIALECTS.get(call.route)
        assert call.request is not None
        if dialect is None:
            if call.request.pop("priority", None) is not None:  # it would jump vLLM's queue
                call.changed = True
            return await self.app(scope, receive(), send)
        exchange = dialect(call.request, role_markers=self.role_markers)
        call.changed = True
        reply = ContractReply(exchange, send, refusals_wait=exchange.defaulted_length)
        await self.app(scope, receive(), reply)
        if reply.refused:
            # A prompt that leaves less room than the default. Without a length, engines generate to the context's end.
            exchange.drop_length()
            await self.app(scope, receive(), ContractReply(exchange, send))
        return None


class ContractReply:
    """One reply on its way to the client: the `send` that upstream gets.

    With `refusals_wait` a 400 is not sent on but noted in `refused`, so that the caller can ask again.
    """

    def __init__(self, exchange: Exchange, send: Send, *, refusals_wait: bool = False) -> None:
        self.refused = False
        self._exchange = exchange
        self._send = send
        self._refusals_wait = refusals_wait
        self._start: Message | None = None  # of a whole JSON reply: its length is known at the end
        self._streaming = False
        self._buffer = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self.refused:
            return
        elif self._streaming:
            await self._stream(message)
        elif self._start is not None:
            await self._collect(message)
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        if message["status"] == 400 and self._refusals_wait:
            self.refused = True
        elif message["status"] != 200:
            await self._send(message)
        elif header(message, b"content-type").startswith(b"text/event-stream"):
            self._streaming = True
            await self._send(message)
        else:
            self._start = message

    async def _stream(self, message: Message) -> None:
        body = message.get("body", b"")
        more = message.get("more_body", False)
        if not self._buffer and is_one_event(body):
            out = self._exchange.event(body)
        else:
            self._buffer += body
            out = b"".join(map(self._exchange.event, take_events(self._buffer)))
        if not more:
            out += bytes(self._buffer)
        if out is body:
            await self._send(message)
        elif out or not more:
            await self._send({"type": "http.response.body", "body": out, "more_body": more})

    async def _collect(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None
        body = msgspec.json.encode(self._exchange.whole(msgspec.json.decode(self._buffer)))
        headers = [pair for pair in self._start["headers"] if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
