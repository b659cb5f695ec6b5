from typing import Any

import msgspec
import pytest
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from tests.gateway.stack import ScriptedEngine, Stack

CHAT = {"model": "synthia", "messages": [{"role": "user", "content": "Hello"}]}


async def stream(stack: Stack, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
    async with stack.client() as client:
        reply = await client.post(path, json={**CHAT, "stream": True, **body})
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [msgspec.json.decode(event) for event in events]


async def test_the_client_sees_no_usage_that_it_did_not_ask_for() -> None:
    stack = Stack(ScriptedEngine("Hel", "lo"))
    chunks = await stream(stack)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["Hel", "lo"]
    assert not any("usage" in chunk for chunk in chunks)
    assert (stack.calls[0].prompt_tokens, stack.calls[0].generated) == (7, 2)
    assert stack.calls[0].completed


async def test_usage_at_the_end_is_passed_to_who_asked_for_it() -> None:
    chunks = await stream(Stack(ScriptedEngine()), stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert not any("usage" in chunk for chunk in chunks[:-1])


async def test_usage_in_each_chunk_is_passed_to_who_asked_for_it() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(Stack(ScriptedEngine()), stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


async def test_a_whole_reply_tells_at_its_end() -> None:
    stack = Stack(ScriptedEngine("a", "b", "c"))
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=CHAT)
    assert (stack.calls[0].billed_prompt, stack.calls[0].billed_generated) == (7, 3)


async def test_what_is_said_is_not_taken_for_usage() -> None:
    text = ',"usage":{"prompt_tokens":1,"total_tokens":1,"completion_tokens":999}}'
    stack = Stack(ScriptedEngine(text, "x"))
    chunks = await stream(stack)
    assert chunks[0]["choices"][0]["delta"]["content"] == text
    assert stack.calls[0].generated == 2


class Foreign(ScriptedEngine):
    """An engine that knows nothing of usage while streaming, and cuts its chunks anywhere."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self.pieces = pieces

    def answer(self, request: dict[str, Any], path: str) -> ASGIApp:
        async def events() -> Any:
            for piece in self.pieces:
                yield piece

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_chunks_are_counted_where_the_engine_does_not_tell(size: int) -> None:
    chunks = [b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n']
    chunks += [b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'] * 3
    text = b"".join(chunks) + b"data: [DONE]\n\n"
    stack = Stack(Foreign([text[at : at + size] for at in range(0, len(text), size)]))
    got = await stream(stack)
    assert stack.calls[0].generated == 3
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in got) == "aaa"


async def test_several_choices_are_summed() -> None:
    def chunk(index: int, count: int) -> bytes:
        usage = {"prompt_tokens": 5, "total_tokens": 5 + count, "completion_tokens": count}
        return b"data: " + msgspec.json.encode({"choices": [{"index": index, "text": "a"}], "usage": usage}) + b"\n\n"

    pieces = [chunk(0, 1), chunk(1, 1), chunk(0, 2), chunk(1, 2), chunk(1, 3), b"data: [DONE]\n\n"]
    stack = Stack(Foreign(pieces))
    got = await stream(stack, "/v1/completions", prompt="x", n=2)
    assert stack.calls[0].generated == 5
    assert not any("usage" in one for one in got)


async def test_the_body_goes_upstream_as_the_client_sent_it() -> None:
    engine = ScriptedEngine()
    body = b'{"model": "synthia",  "prompt": "x", "temperature": 1.0}'
    async with Stack(engine).client() as client:
        await client.post("/v1/completions", content=body)
    assert engine.bodies == [body]


async def test_a_clients_priority_is_dropped() -> None:
    engine = ScriptedEngine()
    async with Stack(engine).client() as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            await client.post(path, json={**CHAT, "prompt": "x", "priority": -9})
    assert not any("priority" in seen for seen in engine.seen)


async def test_the_events_of_the_other_apis_pass_whole() -> None:
    usage = b'"usage":{"input_tokens":4,"output_tokens":2}'
    data = b'{"type":"response.completed","sequence_number":0,"response":{"id":"1",' + usage + b"}}"
    pieces = [b"event: response.completed\ndata: " + data + b"\n\n"]
    stack = Stack(Foreign(pieces))
    async with stack.client() as client:
        reply = await client.post("/v1/responses", json={"model": "synthia", "input": "x", "stream": True})
    assert "response.completed" in reply.text
    assert (stack.calls[0].prompt_tokens, stack.calls[0].generated) == (4, 2)
