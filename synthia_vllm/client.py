"""Connections that outlive a gateway, for OpenAI's and Anthropic's Python clients and all else on httpx2.

client = OpenAI(base_url=…, http_client=httpx2.Client(transport=Resuming()))
client = AsyncOpenAI(base_url=…, http_client=httpx2.AsyncClient(transport=AsyncResuming()))

A reply whose connection breaks goes on over another one, at whichever gateway answers, where the gateways keep replies
(`--limits.redis`); nothing of it is repeated, lost, or billed twice. Needs httpx2 alone, on which both are built.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from uuid import uuid4

import httpx2

# Whatever is there of the reply, from its first event on; all of it anew where nothing is.
FROM_THE_START = "*"
_AGAIN = frozenset((429, 502, 503, 504))  # a gateway that starts or drains, or a proxy that has none
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.05, 2.0
_BROKEN = (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ConnectTimeout)


class RestRefused(httpx2.TransportError):
    """The gateways have nothing more of a reply that has begun."""


@dataclass
class _Reply:
    """What one request has got so far, and how long it has tried since it last got something."""

    request: httpx2.Request
    body: bytes
    patience_s: float
    last_id: str = ""  # of the last event; empty: none has come, or there is no going on from there
    begun: bool = False  # its client has a status
    got: bool = False  # and an event
    rest: bytes = b""  # of an event that is not whole
    tries: int = 0
    since: float = field(default_factory=time.monotonic)

    def asked(self) -> httpx2.Request:
        """The request, or the one for its rest."""
        request = self.request
        headers = request.headers.copy()
        if self.tries:
            headers["Last-Event-ID"] = self.last_id or FROM_THE_START
        return httpx2.Request(
            request.method, request.url, headers=headers, content=self.body, extensions=request.extensions
        )

    def events(self, data: bytes) -> bytes:
        """The whole events among what has come."""
        whole, gap, self.rest = (self.rest + data).rpartition(b"\n\n")
        if not gap:
            return b""
        at = whole.rfind(b"id: ") if whole.startswith(b"id: ") else whole.rfind(b"\nid: ") + 1
        if at > 0 or whole.startswith(b"id: "):
            self.last_id = whole[at + 4 :].partition(b"\n")[0].strip().decode()
        self.got = self.got or b"data:" in whole
        self.tries, self.since = 0, time.monotonic()
        return whole + gap

    def expect_end(self) -> None:
        """Raises RemoteProtocolError where events may still come: some proxies end what broke behind them.

        Ids of a stream's last events have a `!`.
        """
        if self.last_id and "!" not in self.last_id:
            raise httpx2.RemoteProtocolError("the stream ended before its last event", request=self.request)

    def pause(self, error: Exception, told: float = 0.0) -> float:
        """Seconds until the next try. Raises the error where there is none.

        That is: nothing was asked yet, the events told no way back, or patience is over.
        """
        refused = not self.tries and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        self.tries += 1
        self.rest = b""
        if refused or (self.got and not self.last_id) or time.monotonic() - self.since > self.patience_s:
            raise error
        grown: float = min(_MOST_PAUSE_S, _LEAST_PAUSE_S * 2 ** min(self.tries - 1, 8))
        return max(told, grown * random.uniform(0.5, 1.0))

    def look(self, response: httpx2.Response) -> float | None:
        """Seconds until it is asked again; None where this answer is the one. Raises where the rest is refused."""
        if not self.tries or response.status_code < 400:
            return None
        error = RestRefused(f"the rest of a reply was refused with {response.status_code}", request=self.request)
        if response.status_code not in _AGAIN:
            if not self.begun:
                return None
            raise error
        after = response.headers.get("retry-after", "")
        return self.pause(error, float(after) if after.isdigit() else 0.0)


def _reply(request: httpx2.Request, body: bytes, patience_s: float) -> _Reply:
    request.headers.setdefault("X-Request-Id", uuid4().hex)
    return _Reply(request, body, patience_s)


def _resumable(request: httpx2.Request) -> bool:
    return request.method == "POST"


def _streamed(response: httpx2.Response) -> bool:
    kind: str = response.headers.get("content-type", "")
    return kind.startswith("text/event-stream")


class Resuming(httpx2.BaseTransport):
    """A transport that goes on where a connection broke, for `patience_s` seconds without another event at most.

    `transport`: what sends (default: httpx's own). Raises httpx's errors where the gateways don't come back in time, or
    don't keep replies.
    """

    def __init__(self, transport: httpx2.BaseTransport | None = None, *, patience_s: float = 60.0) -> None:
        self._transport = transport or httpx2.HTTPTransport()
        self._patience_s = patience_s

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        body = request.read()
        if not _resumable(request):
            return self._transport.handle_request(request)
        reply = _reply(request, body, self._patience_s)
        response = self._ask(reply)
        reply.begun = _streamed(response)
        if reply.begun:
            stream = _Stream(self, reply, response)
            return httpx2.Response(
                response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
            )
        while True:
            try:
                response.read()
            except _BROKEN as error:
                response.close()
                time.sleep(reply.pause(error))
                response = self._ask(reply)
            else:
                return response

    def close(self) -> None:
        self._transport.close()

    def _ask(self, reply: _Reply) -> httpx2.Response:
        while True:
            try:
                response = self._transport.handle_request(reply.asked())
                pause = reply.look(response)
            except _BROKEN as error:
                pause = reply.pause(error)
            else:
                if pause is None:
                    return response
                response.close()
            time.sleep(pause)


class _Stream(httpx2.SyncByteStream):
    def __init__(self, transport: Resuming, reply: _Reply, response: httpx2.Response) -> None:
        self._transport, self._reply, self._response = transport, reply, response

    def __iter__(self) -> Iterator[bytes]:
        reply = self._reply
        while True:
            try:
                assert isinstance(self._response.stream, httpx2.SyncByteStream)
                for data in self._response.stream:
                    if events := reply.events(data):
                        yield events
                reply.expect_end()
            except _BROKEN as error:
                self._response.close()
                time.sleep(reply.pause(error))
                self._response = self._transport._ask(reply)
            else:
                return

    def close(self) -> None:
        self._response.close()


class AsyncResuming(httpx2.AsyncBaseTransport):
    """`Resuming` for asyncio."""

    def __init__(self, transport: httpx2.AsyncBaseTransport | None = None, *, patience_s: float = 60.0) -> None:
        self._transport = transport or httpx2.AsyncHTTPTransport()
        self._patience_s = patience_s

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        if not _resumable(request):
            return await self._transport.handle_async_request(request)
        reply = _reply(request, body, self._patience_s)
        response = await self._ask(reply)
        reply.begun = _streamed(response)
        if reply.begun:
            stream = _AsyncStream(self, reply, response)
            return httpx2.Response(
                response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
            )
        while True:
            try:
                await response.aread()
            except _BROKEN as error:
                await response.aclose()
                await asyncio.sleep(reply.pause(error))
                response = await self._ask(reply)
            else:
                return response

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _ask(self, reply: _Reply) -> httpx2.Response:
        while True:
            try:
                response = await self._transport.handle_async_request(reply.asked())
                pause = reply.look(response)
            except _BROKEN as error:
                pause = reply.pause(error)
            else:
                if pause is None:
                    return response
                await response.aclose()
            await asyncio.sleep(pause)


class _AsyncStream(httpx2.AsyncByteStream):
    def __init__(self, transport: AsyncResuming, reply: _Reply, response: httpx2.Response) -> None:
        self._transport, self._reply, self._response = transport, reply, response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reply = self._reply
        while True:
            try:
                assert isinstance(self._response.stream, httpx2.AsyncByteStream)
                async for data in self._response.stream:
                    if events := reply.events(data):
                        yield events
                reply.expect_end()
            except _BROKEN as error:
                await self._response.aclose()
                await asyncio.sleep(reply.pause(error))
                self._response = await self._transport._ask(reply)
            else:
                return

    async def aclose(self) -> None:
        await self._response.aclose()
