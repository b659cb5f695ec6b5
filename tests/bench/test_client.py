"""What a request's client says of a server that is not well, over real HTTP."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from synthia_vllm.bench.client import Call, Client, Patience, Target
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.run_file import Request
from synthia_vllm.free_ports import free_port
from tests.gateway.live import serving

PATIENCE = Patience(first_s=0.3, between_s=0.3)
CALL = Call(8, prompt=list(range(1000, 1012)))


async def send(app: ASGIApp, call: Call = CALL) -> Request:
    with serving(app) as port:
        async with Client(Target(f"http://127.0.0.1:{port}", "null"), patience=PATIENCE) as client:
            return await client.send(call, start=time.perf_counter(), due_s=0.0)


@pytest.mark.parametrize("call", [CALL, Call(8, messages=({"role": "user", "content": "Hi"},)), Call(8, prompt="Hi")])
async def test_a_whole_reply_is_counted_token_by_token(call: Call) -> None:
    found = await send(NullEngine(tokens_per_second=200), call)
    assert found.error is None
    assert (found.output_tokens, found.seen_tokens, len(found.chunk_s)) == (8, 8, 8)
    assert found.sent_s < found.chunk_s[0] < found.chunk_s[-1] <= found.done_s


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        (Faults(status=500), "http 500"),
        (Faults(status=429), "http 429"),
        (Faults(break_after=4), "cut"),
        (Faults(end_after=4), "cut"),
        (Faults(stall_after=4), "stalled"),
        (Faults(hang=True), "stalled"),
        (Faults(usage_lie=3), "usage"),
        (Faults(usage_lie=-1), "usage"),
    ],
)
async def test_each_fault_has_its_name(faults: Faults, error: str) -> None:
    found = await send(NullEngine(faults=faults))
    assert found.error == error
    assert found.detail


async def test_what_came_before_a_fault_is_kept() -> None:
    found = await send(NullEngine(tokens_per_second=200, faults=Faults(stall_after=4)))
    assert len(found.chunk_s) == found.seen_tokens == 3


async def test_no_connection_is_an_error_like_any_other() -> None:
    async with Client(Target(f"http://127.0.0.1:{free_port()}", "null")) as client:
        found = await client.send(CALL, start=time.perf_counter(), due_s=0.0)
    assert (found.error, found.status) == ("connection", None)


def answering(*events: str) -> ASGIApp:
    async def completions(_: HttpRequest) -> Response:
        return Response("".join(f"data: {event}\n\n" for event in events), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


def usage(prompt: int, completion: int) -> str:
    return f'{{"choices":[],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{completion}}}}}'


def chunk(text: str, finish: str = "null") -> str:
    return f'{{"choices":[{{"index":0,"text":"{text}","finish_reason":{finish}}}]}}'


STOP = chunk("b", '"stop"')
LENGTH = chunk("", '"length"')


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ((chunk("a"), STOP, usage(12, 2), "[DONE]"), "short"),
        ((chunk("a"), "nonsense"), "malformed"),
        ((chunk("a"), '{"error":{"message":"out of memory"}}', "[DONE]"), "error event"),
        ((chunk("a"), STOP, "[DONE]"), "usage"),  # told none
        ((*[chunk("a")] * 8, LENGTH, usage(11, 8), "[DONE]"), "usage"),  # of the prompt
        ((*[chunk("a")] * 8, LENGTH, usage(12, 9), "[DONE]"), "usage"),  # more than was asked for
        ((*[chunk("a")] * 8, LENGTH, usage(12, 4), "[DONE]"), "usage"),  # fewer than there were chunks
        ((*[chunk("a")] * 8, usage(12, 8), "[DONE]"), "cut"),  # no finish_reason
        ((*[chunk("a")] * 8, LENGTH, usage(12, 8), "[DONE]"), None),  # llama.cpp's: no ids, an empty last chunk
    ],
)
async def test_replies_without_token_ids_are_judged_by_their_chunks(events: tuple[str, ...], error: str | None) -> None:
    found = await send(answering(*events))
    assert found.error == error
    assert found.seen_tokens is None


async def test_a_server_that_does_not_keep_its_connections_gets_new_ones() -> None:
    """As llama.cpp's: it promises to keep the connection and closes it."""
    events = [chunk("a")] * 8 + [LENGTH, usage(12, 8), "[DONE]"]
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    head = f"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client(Target(f"http://127.0.0.1:{port}", "null", keep_alive=False)) as client:
            found = [await client.send(CALL, start=time.perf_counter(), due_s=0.0) for _ in range(5)]
    assert [one.error for one in found] == [None] * 5
    assert connections == 5


async def test_a_user_with_a_key_shows_it() -> None:
    shown: list[str | None] = []

    def noting(engine: NullEngine) -> Callable[..., Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                shown.append(dict(scope["headers"]).get(b"authorization", b"").decode())
            await engine(scope, receive, send)

        return app

    with serving(noting(NullEngine())) as port:
        target = Target(f"http://127.0.0.1:{port}", "null", key="all", keys={"alice": "hers"})
        async with Client(target) as client:
            for call in (CALL, Call(1, prompt="Hi", user="alice"), Call(1, prompt="Hi", user="alice", key="given")):
                await client.send(call, start=time.perf_counter(), due_s=0.0)
    assert shown == ["Bearer all", "Bearer hers", "Bearer given"]
