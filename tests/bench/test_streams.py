"""The speed scripts' client: it counts tokens exactly, and a stream that breaks is no figure."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

import click
import pytest

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.streams import GENERATE, Stream, chat, first_tokens, for_seconds, load, post, processor_seconds
from tests.gateway.live import serving

Respond = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def test_all_tokens_of_all_streams_are_counted() -> None:
    with serving(NullEngine()) as port:
        clients = [[chat("null", 30 + at), chat("null", 5)] for at in range(8)]
        found = await load(port, clients, spread=0.01)
    assert found.tokens == sum(30 + at + 5 for at in range(8))
    assert len(found.first) == 16
    assert 0 < max(found.first) <= found.seconds


async def test_what_a_gateway_asks_an_engine_is_counted_as_well() -> None:
    asked = {"token_ids": [1, 40], "sampling_params": {"max_tokens": 70}, "stream": True}
    request = post(GENERATE, {**asked, "stream_options": {"include_usage": True}}, {})
    with serving(NullEngine()) as port:
        assert (await load(port, [[request]])).tokens == 70


async def test_the_first_token_is_not_the_role_before_it() -> None:
    with serving(NullEngine(prefill_s=0.2)) as port:
        found = await first_tokens({"null": port}, lambda: chat("null", 2), 2)
    assert len(found["null"]) == 2
    assert min(found["null"]) >= 0.2


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\nyour limit", "your limit"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"a": 1}\n\n', "connection was closed"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\ndata: [DONE]\n\n", "no usage"),
    ],
)
async def test_a_stream_that_breaks_ends_the_load(sent: bytes, told: str) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        with pytest.raises(click.ClickException, match=told):
            await load(server.sockets[0].getsockname()[1], [[chat("null", 5)]])


async def test_an_end_that_comes_in_pieces_is_found() -> None:
    whole = b'HTTP/1.1 200 OK\r\n\r\ndata: {}\n\ndata: {"usage":{"completion_tokens":12}}\n\ndata: [DONE]\n\n'

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for at in range(0, len(whole), 7):
            writer.write(whole[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        assert (await load(server.sockets[0].getsockname()[1], [[chat("null", 5)]])).tokens == 12


def test_a_client_sends_for_so_long() -> None:
    assert list(for_seconds(0.0, b"x")) == []
    began = time.monotonic()
    count = sum(1 for _ in for_seconds(0.05, b"x"))
    assert count > 0
    assert time.monotonic() - began < 1


def test_processor_time_is_that_of_the_process() -> None:
    before = processor_seconds(os.getpid())
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert processor_seconds(os.getpid(), family=True) - before >= 0.05


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b'"delta":{"role":"assistant","content":""}', False),
        (b'"content":"\\n\\n"', False),
        (b'"text":" "', False),
        (b'"content": " \\n An"', True),
        (b'"content":"\\u00e9"', True),
        (b'"content":"\\"x"', True),
        (b'"token_ids":[5]', True),
        (b'"token_ids":[]', False),
    ],
)
async def test_white_space_that_others_send_is_no_first_token(sent: bytes, text: bool) -> None:
    stream = Stream(b"")
    stream.data_received(b'data: {"choices":[{' + sent + b"}]}\n\n")
    assert stream.first.done() is text
