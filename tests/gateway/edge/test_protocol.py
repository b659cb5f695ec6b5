"""The network's edge, over real sockets."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
import uvloop

from synthia_vllm.gateway.edge.cycle import MAX_UNREAD_BYTES
from synthia_vllm.gateway.edge.protocol import MAX_HEADERS
from synthia_vllm.gateway.edge.replies import UNBOUNDED_SEND
from synthia_vllm.settings import TimeoutSettings
from tests.gateway.edge.echo import Echo
from tests.gateway.live import exchange, serving

app = Echo()


def statuses(got: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d+)", got)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**20):
            found += part
    return found


def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError


def served() -> list[str]:
    return [path for _, path, _ in app.served]


@pytest.fixture(scope="module", params=[None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    limits = TimeoutSettings(headers=0.5, idle=2, write=2)
    with serving(app, loop_factory=request.param, timeouts=limits) as port:
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
    assert "/big" not in served()


def test_too_many_headers_are_refused(port: int) -> None:
    many = b"".join(b"h%d: x\r\n" % number for number in range(MAX_HEADERS + 1))
    assert exchange(port, b"GET /many HTTP/1.1\r\n" + many + b"\r\n").startswith(b"HTTP/1.1 431")
    assert "/many" not in served()


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
    assert "/smuggled" not in served()


def test_headers_over_the_limit_in_one_packet_are_refused(port: int) -> None:
    got = exchange(port, b"GET /packet HTTP/1.1\r\nhost: x\r\nbig: " + b"a" * 100_000 + b"\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 431")
    assert b'"param":"headers"' in got
    assert "/packet" not in served()


@pytest.mark.parametrize("bait", [b"\r\n", b"x"])
def test_a_stray_byte_does_not_keep_an_idle_connection(port: int, bait: bytes) -> None:
    """A blank line is no request, and the rest of a body that was answered early is none either."""
    head = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
    if bait == b"x":
        head = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    began = time.monotonic()
    got = exchange(port, head, bait, pause=0.2, wait=8)
    assert b"200 OK" in got or b"401 Unauthorized" in got
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


def test_the_protocols_own_errors_have_the_form_and_names_of_the_api(port: int) -> None:
    def refused(head: bytes) -> tuple[bytes, dict[str, Any]]:
        reply, _, body = exchange(port, head).partition(b"\r\n\r\n")
        assert b"\r\nconnection: close" in reply
        assert b"\r\ndate: " in reply
        return reply.split(b"\r\n")[0], json.loads(body)

    status, told = refused(b"GET / HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    error = told["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "malformed_request", "headers")
    _, told = refused(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n")
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /a HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /a HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
        (b"GET /a HTTP/2.0\r\nhost: a\r\n\r\n", b"505"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\nGET /tunnel HTTP/1.1\r\nhost: a\r\n\r\n", b"501"),
        (b"BREW /a HTTP/1.1\r\nhost: a\r\n\r\n", b"400"),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nhost: a\r\n\r\n", b"400"),
    ],
)
def test_what_is_not_for_this_server_is_refused(port: int, head: bytes, status: bytes) -> None:
    before = len(app.served)
    assert exchange(port, head).startswith(b"HTTP/1.1 " + status)
    assert len(app.served) == before


@pytest.mark.parametrize("target", [b"http://elsewhere.example/a?q", b"http://elsewhere.example", b"*", b"/a%2Fb"])
def test_every_form_of_a_target_is_read(port: int, target: bytes) -> None:
    assert b"200 OK" in exchange(port, b"OPTIONS " + target + b" HTTP/1.1\r\nhost: x\r\n\r\n", wait=0.3)


def test_headers_of_a_pipelined_request_are_bounded_while_a_reply_runs(port: int) -> None:
    got = exchange(port, b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\nGET /next HTTP/1.1\r\na: ", *[b"a" * 60_000] * 4)
    assert got.count(b"\r\nchunk\r\n") == 10  # the reply under way is whole, then comes the refusal
    assert got.count(b"HTTP/1.1 431") == 1


def test_trailers_and_chunk_extensions_are_bounded(port: int) -> None:
    for tail in (b"0\r\nt: ", b"1;a="):
        head = b"POST /trailers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"
        got = exchange(port, head + tail, *[b"a" * 60_000] * 3, pause=0.05)
        assert got.startswith(b"HTTP/1.1 431")
    assert ("POST", "/trailers", None) in app.served  # the app is told that the client is gone


def test_trailers_are_no_headers(port: int) -> None:
    body = b"3\r\nabc\r\n0\r\nx-api-key: forged\r\n\r\n"
    head = b"POST /forged HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert b'"abc"' in exchange(port, head, body, pause=0.1, wait=0.3)
    assert b"x-api-key" not in dict(app.scopes[-1]["headers"])


def test_a_broken_request_ends_the_connection_after_the_replies_before_it(port: int) -> None:
    got = exchange(port, b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\nGET /a HTTP/1.1\r\nhost: x\r\n\r\nnonsense\r\n\r\n")
    assert got.count(b"\r\nchunk\r\n") == 10
    assert statuses(got) == [b"200", b"200", b"400"]


def test_a_broken_body_is_told_and_is_no_request(port: int) -> None:
    head = b"POST /broken-body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert exchange(port, head, b"no number\r\n", pause=0.1).startswith(b"HTTP/1.1 400")
    # One that waits for its turn is never begun.
    got = exchange(port, b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n" + head.replace(b"/bro", b"/queued-bro") + b"no\r\n")
    assert statuses(got) == [b"200", b"400"]
    assert "/queued-broken-body" not in served()


def test_a_client_that_pipelines_and_leaves_is_noticed(port: int) -> None:
    """uvicorn tells only the newest of the requests; the oldest is the one that holds a place in the engine."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /wait?first HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.1)
        connection.sendall(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.1)
    time.sleep(0.3)
    assert "first" in app.disconnected
    assert "/never" not in served()


