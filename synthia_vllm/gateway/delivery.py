"""Brings a reply to its client: a task reads the engine and makes bytes, which are sent apart from it.

A client that does not read holds memory, bounded by its own reply, and no place in the engine.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from time import perf_counter

import structlog
from starlette.types import Receive, Send

from synthia_vllm.api.base import Counts
from synthia_vllm.errors import RequestError, SynthiaError
from synthia_vllm.gateway.request import Exchange, Layer, Observer, Request

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
# Replies of more tokens end in a thread: what several APIs put at the end (the whole text, all log-probabilities) may
# take longer than others should wait for.
_LONG_REPLY = 512
_LONG_DELTA = 256  # tokens with log-probabilities that come together

_log = structlog.get_logger(__name__)


class ClientLeft(Exception):
    """The client does not want the rest of a reply: it has closed its connection, or said so (`connected`)."""

    def __init__(self, *, connected: bool = False) -> None:
        super().__init__()
        self.connected = connected


class Delivery:
    """One reply on its way from the engine to the client.

    A stream's status goes out with its first bytes: what is refused before has a status of its own. `failed` tells that
    an error ended a stream whose status was out.

    `unbounded`: the server's `send` never waits. Then the event loop sends, at the end of each of its turns, what that
    turn has made, and no task has to wake for it: a twentieth of what a streamed token costs.
    """

    def __init__(
        self,
        exchange: Exchange,
        request: Request,
        layer: Layer,
        observers: Sequence[Observer],
        *,
        unbounded: bool = False,
    ) -> None:
        self.failed = False
        self._exchange = exchange
        self._request = request
        self._layer = layer
        self._observers = observers
        self._reply = request.prepared.reply
        self._chunks: list[bytes] = []  # made, not sent
        self._new_chunks = 0  # of them, those that bring tokens
        self._new_tokens = 0
        self._started = False  # a status went out
        self._nap: asyncio.Future[None] | None = None  # of the writer, while it has nothing to do
        self._unbounded = unbounded and request.prepared.streamed
        self._due = False  # the loop will send when this turn is over
        self._aborted: asyncio.Future[None] | None = None  # done when the engine has let go
        self._loop = asyncio.get_running_loop()
        self._send: Send
        self._reader: asyncio.Task[None]

    async def run(self, receive: Receive, send: Send) -> None:
        """Raises what refused the request, as long as no status is out, and ClientLeft."""
        streamed = self._request.prepared.streamed
        self._send = send
        reader = self._reader = asyncio.create_task(self._read())
        gone = asyncio.create_task(_left(receive))
        for task in (reader, gone):
            task.add_done_callback(lambda _: self._wake())
        try:
            while not reader.done() and not gone.done() and self._aborted is None:
                if streamed and self._chunks and not self._unbounded:
                    await self._flush()
                else:
                    # A bare future: waiting on asyncio's Event was a tenth of what a streamed token cost here.
                    self._nap = self._loop.create_future()
                    await self._nap
            if not reader.done():
                raise ClientLeft(connected=not gone.done())
            self._raise_or_tell(reader)
            if gone.done():
                raise ClientLeft
            await self._end()
        finally:
            gone.cancel()
            if not reader.done():  # else what follows, the count of it, comes before anything that the client asks next
                reader.cancel()
                await asyncio.gather(reader, gone, return_exceptions=True)
            if self._aborted is not None:
                self._aborted.set_result(None)

    async def abort(self) -> int:
        """Ends it as if the client had left. When the engine has let go of it, tells the tokens that it generated."""
        self.leave()
        if self._aborted is not None:
            await asyncio.shield(self._aborted)
        return self._request.usage.generated

    def leave(self) -> None:
        """Ends it without waiting: another connection has its rest."""
        if self._aborted is None and not self._reader.done():
            self._aborted = self._loop.create_future()
            self._wake()

    async def _read(self) -> None:
        """Takes the engine's deltas as fast as they come, and makes bytes of them."""
        prepared, usage, reply = self._request.prepared, self._request.usage, self._reply
        counts = Counts(usage.prompt, usage.cached, 0)
        begun = long = False
        async with aclosing(self._layer.generate(self._request)) as deltas:
            async for delta in deltas:
                if delta.note:
                    if prepared.streamed:
                        self._put(b": %b\n\n" % delta.note.encode().replace(b"\n", b" "))
                    continue
                counts.generated = usage.generated
                if not begun:
                    begun = True
                    counts.prompt, counts.cached = usage.prompt, usage.cached
                    self._put(reply.start(counts))
                if not delta.again:  # else another gateway has counted them
                    self._new_tokens += len(delta.ids)
                if delta.prompt_logprobs is not None or len(delta.logprobs or ()) > _LONG_DELTA:
                    long = True
                    chunk = await asyncio.to_thread(reply.feed, delta, counts)
                else:
                    chunk = reply.feed(delta, counts)
                if chunk:
                    self._new_chunks += 1
                    self._put(chunk)
        counts.prompt, counts.cached, counts.generated = usage.prompt, usage.cached, usage.generated
        if not begun:
            self._put(reply.start(counts))
        if long or usage.generated > _LONG_REPLY:
            last = await asyncio.to_thread(reply.end, counts)
        else:
            last = reply.end(counts)
        self._chunks += [last] if isinstance(last, bytes) else last

    def _put(self, chunk: bytes) -> None:
        if not chunk:
            return
        self._chunks.append(chunk)
        if not self._unbounded:
            self._wake()
        elif not self._due:
            self._due = True
            self._loop.call_soon(self._flush_at_once)

    def _wake(self) -> None:
        if self._nap is not None and not self._nap.done():
            self._nap.set_result(None)

    def _raise_or_tell(self, reader: "asyncio.Task[None]") -> None:
        """Raises what ended the reader; where the status is out already, tells it in the stream instead."""
        error = reader.exception()
        if error is None:
            return
        if not self._started:
            raise error
        self.failed = True
        if isinstance(error, RequestError):
            self._exchange.reason = self._exchange.reason or error.reason
        else:
            _log.error("request_failed", request=self._exchange.id, exc_info=error)
            self._exchange.reason = "internal"
        self._chunks.append(self._reply.error(error if isinstance(error, SynthiaError) else SynthiaError()))

    def _flush_at_once(self) -> None:
        self._due = False
        if self._reader.done():
            return  # what it made last goes out with the end
        try:
            self._flush().send(None)
        except StopIteration:
            return
        except Exception as error:
            failed = error
        else:
            failed = RuntimeError("the server's `send` waits, although it said that it never does")
        if self._nap is not None and not self._nap.done():
            self._nap.set_exception(failed)

    async def _flush(self, *, last: bool = False) -> None:
        send = self._send
        chunks, tokens = self._new_chunks, self._new_tokens
        body = b"".join(self._chunks) if len(self._chunks) > 1 else self._chunks[0]
        self._chunks.clear()
        self._new_chunks = 0
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": not last})
        if chunks and tokens:
            self._new_tokens -= tokens
            if self._exchange.first_sent is None:
                self._exchange.first_sent = perf_counter()
            for observer in self._observers:
                observer.sent(self._exchange, chunks, tokens)

    async def _end(self) -> None:
        send = self._send
        if self._request.prepared.streamed:
            await self._flush(last=True)
            return
        *pieces, last = self._chunks
        length = len(last) + sum(map(len, pieces))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": last})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
