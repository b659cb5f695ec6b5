import asyncio
import gzip
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope

from synthia_vllm.errors import BodyTimeout, BodyTooLarge, MalformedBody, Overloaded, UnsupportedMedia
from synthia_vllm.gateway.edge.body import Bodies, HeldBody, inflate, read_body


def scope(*headers: tuple[bytes, bytes]) -> Scope:
    return {"type": "http", "headers": list(headers)}


def arriving(*parts: bytes, then: Message | None = None) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append(then or {"type": "http.request", "body": b"", "more_body": False})
    waiting = iter(messages)

    async def receive() -> Message:
        return next(waiting)

    return receive


async def read(body: bytes, coding: bytes, limit: int = 1000) -> bytes | None:
    return await read_body(scope((b"content-encoding", coding)), arriving(body), limit)


def raw_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return encoder.compress(data) + encoder.flush()


CODINGS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"x-gzip": gzip.compress,
    b" GZip": gzip.compress,
    b"identity, gzip": gzip.compress,
    b"deflate": zlib.compress,
    b"Deflate": raw_deflate,
    b"identity": bytes,
    b"": bytes,
}


async def test_a_body_comes_in_parts() -> None:
    assert await read_body(scope(), arriving(b"a", b"", b"bc"), 3) == b"abc"
    assert await read_body(scope(), arriving(), 3) == b""


@pytest.mark.parametrize(
    ("first", "part", "comes"), [(b"", b"a", False), (b"a" * 900_000, b"a", False), (b"", b"a" * 100, True)]
)
async def test_a_body_that_trickles_is_given_up(first: bytes, part: bytes, comes: bool) -> None:
    parts = iter([first or part] + [part] * 59)

    async def receive() -> Message:
        await asyncio.sleep(0.02)
        found = next(parts, b"")
        return {"type": "http.request", "body": found, "more_body": bool(found)}

    if comes:
        assert await read_body(scope(), receive, 10**6, 0.5) == part * 60
    else:
        with pytest.raises(BodyTimeout):
            await read_body(scope(), receive, 10**6, 0.5)


async def test_a_client_that_leaves_has_sent_no_body() -> None:
    assert await read_body(scope(), arriving(b"a", then={"type": "http.disconnect"}), 3) is None


async def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(BodyTooLarge):
        await read_body(scope(), arriving(b"ab", b"cd"), 3)


async def test_what_is_announced_as_too_large_is_not_read() -> None:
    with pytest.raises(BodyTooLarge):
        await read_body(scope((b"content-length", b"4")), asyncio.Event().wait, 3)  # type: ignore[arg-type]


async def test_a_body_that_stops_coming_is_given_up() -> None:
    with pytest.raises(BodyTimeout):
        await read_body(scope(), asyncio.Event().wait, 3, 0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_coded_body_is_decoded(coding: bytes) -> None:
    body = b'{"model": "synthia"}'
    assert await read(CODINGS[coding](body), coding) == body
    assert await read(b"", coding) == b""


async def test_a_gzip_body_may_have_several_members() -> None:
    assert await read(gzip.compress(b"ab") + gzip.compress(b"") + gzip.compress(b"c"), b"gzip") == b"abc"


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"compress", b"gzip, gzip", b"gzip,deflate", b"\xff", b"gzip;q=1"])
async def test_another_coding_is_refused_unread_and_told_what_would_do(coding: bytes) -> None:
    with pytest.raises(UnsupportedMedia) as told:
        await read_body(scope((b"content-encoding", coding)), asyncio.Event().wait, 3)  # type: ignore[arg-type]
    assert told.value.headers == [(b"accept-encoding", b"gzip, deflate")]
    assert told.value.status == 415


async def test_codings_in_two_lines_are_two_codings() -> None:
    with pytest.raises(UnsupportedMedia):
        await read_body(scope((b"content-encoding", b"gzip"), (b"content-encoding", b"br")), arriving(), 3)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [999, 1000, 1001, 10_000_000])
async def test_no_more_than_the_bound_is_made_of_a_body(coding: str, size: int) -> None:
    packed = CODINGS[coding.encode()](b"\0" * size)
    if size <= 1000:
        assert inflate(packed, coding, 1000) == b"\0" * size
    else:
        with pytest.raises(BodyTooLarge):
            inflate(packed, coding, 1000)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_goes_on_after_its_end_is_broken(coding: str) -> None:
    with pytest.raises(MalformedBody):
        inflate(CODINGS[coding.encode()](b"{}") + b"GET / HTTP/1.1", coding, 1000)
    with pytest.raises(MalformedBody):
        inflate(gzip.compress(b"") * 100_000, coding, 1000)


@given(
    body=st.binary(max_size=300),
    coding=st.sampled_from(["gzip", "deflate"]),
    at=st.integers(0),
    bits=st.integers(0, 255),
)
def test_a_damaged_body_is_the_clients_fault(body: bytes, coding: str, at: int, bits: int) -> None:
    packed = bytearray(CODINGS[coding.encode()](body))
    assert inflate(bytes(packed), coding, 300) == body
    with pytest.raises(MalformedBody):
        inflate(bytes(packed[: at % len(packed)]), coding, 300)
    packed[at % len(packed)] ^= bits
    with suppress(MalformedBody, BodyTooLarge):
        inflate(bytes(packed), coding, 300)


# All bodies together


async def test_all_bodies_together_have_a_bound_and_a_user_a_quarter_of_it() -> None:
    bodies = Bodies(100)
    whole = b"x" * 100

    async def held(user: str | None) -> HeldBody:
        one = bodies.body(user)
        try:
            assert await read_body(scope(), arriving(whole), 100, hold=one.add) == whole
        except Overloaded:
            one.give_back()
            raise
        return one

    his = [await held("mallory") for _ in range(16)]
    with pytest.raises(Overloaded, match="of yours"):
        await held("mallory")
    others = [await held(f"user-{number}") for number in range(48)]
    assert bodies.held == bodies.most
    for user in ("late", None):
        with pytest.raises(Overloaded, match="of all users"):
            await held(user)
    his.pop().give_back()
    late = await held("late")
    for one in (*his, *others, late, late):
        one.give_back()
    assert (bodies.held, dict(bodies._of_user)) == (0, {})


async def test_a_coded_body_counts_as_what_it_becomes() -> None:
    one = (bodies := Bodies(10_000)).body("mallory")
    coding = scope((b"content-encoding", b"gzip"))
    await read_body(coding, arriving(gzip.compress(b"x" * 9_000)), 10_000, hold=one.add)
    assert bodies.held == 9_000
