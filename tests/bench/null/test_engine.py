"""The stand-in has vLLM's shapes: vLLM's own classes read them."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.tokens import VOCABULARY, expected
from synthia_vllm.engine.tokenizer import Tokenizer
from tests.running import null_engine

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
async def test_the_real_engines_chunks_have_the_same_fields(server: Any) -> None:
    body = {"model": "synthia", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    with httpx.Client(base_url=server.vllm, timeout=120) as vllm:
        real = [json.loads(event) for event in events(await asyncio.to_thread(_post, vllm, body))]
    null = [json.loads(event) for event in events(await ask("/v1/chat/completions", **body))]
    tokens = [
        [chunk for chunk in chunks if chunk["choices"] and chunk["usage"]["completion_tokens"]]
        for chunks in (real, null)
    ]
    if tokens[0]:  # the model may have ended at once
        assert list(tokens[1][0]) == list(tokens[0][0])
        assert list(tokens[1][0]["usage"]) == list(tokens[0][0]["usage"])
        assert tokens[1][0]["choices"][0].keys() == tokens[0][0]["choices"][0].keys() - {"stop_reason"}


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "synthia_vllm.bench.null.engine", *words], capture_output=True, text=True, check=False
    )


def test_the_command_writes_the_tokenizer(tmp_path: Path) -> None:
    done = run("--tokenizer-folder", str(tmp_path / "null"))
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "null"))
    assert Tokenizer.load(tmp_path / "null").size == VOCABULARY
    assert run().returncode == 2


def test_the_commands_options_reach_the_engine(tmp_path: Path) -> None:
    options = ["--no-generate-route", "--numbered", "--reply-tokens", "2", "--sse", "crlf", "--max-num-seqs", "1"]
    engine = null_engine(tmp_path / "log", *options).start()
    try:
        assert httpx.post(f"{engine.url}/inference/v1/generate", json={}).status_code == 404
        body = {"prompt": "What is an orca?", "max_tokens": 9, "stream": True}
        lines = httpx.post(f"{engine.url}/v1/completions", json=body).content.split(b"\r\n\r\n")
        said = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith(b"data: {")]
        assert [choice["text"] for choice in said] == [*expected(body, 2), ""]
        assert [choice["finish_reason"] for choice in said] == [None, None, "stop"]
    finally:
        engine.stop()


@pytest.mark.parametrize("messages", [[{"role": "robot", "content": "x"}], "text", [1], None])
async def test_messages_that_can_not_be_rendered_are_a_400(messages: Any) -> None:
    assert (await ask("/v1/chat/completions", messages=messages)).status_code == 400