def test_a_client_that_shuts_its_sending_side_has_left(port: int) -> None:
    """Half-close: no socket tells a client that reads on from one that is gone."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /wait?half HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""
    until(lambda: "half" in app.disconnected)


def test_many_pipelined_requests_are_answered_in_order(port: int) -> None:
    many = b"".join(b"POST /%d HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n%04d" % (i, i) for i in range(500))
    got = exchange(port, many, wait=1)
    assert re.findall(rb'"body":"(\d+)"', got) == [b"%04d" % i for i in range(500)]


def test_send_never_waits_for_a_client_that_does_not_read(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"POST /flood?200 HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nflood")
        connection.sendall(b"GET /after HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(1.0)
        assert UNBOUNDED_SEND in app.scopes[-1]["extensions"]
        # The app has long ended; only the next request waits for the reply to be taken.
        assert "/flood" in served()
        assert "/after" not in served()
        connection.settimeout(1)
        found = 0
        while found < 200 * 65536:
            found += len(connection.recv(2**20))
        time.sleep(0.3)
        assert "/after" in served()
    app.served.clear()


def test_a_finished_reply_that_nobody_takes_is_given_up(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /flood?200 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        time.sleep(3.5)  # looked at each half second
        connection.settimeout(1)
        got = read_all(connection)
        assert not got.endswith(b"0\r\n\r\n")
        assert len(got) < 200 * 65536


def test_a_client_that_takes_nothing_of_a_running_reply_is_cut(port: int) -> None:
    app.disconnected.clear()
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /drip HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: "/drip" in app.disconnected)
        connection.settimeout(1)
        assert 0 < len(read_all(connection)) < MAX_UNREAD_BYTES


def test_a_client_that_reads_slowly_is_not_cut(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"GET /flood?200 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        connection.settimeout(5)
        found = 0
        for _ in range(7):  # half a megabyte each 0.6 s, longer than a client may take nothing
            time.sleep(0.6)
            found += len(connection.recv(2**19, socket.MSG_WAITALL))
        assert found + len(read_all(connection)) > 200 * 65536


def test_memory_of_an_unread_reply_is_bounded() -> None:
    with serving(app, loop_factory=uvloop.new_event_loop) as port:
        app.served.clear()
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"GET /flood?2000 HTTP/1.1\r\nhost: x\r\n\r\n")
            until(lambda: "/flood" in served())
            time.sleep(1.0)
            connection.settimeout(1)
            assert len(read_all(connection)) < MAX_UNREAD_BYTES  # of 131 MB, what the kernel had taken


def test_the_versions_that_the_protocol_was_written_for() -> None:
    """It takes the place of private parts: read `on_headers_complete`, `on_response_complete` and `send` again."""
    assert version("uvicorn").startswith("0.54.")
    assert version("httptools").startswith("0.9.")
