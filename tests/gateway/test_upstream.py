"""The proxy to engines, over real sockets."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.null_engine import NullEngine
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.upstream import HttpUpstream
from tests.gateway.live import serving
from tests.gateway.stack import Stack

BODY = {"model": "null", "prompt": "x", "max_tokens": 5, "stream": True}


@pytest.fixture
def live() -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda app: f"http://127.0.0.1:{stack.enter_context(serving(app))}"


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def events(app: ASGIApp, **body: Any) -> AsyncIterator[httpx.Response]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield await client.post("/v1/completions", json={**BODY, **body}, headers={"Authorization": "Bearer sk-alice"})


async def ask(app: ASGIApp, **body: Any) -> httpx.Response:
    return await anext(events(app, **body))


async def test_a_stream_passes_byte_for_byte(live: Any) -> None:
    engine = NullEngine()
    async with HttpUpstream([live(engine)]) as upstream:
        through = await ask(upstream)
        straight = await ask(NullEngine())
    assert through.content == straight.content
    assert through.headers["content-type"] == straight.headers["content-type"]
    assert "server" not in through.headers  # the gateway's own server adds one, and a date


async def test_our_layers_work_in_front_of_it(live: Any) -> None:
    async with HttpUpstream([live(NullEngine())]) as upstream:
        stack = Stack(upstream)
        reply = await ask(stack.app)
    assert reply.text.count('"text"') == 5
    assert "usage" not in reply.text
    assert stack.calls[0].generated == 5


async def test_an_engine_that_refuses_is_skipped(live: Any) -> None:
    async with HttpUpstream([closed_port(), live(NullEngine())]) as upstream:
        assert [(await ask(upstream)).status_code for _ in range(3)] == [200] * 3


async def test_the_least_busy_engine_is_asked(live: Any) -> None:
    engines = [NullEngine(tokens_per_second=20) for _ in range(2)]
    async with HttpUpstream([live(engine) for engine in engines]) as upstream:
        asking = [asyncio.create_task(ask(upstream, max_tokens=20)) for _ in range(6)]
        await asyncio.sleep(0.4)
        assert [engine.running for engine in engines] == [3, 3]
        await asyncio.gather(*asking)


async def test_no_engine_is_a_502() -> None:
    async with HttpUpstream([closed_port()]) as upstream:
        reply = await ask(Stack(upstream).app)
    assert reply.status_code == 502
    assert reply.json()["error"]["type"] == "upstream_error"


async def test_a_silent_engine_is_a_504(live: Any) -> None:
    async with HttpUpstream([live(NullEngine(prefill_s=5))], read_timeout=0.3) as upstream:
        reply = await ask(Stack(upstream).app, stream=False, max_tokens=1)
    assert reply.status_code == 504


async def test_a_stream_that_breaks_ends_with_one_error_and_no_done(live: Any) -> None:
    url = live(NullEngine(break_after=3, tokens_per_second=50))
    stacks = []

    async def gateway(scope: Scope, receive: Receive, send: Send) -> None:
        async with HttpUpstream([url]) as upstream:  # in the loop that serves
            stacks.append(Stack(upstream))
            await stacks[-1].app(scope, receive, send)

    with serving(gateway) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        text = await asyncio.to_thread(_read, client)
    stack = stacks[-1]
    lines = [line for line in text.split("\n\n") if line]
    assert "[DONE]" not in text
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == 502
    assert stack.calls[0].generated == 2
    assert stack.calls[0].outcome == "failed"


def _read(client: httpx.Client) -> str:
    text = ""
    try:
        with client.stream("POST", "/v1/completions", json=BODY, headers={"Authorization": "Bearer sk-alice"}) as reply:
            for part in reply.iter_text():
                text += part
    except httpx.RemoteProtocolError:
        pass  # the connection ends without an end of the body
    return text


async def test_a_client_that_leaves_ends_its_request_upstream(live: Any) -> None:
    engine = NullEngine(tokens_per_second=10)
    async with HttpUpstream([live(engine)]) as upstream:
        gone = asyncio.Event()
        bodies = [json.dumps({**BODY, "max_tokens": 1000}).encode()]

        async def receive() -> Any:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asking = asyncio.create_task(upstream(scope, receive, send))
        await asyncio.sleep(0.4)
        assert engine.running == 1
        gone.set()
        await asyncio.wait_for(asking, 1)
        deadline = time.monotonic() + 2
        while engine.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
    assert (engine.running, engine.aborted) == (0, 1)


async def test_the_cache_size_is_vllms_own_figure(live: Any) -> None:
    urls = [live(NullEngine()), live(NullEngine())]
    async with HttpUpstream(urls) as upstream:
        assert await upstream.capacity() == 2 * 4096 * 16
    async with HttpUpstream([*urls, closed_port()]) as upstream:
        assert await upstream.capacity() is None


async def test_keys_and_hop_headers_stay_here(live: Any) -> None:
    seen: list[dict[bytes, bytes]] = []

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append(dict(scope["headers"]))
        await NullEngine()(scope, receive, send)

    url = live(engine)
    async with HttpUpstream([url]) as upstream:
        await ask(upstream)
        await ask(Stack(upstream).app)
    async with HttpUpstream([url], key="engines-own") as upstream:
        await ask(upstream)
    assert not {b"authorization", b"x-api-key", b"transfer-encoding"} & {*seen[0], *seen[1]}
    assert {headers[b"accept-encoding"] for headers in seen} == {b"identity"}
    assert seen[1][b"x-request-id"]
    assert seen[2][b"authorization"] == b"Bearer engines-own"


@pytest.mark.parametrize("url", ["engine:8000", "ftp://engine", "http://"])
def test_a_url_that_is_none_is_told(url: str) -> None:
    with pytest.raises(SetupError, match="--upstream"):
        HttpUpstream([url])
