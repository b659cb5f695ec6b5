"""The edge to the network: what uvicorn's HTTP protocol leaves unbounded before a request is known.

Checked on uvicorn 0.54 with httptools 0.9: it bounds neither the time nor the size of headers. llhttp itself refuses
Transfer-Encoding beside Content-Length, two Content-Lengths, and folded or malformed header lines.
"""

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 128
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def limited_protocol(headers_timeout: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol whose requests must have their headers complete within so many seconds."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"headers_timeout": headers_timeout})


class _LimitedProtocol(HttpToolsProtocol):
    """Ends connections that trickle headers (408), or send too many (431). Costs nothing while a reply streams."""

    headers_timeout: float

    def connection_made(self, transport: Any) -> None:
        self._header_bytes = 0  # of the request that is being read, by what the parser has found
        self._unparsed = 0  # bytes since the last thing that it found
        self._refusal: tuple[int, str] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._idle():
            # Whatever comes now must become a request in time: blank lines and the rest of a body that was answered
            # before its end are none, and uvicorn has just stopped its own clock.
            if self._deadline is None:
                self._watch()
            self._unparsed += len(data)
            if self._unparsed > MAX_HEADER_BYTES and b"\r\n\r\n" not in data:
                return self._refuse(431, f"the headers are over {MAX_HEADER_BYTES} bytes")
        super().data_received(data)
        return None

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._stop(431, f"more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._unwatch()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the parser, or one of the callbacks above, has raised."""
        self._refuse(*(self._refusal or (400, msg)))

    def _idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._stop(431, f"the headers are over {MAX_HEADER_BYTES} bytes")

    def _stop(self, status: int, message: str) -> None:
        self._refusal = status, message
        raise ValueError(message)  # out of a parser's callback only an exception gets

    def _watch(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self.headers_timeout, self._late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._idle():
            self._refuse(408, f"no whole request came within {self.headers_timeout:g} s")

    def _refuse(self, status: int, message: str) -> None:
        self._unwatch()
        if self.transport is None or self.transport.is_closing():
            return
        if self._idle():
            error = {"message": message, "type": "invalid_request_error", "param": "headers", "code": status}
            body = msgspec.json.encode({"error": error})
            head = (
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (status, _REASONS[status], len(body)) + body)
        self.transport.close()
