"""Reading a request's body: within its bound and its time, and out of its content coding (RFC 9110, 8.4)."""

import asyncio
import zlib
from collections import Counter
from collections.abc import Callable

from starlette.types import Receive, Scope

from synthia_vllm.errors import BodyTimeout, BodyTooLarge, MalformedBody, Overloaded, UnsupportedMedia
from synthia_vllm.gateway.edge.replies import header

DEFAULT_MAX_BODY_BYTES = 4 * 2**20
ACCEPTED = b"gzip, deflate"
MIN_BYTES_PER_S = 500  # of a body, or its `idle` seconds run out: else a byte now and then keeps it for ever
_MAX_MEMBERS = 16  # of a gzip body: each costs a decoder and a copy of what follows it
_MOST_LARGEST = 64  # bodies of the largest size that may be in memory together
_USERS_SHARE = 4  # of which one user may have a quarter
_RETRY_S = 1.0
_GZIP, _ZLIB, _RAW = zlib.MAX_WBITS + 16, zlib.MAX_WBITS, -zlib.MAX_WBITS


class Bodies:
    """Counts the bytes of all bodies that are read or waiting to be worked on: together they have a bound.

    `largest` is the bound of one. A user may have a quarter of the whole, so that nobody takes it all.
    """

    def __init__(self, largest: int) -> None:
        self.most = _MOST_LARGEST * largest
        self.held = 0
        self._of_user = Counter[str]()

    def body(self, user: str | None) -> "HeldBody":
        """For a body about to be read; no share for None, who may be many."""
        return HeldBody(self, user)

    def add(self, user: str | None, count: int) -> None:
        over = user is not None and self._of_user[user] + count > self.most // _USERS_SHARE
        if over or self.held + count > self.most:
            whose = "of yours" if over else "of all users"
            raise Overloaded(f"too many long bodies {whose} are under way at once", _RETRY_S)
        self.held += count
        if user is not None:
            self._of_user[user] += count

    def give_back(self, user: str | None, count: int) -> None:
        self.held -= count
        if user is not None:
            self._of_user[user] -= count
            if not self._of_user[user]:
                del self._of_user[user]


class HeldBody:
    """What one body has of that bound."""

    def __init__(self, bodies: Bodies, user: str | None) -> None:
        self._bodies = bodies
        self._user = user
        self._bytes = 0

    def add(self, count: int) -> None:
        """Raises Overloaded where there is no more room."""
        self._bodies.add(self._user, count)
        self._bytes += count

    def give_back(self) -> None:
        """It is in memory no longer. May be told twice."""
        self._bodies.give_back(self._user, self._bytes)
        self._bytes = 0


def _nothing(count: int) -> None:
    pass


async def read_body(
    scope: Scope,
    receive: Receive,
    limit: int,
    idle: float | None = None,
    *,
    hold: Callable[[int], None] = _nothing,
) -> bytes | None:
    """The whole body, decoded; None where the client has left. `hold` is told of its bytes as they come.

    Raises BodyTooLarge over `limit` bytes, sent or decoded, unread if announced; BodyTimeout after `idle` seconds
    without a byte, or where it trickles; UnsupportedMedia, unread, for a coding that is not read here; MalformedBody
    for one that is broken.
    """
    coding = _coding(scope)
    announced = header(scope, b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(limit)
    body = await _read(receive, limit, idle, hold)
    if not body or not coding:
        return body
    # In a thread whatever the size: a thousand bytes may become a million.
    found = await asyncio.to_thread(inflate, body, coding, limit)
    hold(max(0, len(found) - len(body)))
    return found


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


async def _read(receive: Receive, limit: int, idle: float | None, hold: Callable[[int], None]) -> bytes | None:
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
        hold(len(part))
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
