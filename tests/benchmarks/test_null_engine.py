"""The stand-in has vLLM's shapes: vLLM's own classes read them."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from benchmarks.null_engine import NullEngine

MESSAGES = [{"role": "user", "content": "Hello"}]


async def ask(path: str, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=NullEngine())
    async with httpx.AsyncClient(transport=transport, base_url="http://null") as client:
        return await client.post(
            path, json={"model": "m", "messages": MESSAGES, "prompt": "x", "max_tokens": 3, **body}
        )


def events(reply: httpx.Response) -> list[str]:
    found = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert found.pop() == "[DONE]"
    return found


@pytest.mark.parametrize(
    "usage", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
async def test_chat_chunks_are_vllms(usage: dict[str, bool]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse

    found = events(await ask("/v1/chat/completions", stream=True, stream_options=usage))
    chunks = [ChatCompletionStreamResponse.model_validate_json(event) for event in found]
    assert all(set(json.loads(event)) <= set(ChatCompletionStreamResponse.model_fields) for event in found)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.content for delta in deltas] == ["", " word", " word", " word"]
    assert deltas[0].role == "assistant"
    assert (chunks[-1].choices == []) == bool(usage)
    told = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert told == ([] if not usage else [3] if len(usage) == 1 else [0, 1, 2, 3, 3])


async def test_completion_chunks_are_vllms() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    found = events(await ask("/v1/completions", stream=True))
    chunks = [CompletionStreamResponse.model_validate_json(event) for event in found]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]


async def test_whole_replies_are_vllms() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    reply = ChatCompletionResponse.model_validate_json((await ask("/v1/chat/completions")).content)
    assert reply.usage.completion_tokens == 3
    assert (await ask("/v1/completions")).json()["choices"][0]["text"] == " word word word"


def _post(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.e2e
async def test_the_real_engines_chunks_have_the_same_fields(server: Any, client: httpx.Client) -> None:
    body = {"model": "synthia", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    real = [json.loads(event) for event in events(await asyncio.to_thread(_post, client, body))]
    null = [json.loads(event) for event in events(await ask("/v1/chat/completions", **body))]
    tokens = [
        [chunk for chunk in chunks if chunk["choices"] and chunk["usage"]["completion_tokens"]]
        for chunks in (real, null)
    ]
    if tokens[0]:  # the model may have ended at once
        assert list(tokens[1][0]) == list(tokens[0][0])
        assert list(tokens[1][0]["usage"]) == list(tokens[0][0]["usage"])
        assert tokens[1][0]["choices"][0].keys() == tokens[0][0]["choices"][0].keys() - {"stop_reason"}
