"""Reading a request's body: within its bound and its time, and out of its content coding (RFC 9110, 8.4)."""

import asyncio
import zlib

from starlette.types import Receive, Scope

from synthia_vllm.errors import BodyTimeout, BodyTooLarge, MalformedBody, UnsupportedMedia
from synthia_vllm.gateway.edge.replies import header

DEFAULT_MAX_BODY_BYTES = 4 * 2**20
ACCEPTED = b"gzip, deflate"
MIN_BYTES_PER_S = 500  # of a body, or its `idle` seconds run out: else a byte now and then keeps it for ever
_MAX_MEMBERS = 16  # of a gzip body: each costs a decoder and a copy of what follows it
_GZIP, _ZLIB, _RAW = zlib.MAX_WBITS + 16, zlib.MAX_WBITS, -zlib.MAX_WBITS


async def read_body(scope: Scope, receive: Receive, limit: int, idle: float | None = None) -> bytes | None:
    """The whole body, decoded; None where the client has left.

    Raises BodyTooLarge over `limit` bytes, sent or decoded, unread if announced; BodyTimeout after `idle` seconds
    without a byte, or where it trickles; UnsupportedMedia, unread, for a coding that is not read here; MalformedBody
    for one that is broken.
    """
    coding = _coding(scope)
    announced = header(scope, b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(limit)
    body = await _read(receive, limit, idle)
    if not body or not coding:
        return body
    # In a thread whatever the size: a thousand bytes may become a million.
    return await asyncio.to_thread(inflate, body, coding, limit)


def inflate(data: bytes, coding: str, limit: int) -> bytes:
    """A body out of `gzip` or `deflate`; no more than `limit` bytes are ever made of it."""
    found = bytearray()
    for _ in range(_MAX_MEMBERS if coding == "gzip" else 1):
        decoder = zlib.decompressobj(_GZIP if coding == "gzip" else _deflate_kind(data))
        try:
            found += decoder.decompress(data, limit + 1 - len(found))
        except zlib.error as error:
            raise MalformedBody(f"its {coding} coding is broken ({error})") from None
        if len(found) > limit:
            raise BodyTooLarge(limit)
        if not decoder.eof:
            raise MalformedBody(f"its {coding} coding ends too early")
        data = decoder.unused_data
        if not data:
            return bytes(found)
    raise MalformedBody(f"its {coding} coding goes on after its end")


async def _read(receive: Receive, limit: int, idle: float | None) -> bytes | None:
    body = bytearray()
    now, left = asyncio.get_running_loop().time, idle
    while True:
        asked = now()
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            assert idle is not None
            raise BodyTimeout(idle) from None
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        body += part
        if idle is not None and left is not None:
            left = min(idle, left - (now() - asked) + len(part) / MIN_BYTES_PER_S)
        if len(body) > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body", False):
            return bytes(body)


def _coding(scope: Scope) -> str:
    """`gzip`, `deflate`, or nothing for a body as it is. Raises UnsupportedMedia for all else, several included."""
    lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-encoding"]
    codings = [word for word in (part.strip().lower() for part in ",".join(lines).split(",")) if word]
    codings = [word.removeprefix("x-") if word == "x-gzip" else word for word in codings if word != "identity"]
    if not codings:
        return ""
    if codings not in (["gzip"], ["deflate"]):
        told = ", ".join(codings)[:100]
        error = UnsupportedMedia(
            f"Content-Encoding {told} is not read here; send the body as it is, or in one of {ACCEPTED.decode()}",
            param="body",
        )
        error.headers = [(b"accept-encoding", ACCEPTED)]
        raise error
    return codings[0]


def _deflate_kind(data: bytes) -> int:
    """By the name `deflate` goes the zlib format, and with some clients the bare stream (RFC 9110, 8.4.1.2)."""
    is_zlib = len(data) > 1 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
    return _ZLIB if is_zlib else _RAW
