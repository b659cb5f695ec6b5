"""Connections of HTTP/1 clients (RFC 9112): what uvicorn's protocol leaves unbounded, or does otherwise.

Written for uvicorn 0.54 with httptools 0.9, which

- bound neither the time nor the size of headers and trailers, and add trailers to the headers;
- lose the body of a request that offers an `Upgrade`, and read it as the next request;
- keep a connection whose request body was not read;
- chunk replies to HTTP/1.0;
- tell of a lost connection only the newest of pipelined requests;
- let `send` wait for the client, and wait for ever for one that does not read.

llhttp itself refuses Transfer-Encoding beside Content-Length, two Content-Lengths, and folded or malformed headers.
"""

import asyncio
import fcntl
import sys
import termios
from typing import Any
from urllib.parse import unquote

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from synthia_vllm.api.errors import form_of
from synthia_vllm.errors import Overloaded, RequestError
from synthia_vllm.gateway.edge.connections import Connections
from synthia_vllm.gateway.edge.cycle import Cycle
from synthia_vllm.gateway.edge.replies import UNBOUNDED_SEND
from synthia_vllm.settings import TimeoutSettings

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 128
MAX_PIPELINED = 16  # requests that wait for a reply on one connection before no more is read from it

_WRITE_BUFFER_BYTES = 64 * 1024  # of finished replies, before the next request is begun
_UNBOUNDED = 2**31 - 1  # the most that uvloop takes
_LINGER_S = 2.0
_CODES = {
    400: "malformed_request",
    408: "request_timeout",
    431: "headers_too_large",
    501: "method_not_implemented",
    505: "http_version_not_supported",
}


