"""Numbered tokens: vLLM's shapes, and replies that any null engine can go on with."""

import json
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.tokens import expected, logprob_of, split, token_id
from tests.bench.null.test_engine import MESSAGES, ask, events

USAGE = {"include_usage": True, "continuous_usage_stats": True}
IDS = {"return_token_ids": True}


async def chat(**body: Any) -> list[dict[str, Any]]:
    reply = await ask("/v1/chat/completions", stream=True, **IDS, **body)
    return [json.loads(event) for event in events(reply)]


async def completion(engine: NullEngine | None = None, **body: Any) -> list[dict[str, Any]]:
    transport = httpx.ASGITransport(app=engine or NullEngine())
    async with httpx.AsyncClient(transport=transport, base_url="http://null") as client:
        reply = await client.post("/v1/completions", json={"model": "m", "stream": True, **IDS, **body})
    assert reply.status_code == 200, reply.text
    return [json.loads(event) for event in events(reply)]


async def test_chat_chunks_with_ids_are_vllms() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse

    found = await chat(stream_options=USAGE, logprobs=True, top_logprobs=0)
    chunks = [ChatCompletionStreamResponse.model_validate(chunk) for chunk in found]
    for sent, read in zip(found, chunks, strict=True):  # the order of fields too
        assert list(sent) == list(json.loads(read.model_dump_json(exclude_unset=True)))
        for choice, parsed in zip(sent["choices"], read.choices, strict=True):
            assert list(choice) == list(json.loads(parsed.model_dump_json(exclude_unset=True)))
    assert len(chunks[0].prompt_token_ids) == chunks[-1].usage.prompt_tokens
    assert all(chunk.prompt_token_ids is None for chunk in chunks[1:])
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-1]] == expected({"messages": MESSAGES}, 3)
    assert [chunk.usage.completion_tokens for chunk in chunks] == [0, 1, 2, 3, 3]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert chunks[2].choices[0].logprobs.content[0].logprob == logprob_of(1)


async def test_completion_chunks_with_ids_are_vllms() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    found = await completion(prompt="What is an orca?", max_tokens=3, stream_options=USAGE, logprobs=1)
    chunks = [CompletionStreamResponse.model_validate(chunk) for chunk in found]
    for sent, read in zip(found, chunks, strict=True):
        assert list(sent) == list(json.loads(read.model_dump_json(exclude_unset=True)))
        for choice, parsed in zip(sent["choices"], read.choices, strict=True):
            assert list(choice) == list(json.loads(parsed.model_dump_json(exclude_unset=True)))
    ids = [chunk.choices[0].prompt_token_ids for chunk in chunks[:-1]]
    assert ids[0]
    assert ids[1:] == [None, None]
    seed, _ = split(ids[0])
    assert [chunk.choices[0].token_ids for chunk in chunks[:-1]] == [[token_id(seed, at)] for at in range(3)]
    first = chunks[0].choices[0]
    assert chunks[1].choices[0].logprobs.text_offset == [len(first.text)]


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("began_as", ["chat", "completion"])
async def test_another_engine_goes_on_exactly(cut: int, began_as: str) -> None:
    whole: dict[str, Any] = {"prompt": "What is an orca?", "max_tokens": 5}
    begun = await (chat(max_tokens=5) if began_as == "chat" else completion(**whole))
    prompt = begun[0].get("prompt_token_ids") or begun[0]["choices"][0]["prompt_token_ids"]
    tokens = [token for chunk in begun for token in chunk["choices"][0].get("token_ids") or ()]
    other = NullEngine()
    rest = await completion(other, prompt=prompt + tokens[:cut], max_tokens=5 - cut, stream_options=USAGE)
    assert [token for chunk in rest[:-1] for token in chunk["choices"][0]["token_ids"]] == tokens[cut:]
    texts = [chunk["choices"][0].get("text") or chunk["choices"][0]["delta"]["content"] for chunk in begun if chunk]
    assert [chunk["choices"][0]["text"] for chunk in rest[:-1]] == [text for text in texts if text][cut:]
    assert rest[-1]["usage"]["prompt_tokens"] == len(prompt) + cut
    assert other.resumed == 1


async def test_a_wrong_seam_is_refused() -> None:
    begun = await completion(prompt="What is an orca?", max_tokens=4)
    prompt = begun[0]["choices"][0]["prompt_token_ids"]
    tokens = [token for chunk in begun for token in chunk["choices"][0]["token_ids"]]
    for wrong in (tokens[:2] + tokens[1:2], tokens[:1] + tokens[2:3], [token ^ 1 for token in tokens]):
        reply = await ask("/v1/completions", prompt=prompt + wrong, **IDS)
        assert reply.status_code == 400, wrong


async def test_whole_replies_with_ids_are_vllms() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    reply = ChatCompletionResponse.model_validate_json((await ask("/v1/chat/completions", **IDS)).content)
    assert reply.choices[0].message.content == "".join(expected({"messages": MESSAGES}, 3))
    assert len(reply.prompt_token_ids) == reply.usage.prompt_tokens
    assert len(reply.choices[0].token_ids) == 3
    other = CompletionResponse.model_validate_json((await ask("/v1/completions", logprobs=1, **IDS)).content)
    assert len(other.choices[0].token_ids) == len(other.choices[0].logprobs.tokens) == 3
    assert len(other.choices[0].prompt_token_ids) == other.usage.prompt_tokens
