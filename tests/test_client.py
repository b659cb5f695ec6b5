"""The client that comes back, before servers that break off, refuse, or know nothing of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx2
import pytest

from synthia_vllm.client import AsyncResuming, RestRefused, Resuming

BROKEN = httpx2.RemoteProtocolError("peer closed connection")
Answer = httpx2.Response | Exception


class Bytes(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body in pieces; an error among them is raised."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


@dataclass
class Server(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Answers each request with the next of these."""

    answers: Sequence[Answer]
    seen: list[httpx2.Request] = field(default_factory=list)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.seen.append(request)
        answer = self.answers[len(self.seen) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.handle_request(request)

    @property
    def last_ids(self) -> list[str | None]:
        return [request.headers.get("last-event-id") for request in self.seen]


def events(*pieces: bytes | Exception) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, stream=Bytes(*pieces))


def ask(server: Server, patience_s: float = 5.0) -> bytes:
    with httpx2.Client(transport=Resuming(server, patience_s=patience_s)) as client:
        return client.post("http://gateway/v1/chat/completions", json={"a": 1}).raise_for_status().content


def ask_async(server: Server, patience_s: float = 5.0) -> bytes:
    async def run() -> bytes:
        async with httpx2.AsyncClient(transport=AsyncResuming(server, patience_s=patience_s)) as client:
            return (await client.post("http://gateway/v1/chat/completions", json={"a": 1})).raise_for_status().content

    return asyncio.run(run())


both = pytest.mark.parametrize("ask", [ask, ask_async])
Ask = Callable[..., bytes]


@both
def test_a_stream_goes_on_behind_its_last_whole_event(ask: Ask) -> None:
    server = Server(
        [
            events(b"id: 0\ndata: a\n\nid: 1\nda", b"ta: b\n\nid: 1.7\ndata: lost", BROKEN),
            httpx2.ConnectError("refused"),
            httpx2.Response(503, headers={"retry-after": "0"}),
            events(b"id: 2\ndata: c\n\n", BROKEN),
            events(b"id: 3\ndata: d\n\n", b"id: 3!1\ndata: [DONE]\n\n"),
        ]
    )
    found = ask(server)
    assert [line for line in found.split(b"\n") if line.startswith(b"data")] == [
        b"data: a",
        b"data: b",
        b"data: c",
        b"data: d",
        b"data: [DONE]",
    ]
    assert server.last_ids == [None, "1", "1", "1", "2"]
    assert len({request.headers["x-request-id"] for request in server.seen}) == 1
    assert {request.content for request in server.seen} == {b'{"a":1}'}


@both
def test_a_stream_that_a_proxy_ends_before_its_last_event_goes_on_too(ask: Ask) -> None:
    server = Server([events(b"id: 1\ndata: a\n\n"), events(b"id: 2!1\ndata: b\n\n")])
    assert ask(server) == b"id: 1\ndata: a\n\nid: 2!1\ndata: b\n\n"
    assert server.last_ids == [None, "1"]


@both
def test_an_error_is_an_end(ask: Ask) -> None:
    told = b"id: 1\ndata: a\n\nid: \ndata: {'error': 1}\n\n"
    server = Server([events(told)])
    assert ask(server) == told


@both
def test_what_broke_before_its_first_event_is_asked_for_from_the_start(ask: Ask) -> None:
    whole = httpx2.Response(200, headers={"content-type": "application/json"}, stream=Bytes(b'{"b"', BROKEN))
    server = Server([events(BROKEN), events(b": waiting\n\n", BROKEN), events(b"id: 0!1\ndata: a\n\n")])
    assert ask(server) == b": waiting\n\nid: 0!1\ndata: a\n\n"
    assert server.last_ids == [None, "*", "*"]
    server = Server([whole, BROKEN, httpx2.Response(200, json={"b": 2})])
    assert ask(server) == b'{"b":2}'
    assert server.last_ids == [None, "*", "*"]


@both
@pytest.mark.parametrize("told", [b"data: a\n\n", b"id: 4\ndata: a\n\nid: \ndata: b\n\n"])
def test_a_server_that_tells_no_way_back_is_not_asked_again(ask: Ask, told: bytes) -> None:
    """It would say all of it once more."""
    server = Server([events(told, BROKEN)])
    with pytest.raises(httpx2.RemoteProtocolError, match="peer closed"):
        ask(server)


@both
def test_a_refused_rest_is_an_error_of_the_connection(ask: Ask) -> None:
    server = Server([events(b"id: 1\ndata: a\n\n", BROKEN), httpx2.Response(410, json={"error": {}})])
    with pytest.raises(RestRefused, match="410"):
        ask(server)


@both
def test_a_refusal_of_the_first_request_is_its_answer(ask: Ask) -> None:
    for status in (400, 401, 429, 503):
        with pytest.raises(httpx2.HTTPStatusError, match=str(status)):
            ask(Server([httpx2.Response(status)]))
    with pytest.raises(httpx2.ConnectError):
        ask(Server([httpx2.ConnectError("refused")]))


@both
def test_patience_has_an_end(ask: Ask) -> None:
    server = Server([events(b"id: 1\ndata: a\n\n", BROKEN), *[httpx2.ConnectError("refused")] * 100])
    with pytest.raises(httpx2.ConnectError):
        ask(server, patience_s=0.3)
    assert len(server.seen) > 2


@both
def test_other_methods_are_as_ever(ask: Ask) -> None:
    server = Server([httpx2.Response(200, json=[])])
    with httpx2.Client(transport=Resuming(server)) as client:
        assert client.get("http://gateway/v1/models").json() == []
    assert "x-request-id" not in server.seen[0].headers
