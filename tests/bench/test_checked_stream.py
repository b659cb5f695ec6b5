"""The checking client accepts what is whole and names what is not."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from synthia_vllm.bench.checked_stream import CHAT, COMPLETIONS, CheckedStream, numbered, run_stream
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.tokens import expected
from tests.gateway.live import serving

# The third token of what is asked for, and of something else.
OTHERS = [expected({"prompt": prompt}, 3)[2].encode() for prompt in ("What is an orca?", "What is an auk?")]


class Tampered:
    """A null engine, and someone who changes what it sends."""

    def __init__(self, change: Any) -> None:
        self._engine = NullEngine()
        self._change = change

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = 0

        async def tampering(message: Any) -> None:
            nonlocal number
            if message["type"] == "http.response.body":
                number += 1
                message = {**message, "body": self._change(number, message.get("body", b""))}
            await send(message)

        await self._engine(scope, receive, tampering)


def ask(app: Any, path: str = COMPLETIONS, **options: Any) -> CheckedStream:
    wanted = numbered(path, "What is an orca?", 6, return_token_ids=True, **options)
    with serving(app) as port:
        return asyncio.run(run_stream(f"http://127.0.0.1:{port}", wanted))


def test_a_whole_stream_is_whole() -> None:
    stream = ask(NullEngine())
    assert (stream.broken, stream.offending) == (None, b"")
    assert len(stream.times) == stream.tokens == 6


def test_a_chat_is_compared_without_outer_space() -> None:
    stream = ask(NullEngine(), CHAT)
    assert stream.broken is not None  # the engine alone strips nothing
    assert "belongs here" in stream.broken


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda number, body: b"" if number == 3 else body, "belongs here: tokens 2 to 2 are missing"),
        (lambda number, body: body * 2 if number == 3 else body, "belongs here: token 2 comes again"),
        (lambda number, body: body.replace(OTHERS[0], OTHERS[1]), "belongs here: this is another stream's"),
        (lambda number, body: body.replace(b'"text":" ', b'"text":" x'), "belongs here: this is no token"),
        (lambda number, body: b"" if number == 6 else body, "finish_reason missing"),
        (lambda number, body: body.replace(b'"id":"cmpl-', b'"id":"cmpl-1') if number == 4 else body, "another id"),
        (lambda number, body: body.replace(b"data: [DONE]\n\n", b""), "no [DONE]"),
        (lambda number, body: body.replace(b"[DONE]\n\n", b"[DONE]\n\ndata: [DONE]\n\n"), "after [DONE]"),
        (lambda number, body: body.replace(b'"completion_tokens":6', b'"completion_tokens":7'), "usage"),
        (lambda number, body: b'data: {"error":{"message":"x"}}\n\n' if number == 2 else body, "error in the stream"),
    ],
)
def test_what_is_wrong_is_named(change: Any, reason: str) -> None:
    stream = ask(Tampered(change))
    assert stream.broken is not None
    assert reason in stream.broken


def test_breaks_and_errors_are_broken() -> None:
    broken = ask(NullEngine(faults=Faults(break_after=3)))
    assert broken.broken is not None
    assert "ended before" in broken.broken
    assert ask(NullEngine(faults=Faults(status=503))).broken == "status 503"
    assert "usage" in (ask(NullEngine(faults=Faults(usage_lie=1))).broken or "")


def test_the_pause_that_spans_a_moment() -> None:
    async def look() -> list[float | None]:
        stream = CheckedStream(numbered(COMPLETIONS, "x", 4), "null")
        stream.times.extend([10.0, 10.5, 12.5, 13.0])
        return [stream.pause_at(moment) for moment in (9.0, 10.2, 11.0, 12.7, 14.0)]

    assert asyncio.run(look()) == [None, 2.0, 2.0, 0.5, None]
