"""Where one message ends and the next begins, over real sockets: no body is ever read as a request."""

import gzip
import re
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthia_vllm.settings import TimeoutSettings
from tests.gateway.edge.echo import LIMIT, Echo
from tests.gateway.live import exchange, serving

BAIT = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nhost: x\r\n\r\n"
app = Echo()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(app, loop_factory=uvloop.new_event_loop, timeouts=TimeoutSettings(idle=2)) as port:
        yield port
        assert not [path for _, path, _ in app.served if path == "/smuggled"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    app.served.clear()
    yield
    assert "/smuggled" not in [path for _, path, _ in app.served]


def request(path: str = "/a", *headers: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    lines = [b"POST %b HTTP/%b" % (path.encode(), version), b"host: x", *headers]
    if not any(line.lower().startswith(b"transfer-encoding") for line in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body: bytes, size: int = 7) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def statuses(got: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d+)", got)


# A body that was read to its end


def test_a_connection_is_kept_after_a_body_that_was_read(port: int) -> None:
    got = exchange(port, request(body=BAIT), request(body=BAIT), pause=0.1, wait=0.3)
    assert statuses(got) == [b"200", b"200"]
    assert b"connection: close" not in got
    assert [body for _, _, body in app.served] == [BAIT, BAIT]


def test_a_connection_is_kept_after_an_early_answer_to_a_body_that_has_come(port: int) -> None:
    got = exchange(port, request("/early", body=BAIT), NEXT, pause=0.1, wait=0.3)
    assert statuses(got) == [b"401", b"200"]


# Expect: 100-continue (RFC 9110, 10.1.1)


def test_a_body_that_waits_is_asked_for_once_it_is_wanted(port: int) -> None:
    head = request("/a", b"expect: 100-continue", b"transfer-encoding: chunked")
    got = exchange(port, head, chunked(b"abc"), NEXT, pause=0.1, wait=0.3)
    assert statuses(got) == [b"100", b"200", b"200"]
    assert b'"abc"' in got


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/early", b"x: y", b"401"),
        ("/a", b"content-length: %d" % (LIMIT + 1), b"413"),
        ("/a", b"content-encoding: br", b"415"),
    ],
)
def test_an_expectation_that_is_not_met_ends_the_connection(port: int, path: str, header: bytes, status: bytes) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n" % path.encode()
    head += b"" if header.startswith(b"content-length") else b"content-length: 1000\r\n"
    # The client sends its next request in place of the body, as it may.
    got = exchange(port, head + header + b"\r\n\r\n", BAIT, pause=0.2)
    assert statuses(got) == [status]
    assert b"\r\nconnection: close\r\n" in got


def test_a_body_that_came_with_its_expectation_is_not_asked_for(port: int) -> None:
    got = exchange(port, request("/a", b"expect: 100-continue", body=BAIT) + NEXT, wait=0.3)
    assert statuses(got) == [b"200", b"200"]


def test_an_expectation_of_http_1_0_is_ignored(port: int) -> None:
    head = b"POST /a HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
    assert statuses(exchange(port, head, b"abc", pause=0.1)) == [b"200"]


# A body that was not read


@pytest.mark.parametrize("framing", [b"content-length: 90000", b"transfer-encoding: chunked"])
def test_a_connection_whose_body_was_not_read_is_closed(port: int, framing: bytes) -> None:
    head = b"POST /early HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n\r\n"
    got = exchange(port, head, BAIT, pause=0.2)
    assert statuses(got) == [b"401"]
    assert b"\r\nconnection: close\r\n" in got


def test_a_body_over_the_limit_is_answered_though_the_client_goes_on_sending(port: int) -> None:
    """A reset would take the answer away from it."""
    head = request("/a", b"transfer-encoding: chunked")
    got = exchange(port, head, *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 30, chunked(b"") + BAIT, pause=0.01)
    assert statuses(got) == [b"413"]
    assert b"request_too_large" in got


