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
        self._header_bytes = 0
        self._reading_headers = True
        self._deadline: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading_headers:
            self._header_bytes += len(data)
            # A first packet may hold a small body as well; only headers that go on and on come past this.
            if self._header_bytes > MAX_HEADER_BYTES and self._endless(data):
                return self._refuse(431, f"the headers are over {MAX_HEADER_BYTES} bytes")
        super().data_received(data)
        return None

    def on_message_begin(self) -> None:
        self._reading_headers = True
        if self._deadline is None:
            self._watch()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            # Out of a parser's callback only an exception gets: uvicorn answers 400 and closes.
            raise ValueError(f"more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._reading_headers = False
        self._header_bytes = 0
        self._unwatch()
        super().on_headers_complete()

    def _endless(self, data: bytes) -> bool:
        return b"\r\n\r\n" not in data or self._header_bytes - len(data) > MAX_HEADER_BYTES

    def _watch(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self.headers_timeout, self._late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        self._refuse(408, f"no whole request came within {self.headers_timeout:g} s")

    def _refuse(self, status: int, message: str) -> None:
        self._unwatch()
        if self.transport is None or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            error = {"message": message, "type": "invalid_request_error", "param": "headers", "code": status}
            body = msgspec.json.encode({"error": error})
            head = (
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (status, _REASONS[status], len(body)) + body)
        self.transport.close()
