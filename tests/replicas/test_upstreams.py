"""Engines that are left alone, over real sockets."""

import asyncio
import socket

import pytest
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from benchmarks.null_engine import NullEngine
from benchmarks.null_faults import Faults
from benchmarks.null_port import NullEnginePort
from benchmarks.null_tokenizer import null_tokenizer
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import Overloaded, RequestError, SetupError, UpstreamLost, UpstreamTimeout
from synthia_vllm.replicas.upstreams import Upstreams
from tests.gateway.stack import Stack
from tests.replicas.engines import Answers, Live, asking, count_of, read, read_into, reply_to, text_of, until

TOKENIZER = null_tokenizer()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("route", [True, False])
async def test_a_sequence_comes_whole(live: Live, ids: bool, route: bool) -> None:
    engine = NullEngine(generate_route=route, numbered=True)
    async with Upstreams([live(engine)], tokenizer=TOKENIZER if ids else None) as upstreams:
        reply = await read(upstreams, asking(ids=ids))
        assert await upstreams.models() == ["null"]
    assert (text_of(reply), count_of(reply)) == (reply_to(), 12)
    assert reply[-1].finish == "length"


async def test_an_engine_that_refuses_connections_is_skipped(live: Live) -> None:
    async with Upstreams([closed_port(), live(NullEngine())], tokenizer=TOKENIZER) as upstreams:
        assert [text_of(await read(upstreams)) for _ in range(3)] == [reply_to()] * 3
        assert [view.state for view in upstreams.replicas()] == ["out", "up"]


async def test_the_least_busy_engine_is_asked(live: Live) -> None:
    engines = [NullEngine(tokens_per_second=20) for _ in range(2)]
    async with Upstreams([live(engine) for engine in engines], tokenizer=TOKENIZER) as upstreams:
        asking_ = [asyncio.create_task(read(upstreams, asking(max_tokens=20))) for _ in range(6)]
        await asyncio.sleep(0.6)
        assert [engine.running for engine in engines] == [3, 3]
        await asyncio.gather(*asking_)


async def test_no_engine_is_a_502() -> None:
    async with Upstreams([closed_port()]) as upstreams:
        with pytest.raises(UpstreamLost, match="no engine can be reached") as raised:
            await read(upstreams)
        assert raised.value.status == 502
        with pytest.raises(UpstreamLost):
            await upstreams.models()
        assert not await upstreams.ready()


async def test_a_silent_engine_is_a_504(live: Live) -> None:
    async with Upstreams([live(NullEngine(prefill_s=5))], tokenizer=TOKENIZER, read_timeout=0.5) as upstreams:
        with pytest.raises(UpstreamTimeout) as raised:
            await read(upstreams)
    assert raised.value.status == 504


async def test_a_sequence_that_breaks_ends_with_an_error(live: Live) -> None:
    got: list[Delta] = []
    async with Upstreams([live(NullEngine(break_after=3, tokens_per_second=50))], tokenizer=TOKENIZER) as upstreams:
        with pytest.raises(UpstreamLost):
            await read_into(got, upstreams)
        assert [view.in_flight for view in upstreams.replicas()] == [0]
    assert (count_of(got), text_of(got)) == (2, reply_to(tokens=2))


async def test_who_leaves_ends_its_request_at_the_engine(live: Live) -> None:
    engine = NullEngine(tokens_per_second=10)
    async with Upstreams([live(engine)], tokenizer=TOKENIZER) as upstreams:
        reading = asyncio.create_task(read(upstreams, asking(max_tokens=1000)))
        await until(lambda: engine.running == 1)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: (engine.running, engine.aborted) == (0, 1))


async def test_the_cache_size_is_vllms_own_figure(live: Live) -> None:
    urls = [live(NullEngine()), live(NullEngine())]
    async with Upstreams(urls) as upstreams:
        told = await upstreams.capacity()
        assert told is not None
        assert told.tokens == 2 * 4096 * 16
    async with Upstreams([*urls, closed_port()]) as upstreams:
        assert await upstreams.capacity() is None


