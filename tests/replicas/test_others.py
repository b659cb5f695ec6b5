"""Engines that are no vLLM, in the same pool: asked for nothing but what they are. Over real sockets."""

import asyncio
from typing import Any

import pytest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import Overloaded, RequestError, UpstreamLost, UpstreamTimeout
from synthia_vllm.free_ports import free_port
from tests.gateway.stack import Stack
from tests.replicas.engines import (
    Answers,
    Live,
    asking,
    breaks,
    count_of,
    event,
    pool_of,
    read,
    read_into,
    reply_to,
    streaming,
    text_of,
    until,
)

DONE = b"data: [DONE]\n\n"
WHOLE = streaming(event({"text": "a"}), event({"text": "b", "finish_reason": "stop"}), DONE)


def closed_port() -> str:
    return f"http://127.0.0.1:{free_port()}"


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("route", [True, False])
async def test_a_sequence_comes_whole(live: Live, ids: bool, route: bool) -> None:
    engine = NullEngine(generate_route=route, numbered=True)
    async with pool_of(live(engine), tokenizer=ids) as pool:
        reply = await read(pool, asking(ids=ids))
        assert await pool.models() == ["null"]
    assert (text_of(reply), count_of(reply)) == (reply_to(), 12)
    assert reply[-1].finish == "length"


async def test_an_engine_that_is_no_vllm_is_never_asked_for_a_token_of_ours(live: Live) -> None:
    engine = Answers(WHOLE)
    async with pool_of(live(engine), tokenizer=False, canary_period_s=0.05) as pool:
        assert text_of(await read(pool, asking(ids=False))) == "ab"
        await asyncio.sleep(0.5)
    assert engine.asked == 1
    assert not engine.canaries


async def test_an_engine_that_refuses_connections_is_passed_over(live: Live) -> None:
    async with pool_of(closed_port(), live(Answers(WHOLE)), tokenizer=False, up=1) as pool:
        assert [text_of(await read(pool, asking(ids=False))) for _ in range(3)] == ["ab"] * 3
        assert [view.state for view in pool.replicas()] == ["out", "up"]


async def test_an_engine_that_comes_later_is_used_then(live: Live) -> None:
    async with pool_of(closed_port(), tokenizer=False, up=0) as pool:
        assert not await pool.ready()
        with pytest.raises(UpstreamLost):
            await pool.models()
        reading = asyncio.create_task(read(pool, asking(ids=False)))
        await asyncio.sleep(0.1)
        pool.update({"later": live(Answers(WHOLE))})
        assert text_of(await reading) == "ab"
        assert await pool.ready()


async def test_the_least_busy_engine_is_asked(live: Live) -> None:
    engines = [NullEngine(tokens_per_second=20) for _ in range(2)]
    async with pool_of(*map(live, engines)) as pool:
        asking_ = [asyncio.create_task(read(pool, asking(max_tokens=20))) for _ in range(6)]
        await asyncio.sleep(0.6)
        assert [engine.running for engine in engines] == [3, 3]
        await asyncio.gather(*asking_)


@pytest.mark.parametrize("answer", [never, streaming(event({"text": "a"}), never=True)], ids=["at once", "on the way"])
async def test_a_silent_engine_is_a_504(live: Live, answer: ASGIApp) -> None:
    got: list[Delta] = []
    async with pool_of(live(Answers(answer)), tokenizer=False, silence_s=0.5, max_losses=1) as pool:
        with pytest.raises(UpstreamTimeout) as raised:
            await read_into(got, pool, asking(ids=False))
    assert raised.value.status == 504


async def test_a_busy_engine_that_is_no_vllm_is_not_taken_for_a_hung_one(live: Live) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1.5)
        await WHOLE(scope, receive, send)

    urls = [live(Answers(slow)), live(Answers(WHOLE))]
    async with pool_of(*urls, tokenizer=False, canary_deadline_s=0.3, routing="round_robin") as pool:
        replies = await asyncio.gather(*(read(pool, asking(ids=False)) for _ in range(4)))
        assert [view.state for view in pool.replicas()] == ["up", "up"]
    assert [text_of(reply) for reply in replies] == ["ab"] * 4


@pytest.mark.parametrize("resume", [True, False])
async def test_a_sequence_that_breaks_goes_on_only_where_that_is_wanted(live: Live, resume: bool) -> None:
    engines = [NullEngine(tokens_per_second=20), NullEngine(tokens_per_second=20)]
    async with pool_of(*map(live, engines), resume=resume) as pool:
        got: list[Delta] = []
        reading = asyncio.create_task(read_into(got, pool))
        await until(lambda: len(got) > 1)
        next(engine for engine in engines if engine.running).faults.change({"break_after": 8})
        await asyncio.wait([reading])
        assert (reading.exception() is None) == resume
        await until(lambda: not any(view.in_flight for view in pool.replicas()))
    assert (count_of(got) == 12) == resume
    assert text_of(got) == reply_to(tokens=count_of(got))


