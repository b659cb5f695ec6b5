"""One request and its reply on an HTTP/1 connection: uvicorn's, with sending of our own."""

from itertools import chain
from typing import Any

from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

from synthia_vllm.api.errors import form_of
from synthia_vllm.errors import SynthiaError
from synthia_vllm.gateway.edge.replies import send_error

MAX_UNREAD_BYTES = 16 * 2**20  # of a stream; whoever is further behind does not read it


class Cycle(RequestResponseCycle):
    """Sends a reply as RFC 9112 frames it, without ever waiting for the client to read.

    Differs from uvicorn 0.54: a reply without a length is chunked for HTTP/1.1 only, and ends with the connection for
    HTTP/1.0; a reply that goes out before the request's body has come is the last one of its connection; an app's own
    Transfer-Encoding is not passed on; an error that nobody has answered has the form of the API that was asked. A
    stream of which the client leaves too much unread is cut.
    """

    sent = 0  # bytes, read by the client or not

    _chunked = False
    _remaining: int | None = None  # bytes of the body still to come, where its length is known
    _bodiless = False

    async def send(self, message: Any) -> None:
        if self.disconnected:
            return
        if not self.response_started:
            self._start(message)
        elif self.response_complete or message["type"] != "http.response.body":
            raise RuntimeError(f"{message['type']} is not what follows in this reply")
        else:
            self._continue(message.get("body", b""), message.get("more_body", False))

    async def send_500_response(self) -> None:
        form = form_of(self.scope["path"], dict(self.scope["headers"]))
        await send_error(SynthiaError(), self._send_and_close, form=form)

    async def _send_and_close(self, message: Any) -> None:
        self.keep_alive = False
        await self.send(message)

    def _start(self, message: Any) -> None:
        if message["type"] != "http.response.start":
            raise RuntimeError(f"a reply starts with http.response.start, not with {message['type']}")
        if self.more_body:
            # What comes next is the rest of the body, or, after an `Expect` that was not met, another request: only the
            # client knows which.
            self.keep_alive = False
        status = message["status"]
        lines = [STATUS_LINE[status]]
        length = None
        for given, value in chain(self.default_headers, message.get("headers", ())):
            name = given.lower()
            if HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
                raise RuntimeError(f"no header can have this name or value: {name!r}")
            if name == b"connection":
                if b"close" in [option.strip().lower() for option in value.split(b",")]:
                    self.keep_alive = False
                continue
            if name == b"transfer-encoding":
                continue
            if name == b"content-length":
                length = int(value)
            lines += (name, b": ", value, b"\r\n")
        self._bodiless = self.scope["method"] == "HEAD" or status in (204, 304)
        self._remaining = length
        if length is None and not self._bodiless:
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self.response_started = True
        self.waiting_for_100_continue = False
        self._write(b"".join(lines))

    def _continue(self, body: bytes, more: bool) -> None:
        if self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
            elif self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
                return self.transport.abort()
        elif self._bodiless:
            body = b""
        elif self._remaining is not None:
            self._remaining -= len(body)
            if self._remaining < 0 or (self._remaining and not more):
                raise RuntimeError("the reply's body is not as long as its Content-Length")
        if body:
            self._write(body)
        if not more:
            self.response_complete = True
            self.message_event.set()
            self.on_response()
        return None

    def _write(self, data: bytes) -> None:
        self.sent += len(data)
        self.transport.write(data)