def http_protocol(timeouts: TimeoutSettings, connections: Connections) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, to RFC 9112, whose clients are held to times and numbers."""
    bounds = {"headers_timeout": timeouts.headers, "write_timeout": timeouts.write, "places": connections}
    return type("HttpProtocol", (_HttpProtocol,), bounds)


class _HttpProtocol(HttpToolsProtocol):
    """One connection. Costs nothing while a reply streams.

    Ends those that trickle headers (408) or send too many (431), and those that take nothing of a reply. `cycle` is the
    request that is being read, `_running` the one that is being answered, `pipeline` holds those between.
    """

    headers_timeout: float
    write_timeout: float
    places: Connections

    def connection_made(self, transport: Any) -> None:
        self.url = b""
        self._running: RequestResponseCycle | None = None
        self._header_bytes = 0  # of the request that is being read, by what the parser has found
        self._unparsed = 0  # bytes since the last thing that it found
        self._trailers = False  # what headers come now are trailers
        self._upgrade_offered = False  # by the request that is being read
        self._refusal: RequestError | None = None  # what ends this connection, to be told after the replies under way
        self._ended = False  # the last reply has gone out
        self._deadline: asyncio.TimerHandle | None = None  # of headers, or of an end that lingers
        self._looking: asyncio.TimerHandle | None = None  # at whether the client reads
        self._taken: tuple[object, int] = (None, 0)  # by the client: bytes of which reply
        self._taken_at = 0.0  # loop time, since when it is that much
        super().connection_made(transport)
        refused = self.places.enter(self, self.client[0] if self.client else None)
        if refused is not None:
            return self._refuse(refused)
        return self._set_deadline(self.headers_timeout, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.places.gone(self)
        self._unwatch()
        self._stop_looking()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self._running is not None:
            _disconnect(self._running)
        super().connection_lost(exc)

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._ended or self._refusal is not None:
            return  # and thrown away
        self._unset_keepalive_if_required()
        if self._idle() and self._deadline is None:
            self.places.partial(self)
            self._set_deadline(self.headers_timeout, self._late)  # whatever comes must become a request in time
        self._unparsed += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or _refusal(400, f"this is not HTTP/1.1 ({error})"))
        else:
            if self._unparsed > MAX_HEADER_BYTES:
                self._refuse(_refusal(431, f"the headers are over {MAX_HEADER_BYTES} bytes"))

    def _parse(self, data: bytes) -> None:
        """Feeds the parser.

        It takes an offered `Upgrade` for accepted: that the body and all after it is of another protocol. We accept
        none, so such a request is parsed again as if it had not offered any (RFC 9110, 7.8).
        """
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                break
            except httptools.HttpParserUpgrade as found:
                rest = rest[found.args[0] :]
            head = self._head_without_upgrade()
            self._upgrade_offered = False
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += (b"%b: %b" % pair for pair in self.headers if pair[0] != b"upgrade")
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        self._trailers = False
        super().on_message_begin()
        self.scope["extensions"] = {UNBOUNDED_SEND: {}}

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._trailers:
            return  # none is known to be safe to merge (RFC 9110, 6.5.1)
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._stop(431, f"more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """Begins the request, or lets it wait for those before it. Takes the place of uvicorn's."""
        self._unparsed = 0
        method, version = self.parser.get_method().decode(), self.parser.get_http_version()
        self._check_head(method, version)
        if self.parser.should_upgrade():
            self._upgrade_offered = True
            return
        self._unwatch()
        self._trailers = True
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        self.scope["method"] = method
        self.scope["http_version"] = version
        self.scope["path"] = self.root_path + unquote(raw_path.decode("ascii"))
        self.scope["raw_path"] = self.root_path.encode() + raw_path
        self.scope["query_string"] = target.query or b""
        self.cycle = Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and version == "1.1",
            keep_alive=version == "1.1" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.pipeline.appendleft((self.cycle, self.app))
        if len(self.pipeline) > MAX_PIPELINED:
            self.flow.pause_reading()
        if not self.flow.write_paused and (self._running is None or self._running.response_complete):
            self._next()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        self.cycle.waiting_for_100_continue = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_offered:
            return  # the parser's idea of its end
        self._unparsed = 0
        self.url = b""
        self.cycle.waiting_for_100_continue = False
        super().on_message_complete()
        if self.cycle is self._running:
            self.places.busy(self)

    def _check_head(self, method: str, version: str) -> None:
        hosts = sum(name == b"host" for name, _ in self.headers)
        if version not in ("1.1", "1.0"):
            self._stop(505, "HTTP/1.1 is spoken here")
        if method == "CONNECT":
            self._stop(501, "this is no proxy")
        if hosts > 1 or (not hosts and version == "1.1"):  # RFC 9112, 3.2
            self._stop(400, "a request names its Host, once")

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._stop(431, f"the headers are over {MAX_HEADER_BYTES} bytes")

    def _stop(self, status: int, message: str) -> None:
        self._refusal = _refusal(status, message)
        raise ValueError(message)  # out of a parser's callback only an exception gets

    # Answering

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.more_body:
            self.places.partial(self)
        else:
            self.places.busy(self)
        if self._looking is None:
            self._look()
        self.transport.set_write_buffer_limits(high=_UNBOUNDED)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Goes on with the next request, or ends the connection. Takes the place of uvicorn's."""
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self._running is None:
            return
        if not self._running.keep_alive:
            self._end(linger=self._running.more_body)
            return
        # A client that asks again and again and never reads holds one reply, not all of them.
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        if not self.flow.write_paused:
            self._next()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing() and not self._ended and self._idle(pipelined=True):
            self._next()

    def _next(self) -> None:
        self._unset_keepalive_if_required()
        if len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._send_refusal(self._refusal)
        else:
            self.places.idle(self)
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _idle(self, *, pipelined: bool = False) -> bool:
        """No request is being answered, nor, unless those are meant too, waits for it."""
        return (self._running is None or self._running.response_complete) and (pipelined or not self.pipeline)

    # Ending

    def give_way(self) -> None:
        """Ends for others that need its place; see `Connections`."""
        if self._idle() and self._deadline is None:
            self._end(linger=False)
        else:
            self._refuse(Overloaded("all connections are taken, and this one had no whole request", 1.0))

    def _late(self) -> None:
        self._deadline = None
        if self._idle():
            self._refuse(_refusal(408, f"no whole request came within {self.headers_timeout:g} s"))

    def _refuse(self, error: RequestError) -> None:
        """Ends the connection because of what came last on it; what came before is answered first."""
        self._unwatch()
        if self.transport.is_closing():
            return
        self._refusal = error
        broken = self.cycle if self.cycle is not None and self.cycle.more_body else None
        if broken is not None and broken is self._running:
            _disconnect(broken)
            if broken.response_started:
                self.transport.close()
            else:
                self._send_refusal(error)
            return
        if broken is not None:
            self.pipeline.popleft()
        if self._idle():
            self._send_refusal(error)

    def _send_refusal(self, error: RequestError) -> None:
        path = self.url.partition(b"?")[0].decode("latin-1")
        body = msgspec.json.encode(form_of(path)(error, ""))
        headers = [
            *self.server_state.default_headers,
            *error.headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
        self._end(linger=True)

    def _end(self, *, linger: bool) -> None:
        """Closes the connection.

        One whose client may still be sending is closed for writing first: else what arrives is answered with a reset,
        and that takes the reply away from a client that has not read it yet (RFC 9112, 9.6).
        """
        self._ended = True
        self.places.leave(self)
        self._unwatch()
        self.pipeline.clear()
        if not linger or not self.transport.can_write_eof() or not self.places.may_linger(self):
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._set_deadline(_LINGER_S, self.transport.close)

    def _look(self) -> None:
        """Gives up a client that has taken nothing for too long of what there is of a reply, finished or not."""
        unread, now = self.transport.get_write_buffer_size(), self.loop.time()
        # The kernel takes more only when a megabyte has gone: what it still holds tells of a client that reads slowly.
        held = unread + (_held_by_kernel(self.transport) if unread else 0)
        taken = self._running, self._running.sent - held if isinstance(self._running, Cycle) else 0
        if not unread or taken != self._taken:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at >= self.write_timeout:
            self.transport.abort()
            return
        self._looking = self.loop.call_later(self.write_timeout / 4, self._look) if unread or not self._idle() else None

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def _set_deadline(self, seconds: float, then: Any) -> None:
        self._deadline = self.loop.call_later(seconds, then)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _held_by_kernel(transport: Any) -> int:
    """Bytes that were written and that the other side has not acknowledged."""
    try:
        found = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(found, sys.byteorder)


def _refusal(status: int, message: str) -> RequestError:
    error = RequestError(message, param="headers")
    error.status, error.code = status, _CODES[status]
    return error


def _disconnect(cycle: RequestResponseCycle) -> None:
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