async def test_what_an_engine_refuses_is_the_requests_fault(live: Live) -> None:
    async with Upstreams([live(NullEngine(max_model_len=8))], tokenizer=TOKENIZER) as upstreams:
        with pytest.raises(RequestError, match="maximum model length") as raised:
            await read(upstreams, asking("much too long"))
        assert raised.value.status == 400
        assert (upstreams.context, upstreams.root) == (8, "null")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, UpstreamLost),
        (502, UpstreamLost),
        (401, UpstreamLost),
        (404, UpstreamLost),
        (503, Overloaded),
        (429, Overloaded),
    ],
)
async def test_other_errors_are_not_the_requests_fault(live: Live, status: int, error: type[RequestError]) -> None:
    async with Upstreams([live(Answers(PlainTextResponse("no", status)))]) as upstreams:
        with pytest.raises(error):
            await read(upstreams)


async def test_a_page_instead_of_a_stream_is_a_502(live: Live) -> None:
    async with Upstreams([live(Answers(HTMLResponse("<html>")))]) as upstreams:
        with pytest.raises(UpstreamLost, match="text/html"):
            await read(upstreams)


async def test_ready_asks_for_a_token(live: Live) -> None:
    engine = NullEngine()
    async with Upstreams([live(engine)], tokenizer=TOKENIZER) as upstreams:
        assert await upstreams.ready()
        engine.faults = Faults(dead=True)
        assert not await upstreams.ready()


async def test_own_headers_go_along(live: Live) -> None:
    seen: list[dict[bytes, bytes]] = []
    inner = NullEngine()

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append(dict(scope["headers"]))
        await inner(scope, receive, send)

    url = live(engine)
    async with Upstreams([url]) as upstreams:
        await read(upstreams)
    assert not any(b"authorization" in headers for headers in seen)
    assert seen[-1][b"x-request-id"] == b"id-hi"
    async with Upstreams([url], key="engines-own") as upstreams:
        await read(upstreams)
    assert seen[-1][b"authorization"] == b"Bearer engines-own"
    assert {headers[b"accept-encoding"] for headers in seen} == {b"identity"}


@pytest.mark.parametrize("url", ["engine:8000", "ftp://engine", "http://"])
def test_a_url_that_is_none_is_told(url: str) -> None:
    with pytest.raises(SetupError, match="--upstream"):
        Upstreams([url])


async def test_models_are_asked_for_once_by_those_who_come_together(live: Live) -> None:
    asked = 0
    inner = NullEngine()

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal asked
        asked += scope.get("path") == "/v1/models"
        await inner(scope, receive, send)

    async with Upstreams([live(engine), closed_port()]) as upstreams:
        assert await asyncio.gather(*(upstreams.models() for _ in range(20))) == [["null"]] * 20
        assert await upstreams.models() == ["null"]
    assert asked == 1


async def test_a_list_that_is_none_is_passed_over(live: Live) -> None:
    broken = [HTMLResponse("<html>"), PlainTextResponse("[1, {}]"), PlainTextResponse('{"data": [5, {"id": 7}]}')]
    async with Upstreams([*map(live, broken), live(NullEngine())]) as upstreams:
        assert await upstreams.models() == ["null"]
    async with Upstreams([*map(live, broken)]) as upstreams:
        with pytest.raises(UpstreamLost):
            await upstreams.models()


@pytest.mark.parametrize("ids", [True, False])
async def test_a_server_of_ours_is_an_engine_too(live: Live, ids: bool) -> None:
    server = Stack(NullEnginePort())
    async with Upstreams([live(server.app)], tokenizer=TOKENIZER if ids else None, key="sk-alice") as upstreams:
        deltas = await read(upstreams, asking(ids=ids, logprobs=1 if ids else None))
    assert (text_of(deltas), count_of(deltas), deltas[-1].finish) == (reply_to(), 12, "length")
    assert all(token >= 0 for delta in deltas for token in delta.ids)
    assert sum(len(delta.logprobs or ()) for delta in deltas) == (12 if ids else 0)
