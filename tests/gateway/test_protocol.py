"""The network's edge, over real sockets."""

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from synthia_vllm.gateway.protocol import MAX_HEADERS
from synthia_vllm.settings import TimeoutSettings
from tests.gateway.live import exchange, serving

served: list[str] = []


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return None
    if scope["path"] == "/early":
        return await JSONResponse({})(scope, receive, send)
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10):
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b"chunk", "more_body": True})
        return await send({"type": "http.response.body", "body": b""})
    body = await Request(scope, receive).body()
    served.append(scope["path"])
    return await JSONResponse({"body": body.decode(errors="replace")})(scope, receive, send)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(echo, timeouts=TimeoutSettings(headers=0.5, idle=2)) as port:
        yield port


def test_an_ordinary_request_passes_and_the_connection_is_kept(port: int) -> None:
    got = exchange(
        port, b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n", pause=0.7, wait=0.5
    )
    assert got.count(b"200 OK") == 2


def test_pipelined_requests_are_all_answered(port: int) -> None:
    assert exchange(port, b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n" * 3, wait=0.5).count(b"200 OK") == 3


@pytest.mark.parametrize(
    "parts",
    [[], [b"GET / HT"], [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 10], [b"\r\n"] * 10],
    ids=["nothing", "a part", "a trickle", "blank"],
)
def test_headers_that_trickle_are_given_up(port: int, parts: list[bytes]) -> None:
    began = time.monotonic()
    got = exchange(port, *parts, pause=0.1)
    assert got.startswith(b"HTTP/1.1 408")
    assert b'"type":"invalid_request_error"' in got
    assert time.monotonic() - began < 3


def test_the_next_request_of_a_kept_connection_may_not_trickle_either(port: int) -> None:
    got = exchange(port, b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /b HT", *[b"T"] * 8, pause=0.2)
    assert got.count(b"200 OK") == 1


def test_a_body_may_come_slower_than_headers(port: int) -> None:
    head = b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n"
    assert b'"abcd"' in exchange(port, head, b"a", b"b", b"c", b"d", pause=0.3, wait=0.5)


def test_a_megabyte_of_headers_is_refused(port: int) -> None:
    got = exchange(port, b"GET /big HTTP/1.1\r\nhost: x\r\nbig: ", *[b"a" * 65536] * 16)
    assert got == b"" or got.startswith(b"HTTP/1.1 431")
    assert "/big" not in served


def test_too_many_headers_are_refused(port: int) -> None:
    many = b"".join(b"h%d: x\r\n" % number for number in range(MAX_HEADERS + 1))
    assert exchange(port, b"GET /many HTTP/1.1\r\n" + many + b"\r\n").startswith(b"HTTP/1.1 431")
    assert "/many" not in served


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 4\r\ntransfer-encoding: chunked",
        b"content-length: 4\r\ncontent-length: 5",
        b"content-length: +4",
        b"content-length: 4, 5",
        b"transfer-encoding: chunked, identity",
        b"transfer-encoding: xchunked",
        b"content-length : 4",
        b"x: a\r\n folded: b\r\ncontent-length: 4",
        b"x: a\x00b\r\ncontent-length: 4",
        b"x: a\nGET /smuggled HTTP/1.1",
    ],
)
def test_a_message_that_two_servers_may_read_differently_is_refused(port: int, head: bytes) -> None:
    body = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
    got = exchange(port, b"POST /outer HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n" + body, wait=0.5)
    assert b"200 OK" not in got
    assert "/smuggled" not in served


def test_headers_over_the_limit_in_one_packet_are_refused(port: int) -> None:
    got = exchange(port, b"GET /packet HTTP/1.1\r\nhost: x\r\nbig: " + b"a" * 100_000 + b"\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 431")
    assert b'"param":"headers"' in got
    assert "/packet" not in served


@pytest.mark.parametrize("bait", [b"\r\n", b"x"])
def test_a_stray_byte_does_not_keep_an_idle_connection(port: int, bait: bytes) -> None:
    """A blank line is no request, and the rest of a body that was answered early is none either."""
    head = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
    if bait == b"x":
        head = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    began = time.monotonic()
    got = exchange(port, head, bait, pause=0.2, wait=8)
    assert b"200 OK" in got
    assert time.monotonic() - began < 4


def test_a_running_reply_is_not_cut_by_the_beginning_of_the_next_request(port: int) -> None:
    got = exchange(port, b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\nGET /ne", wait=3)
    assert got.count(b"\r\nchunk\r\n") == 10


def test_an_idle_connection_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.settimeout(6)
        while connection.recv(65536):
            pass