def test_a_client_that_goes_on_sending_is_not_listened_to_for_ever(port: int) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 90000000\r\n\r\n")
        while time.monotonic() - began < 10:
            try:
                connection.sendall(b"x")
            except OSError:
                break
            time.sleep(0.01)
    assert time.monotonic() - began < 4


# Upgrade (RFC 9110, 7.8)

OFFERS = {
    "h2c": (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    "websocket": (b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-key: x"),
    "several": (b"connection: keep-alive, Upgrade", b"upgrade: a/1, b", b"Upgrade: c", b"empty:"),
    "close": (b"connection: upgrade, close", b"upgrade: h2c"),
}


@pytest.mark.parametrize("offer", OFFERS)
def test_an_offered_upgrade_does_not_lose_the_body(port: int, offer: str) -> None:
    for parts in (
        [request("/a", *OFFERS[offer], body=BAIT)],
        [request("/a", *OFFERS[offer], b"transfer-encoding: chunked") + chunked(BAIT)],
        [request("/a", *OFFERS[offer], b"transfer-encoding: chunked"), chunked(BAIT)],
    ):
        app.served.clear()
        got = exchange(port, *parts, NEXT, pause=0.05, wait=0.3)
        assert statuses(got) == ([b"200"] if offer == "close" else [b"200", b"200"])
        assert app.served[0] == ("POST", "/a", BAIT)


def test_an_offered_upgrade_changes_nothing_about_what_is_refused(port: int) -> None:
    both = (*OFFERS["h2c"], b"content-length: 4", b"transfer-encoding: chunked")
    assert statuses(exchange(port, request("/a", *both) + chunked(BAIT))) == [b"400"]
    early = request("/early", *OFFERS["h2c"], b"expect: 100-continue", b"transfer-encoding: chunked")
    got = exchange(port, early, BAIT, pause=0.1)
    assert statuses(got) == [b"401"]
    assert b"connection: close" in got


# HTTP/1.0


def test_a_stream_for_http_1_0_is_plain_bytes_and_ends_with_the_connection(port: int) -> None:
    got = exchange(port, b"GET /stream HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", BAIT)
    head, _, body = got.partition(b"\r\n\r\n")
    assert body == b"chunk" * 10
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head


def test_a_reply_to_http_1_0_has_its_length_where_it_has_one(port: int) -> None:
    got = exchange(port, request(body=BAIT, version=b"1.0") + BAIT)
    assert statuses(got) == [b"200"]
    assert b"content-length:" in got


# HEAD, and replies without a body


def test_the_reply_to_head_has_no_body(port: int) -> None:
    got = exchange(port, b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\nHEAD /stream HTTP/1.1\r\nhost: x\r\n\r\n" + NEXT, wait=2)
    first, second, third, body = got.split(b"\r\n\r\n")
    assert b"content-length: 11" in first
    assert b"chunked" not in second
    assert statuses(third) == [b"200"]
    assert body == b'{"body":""}'


# Errors that nobody answered


def test_a_bug_is_answered_in_the_form_of_the_api_and_ends_the_connection(port: int) -> None:
    got = exchange(port, request("/broken", body=b"{}"))
    assert statuses(got) == [b"500"]
    assert b'"code":"internal_error"' in got
    assert b'"type":"api_error"' in exchange(port, request("/v1/messages/broken", body=b"{}"))


# Content-Encoding


def test_a_compressed_body_is_decoded_within_the_bound(port: int) -> None:
    got = exchange(port, request("/a", b"content-encoding: gzip", body=gzip.compress(BAIT)) + NEXT, wait=0.3)
    assert statuses(got) == [b"200", b"200"]
    assert app.served[0][2] == BAIT
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < LIMIT
    got = exchange(port, request("/a", b"content-encoding: gzip", body=bomb) + NEXT, wait=0.5)
    assert statuses(got) == [b"413", b"200"]


@pytest.mark.parametrize(("coding", "status"), [(b"gzip", b"400"), (b"deflate", b"400"), (b"zstd", b"415")])
def test_a_coding_that_can_not_be_read_smuggles_nothing(port: int, coding: bytes, status: bytes) -> None:
    got = exchange(port, request("/a", b"content-encoding: " + coding, body=BAIT) + NEXT, wait=0.3)
    assert statuses(got) == [status, b"200"]
    assert (b"\r\naccept-encoding: gzip, deflate\r\n" in got) == (status == b"415")


# However it is cut

MESSAGES = {
    "plain": request("/0", body=BAIT),
    "chunked": request("/1", b"transfer-encoding: chunked") + chunked(BAIT),
    "upgrade": request("/2", *OFFERS["h2c"], body=BAIT),
    "chunked upgrade": request("/3", *OFFERS["websocket"], b"transfer-encoding: chunked") + chunked(BAIT),
    "gzip": request("/4", b"content-encoding: gzip", body=gzip.compress(BAIT, mtime=0)),
    "expected": request("/5", b"expect: 100-continue", body=BAIT),
    "trailers": request("/6", b"transfer-encoding: chunked") + chunked(BAIT)[:-2] + b"x: y\r\n\r\n",
    "large": request("/7", b"x: " + b"y" * 5000, body=(BAIT * 2000)[:70_000]),
    "early": request("/early", body=BAIT * 500),
    "early upgrade": request("/early", *OFFERS["h2c"], b"transfer-encoding: chunked") + chunked(BAIT * 50),
}


LARGE = (BAIT * 2000)[:70_000]
READ = [name for name in MESSAGES if "early" not in name]


def cut_up(sent: bytes, cuts: list[float]) -> list[bytes]:
    places = sorted({round(cut * len(sent)) for cut in cuts} | {0, len(sent)})
    return [sent[a:b] for a, b in pairwise(places)]


@given(names=st.lists(st.sampled_from(READ), min_size=1, max_size=5), cuts=st.lists(st.floats(0, 1), max_size=6))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_messages_are_the_same_however_they_are_cut(port: int, names: list[str], cuts: list[float]) -> None:
    app.served.clear()
    sent = b"".join(MESSAGES[name] for name in names)
    last = b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    got = exchange(port, *cut_up(sent, cuts), last, pause=0.002)
    assert [status for status in statuses(got) if status != b"100"] == [b"200"] * (len(names) + 1)
    expected = [(f"/{READ.index(name)}", LARGE if name == "large" else BAIT) for name in names]
    assert [(path, body) for _, path, body in app.served] == [*expected, ("/last", b"")]
    assert all(b"upgrade" not in dict(scope["headers"]) for scope in app.scopes)


@given(names=st.lists(st.sampled_from(sorted(MESSAGES)), max_size=5), cuts=st.lists(st.floats(0, 1), max_size=6))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_body_that_is_answered_early_is_no_request_wherever_it_is_cut(
    port: int, names: list[str], cuts: list[float]
) -> None:
    """Whether a connection ends there depends on what has come by then, what is read as a request does not."""
    app.served.clear()
    sent = b"".join(MESSAGES[name] for name in [*names, "early", "early upgrade"])
    got = exchange(port, *cut_up(sent, cuts), pause=0.002, wait=0.1)
    assert set(statuses(got)) <= {b"100", b"200", b"401"}
    assert all(path.strip("/") in map(str, range(len(READ))) for _, path, _ in app.served)


@given(junk=st.binary(max_size=200), cut=st.integers(0, 200))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_in_front_of_a_request_are_a_failure_of_ours(port: int, junk: bytes, cut: int) -> None:
    sent = junk + b"\r\n\r\n" + NEXT
    got = exchange(port, sent[:cut], sent[cut:], wait=0.05)
    assert not [status for status in statuses(got) if status.startswith(b"5") and status not in (b"501", b"505")]