async def test_without_resume_what_had_nothing_yet_is_tried_elsewhere(live: Live) -> None:
    urls = [live(Answers(breaks)), live(Answers(WHOLE))]
    async with pool_of(*urls, tokenizer=False, resume=False, routing="round_robin") as pool:
        assert [text_of(await read(pool, asking(ids=False))) for _ in range(2)] == ["ab"] * 2


async def test_what_an_engine_refuses_is_the_requests_fault(live: Live) -> None:
    async with pool_of(live(NullEngine(max_model_len=8))) as pool:
        with pytest.raises(RequestError, match="maximum model length") as raised:
            await read(pool, asking("much too long"))
        assert raised.value.status == 400
        assert (pool.context, pool.root) == (8, "null")


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
    async with pool_of(live(Answers(PlainTextResponse("no", status))), tokenizer=False) as pool:
        with pytest.raises(error):
            await read(pool, asking(ids=False))


async def test_a_page_instead_of_a_stream_is_a_502(live: Live) -> None:
    async with pool_of(live(Answers(HTMLResponse("<html>"))), tokenizer=False) as pool:
        with pytest.raises(UpstreamLost, match="text/html"):
            await read(pool, asking(ids=False))


async def test_what_has_taken_an_engines_place_is_found_out(live: Live) -> None:
    """An address at which another engine answers, which has another route."""
    inside: list[ASGIApp] = [NullEngine()]

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        await inside[0](scope, receive, send)

    async with pool_of(live(engine)) as pool:
        assert text_of(await read(pool)) == reply_to()
        inside[0] = Answers(WHOLE)
        with pytest.raises(UpstreamLost):
            await read(pool)
        assert text_of(await read(pool)) == "ab"


async def test_own_headers_go_along(live: Live) -> None:
    engine = Answers(WHOLE)
    url = live(engine)
    async with pool_of(url, tokenizer=False) as pool:
        await read(pool, asking(ids=False))
    assert not any(b"authorization" in headers for headers in engine.headers)
    assert b"id-hi" in [headers.get(b"x-request-id") for headers in engine.headers]
    engine.headers.clear()
    async with pool_of(url, tokenizer=False, key="engines-own") as pool:
        await read(pool, asking(ids=False))
    assert {headers[b"authorization"] for headers in engine.headers} == {b"Bearer engines-own"}
    assert {headers[b"accept-encoding"] for headers in engine.headers} == {b"identity"}


async def test_models_are_asked_for_once_by_those_who_come_together(live: Live) -> None:
    asked = 0
    inner = Answers(WHOLE)

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal asked
        asked += scope.get("path") == "/v1/models"
        await inner(scope, receive, send)

    async with pool_of(live(engine), tokenizer=False) as pool:
        asked = 0
        assert await asyncio.gather(*(pool.models() for _ in range(20))) == [["other"]] * 20
        assert await pool.models() == ["other"]
    assert asked == 1


@pytest.mark.parametrize("listed", [HTMLResponse("<html>"), JSONResponse([1, {}]), JSONResponse({"data": [{"id": 7}]})])
async def test_a_list_that_is_none_is_passed_over(live: Live, listed: Any) -> None:
    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        inner = listed if scope.get("path") == "/v1/models" else Answers(WHOLE)
        await inner(scope, receive, send)

    async with pool_of(live(engine), live(NullEngine()), tokenizer=False) as pool:
        assert await pool.models() == ["null"]
    async with pool_of(live(engine), tokenizer=False) as pool:
        with pytest.raises(UpstreamLost):
            await pool.models()


@pytest.mark.parametrize("ids", [True, False])
async def test_a_server_of_ours_is_an_engine_too(live: Live, ids: bool) -> None:
    server = Stack(NullEnginePort())
    async with pool_of(live(server.app), tokenizer=ids, key="sk-alice") as pool:
        deltas = await read(pool, asking(ids=ids, logprobs=1 if ids else None))
    assert (text_of(deltas), count_of(deltas), deltas[-1].finish) == (reply_to(), 12, "length")
    assert all(token >= 0 for delta in deltas for token in delta.ids)
    assert sum(len(delta.logprobs or ()) for delta in deltas) == (12 if ids else 0)
