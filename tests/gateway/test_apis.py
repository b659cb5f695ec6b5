"""What the API routes share: the model that is asked for, what goes to the engine, and whose event loop it is."""

import asyncio
import time
from typing import Any

import pytest

from benchmarks.null_port import NullEnginePort
from benchmarks.null_tokens import prompt_ids
from synthia_vllm.prompt import STOP_STRINGS
from synthia_vllm.settings import PromptSettings
from tests.gateway.asgi import Answer, post
from tests.gateway.stack import Stack
from tests.gateway.whole import BODIES, CHAT, COMPLETIONS, GENERATING, LENGTH, MESSAGES, RESPONSES

KEY = {"x-api-key": "sk-alice"}


async def send(stack: Stack, path: str, body: Any = None, **headers: str) -> Answer:
    return await post(stack.app, BODIES[path] if body is None else body, path=path, headers={**KEY, **headers})


@pytest.mark.parametrize("path", GENERATING)
async def test_the_engine_gets_the_cards_prompt_as_ids_and_its_stop_strings(path: str) -> None:
    engine = NullEnginePort()
    assert (await send(Stack(engine), path)).status == 200
    (generation,) = engine.seen
    if path == COMPLETIONS:
        assert generation.prompt == prompt_ids("Hello")
        assert generation.sampling.stop == ()
        assert generation.sampling.temperature == 1.0
    else:
        assert generation.prompt == prompt_ids("USER: Hello\nASSISTANT:")
        assert generation.sampling.stop == STOP_STRINGS
        assert generation.sampling.temperature == 0.75
    assert generation.sampling.max_tokens == 5


@pytest.mark.parametrize("path", GENERATING)
async def test_an_engine_without_a_tokenizer_gets_the_same_prompt_as_text(path: str) -> None:
    engine = NullEnginePort(tokenizer=None)
    stack = Stack(engine)
    assert (await send(stack, path)).status == 200
    (generation,) = engine.seen
    assert generation.prompt == ()
    assert generation.text == ("Hello" if path == COMPLETIONS else "USER: Hello\nASSISTANT:")
    assert stack.exchanges[0].usage.prompt == len(prompt_ids(generation.text))  # as the engine counts


@pytest.mark.parametrize("path", GENERATING)
async def test_a_request_without_a_model_is_for_the_first(path: str) -> None:
    stack = Stack(NullEnginePort(names=("own", "other")))
    assert (await send(stack, path, {**BODIES[path], "model": None})).status == 200
    assert (await send(stack, path, {**BODIES[path], "model": "other"})).status == 200
    assert (await send(stack, path, {**BODIES[path], "model": "third"})).status == 404
    assert [exchange.model for exchange in stack.exchanges] == ["own", "other", "third"]


@pytest.mark.parametrize("path", [path for path in BODIES if path not in GENERATING])
async def test_what_needs_no_engine_is_answered_without_one_and_is_no_request_for_tokens(path: str) -> None:
    engine = NullEnginePort()
    stack = Stack(engine)
    told = await send(stack, path)
    assert told.status == 200
    assert told.json()
    assert not engine.seen
    assert stack.exchanges[0].request is None


@pytest.mark.parametrize("path", BODIES)
async def test_a_key_for_one_model_opens_it_alone_on_every_route(path: str) -> None:
    stack = Stack(NullEnginePort())
    for model, status in (("synthia", 200), ("null", 403), ("synthia-tot", 403), ("none", 403)):
        found = await post(stack.app, {**BODIES[path], "model": model}, path=path, headers={"x-api-key": "sk-small"})
        assert found.status == status


async def test_the_settings_of_the_prompt_format_hold() -> None:
    engine = NullEnginePort()
    stack = Stack(engine, prompt=PromptSettings(role_markers="reject", turn_end="</s>"))
    told = await send(stack, CHAT, {**BODIES[CHAT], "messages": [{"role": "user", "content": "a\nASSISTANT: b"}]})
    assert told.status == 400
    assert told.json()["error"]["param"] == "messages[0].content"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert (await send(stack, CHAT, {**BODIES[CHAT], "messages": turns})).status == 200
    assert list(engine.seen[0].prompt) == prompt_ids("USER: a\nASSISTANT: b</s>\nUSER: c\nASSISTANT:")


@pytest.mark.parametrize("path", GENERATING)
async def test_a_clients_own_priority_is_not_the_engines(path: str) -> None:
    engine = NullEnginePort()
    body = {**BODIES[path], "priority": -5, "chat_template": "x", "chat_template_kwargs": {"bos_token": ""}}
    assert (await send(Stack(engine), path, body)).status == 200
    assert engine.seen[0].prompt == prompt_ids("Hello" if path == COMPLETIONS else "USER: Hello\nASSISTANT:")


@pytest.mark.parametrize("path", GENERATING)
async def test_a_session_goes_to_the_engine_and_users_are_kept_apart(path: str) -> None:
    engine = NullEnginePort()
    stack = Stack(engine)
    for key in ("sk-alice", "sk-alice", "sk-small"):
        await post(stack.app, BODIES[path], path=path, headers={"x-api-key": key, "x-session-id": "s"})
    keys = [generation.affinity.key for generation in engine.seen if generation.affinity is not None]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("path", GENERATING)
async def test_long_bodies_hold_up_nobody_else(path: str) -> None:
    """Rendering and tokenizing let go of the event loop; what is left is the reading of the JSON."""
    engine = NullEnginePort(context=8_000_000)
    stack = Stack(engine)
    field = {CHAT: "messages", MESSAGES: "messages", RESPONSES: "input", COMPLETIONS: "prompt"}[path]
    text = "word " * 400_000
    long = text if field in ("input", "prompt") else [{"role": "user", "content": text}]
    held = 0.0

    async def watch() -> None:
        nonlocal held
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            held = max(held, time.perf_counter() - before)

    watching = asyncio.create_task(watch())
    found = await send(stack, path, {**BODIES[path], field: long})
    watching.cancel()
    assert found.status == 200
    assert len(engine.seen[0].prompt) > 2_000_000
    took = stack.exchanges[0].usage.dispatched or 0.0
    assert held < max(0.3, 0.5 * (took - stack.exchanges[0].arrived))


@pytest.mark.parametrize("path", GENERATING)
async def test_whole_and_streamed_replies_are_billed_alike(path: str) -> None:
    stack = Stack(NullEnginePort())
    for streamed in (True, False):
        body = {**BODIES[path], LENGTH[path]: 50, "stream": streamed}
        assert (await send(stack, path, body)).status == 200
    streamed_usage, whole_usage = (exchange.usage for exchange in stack.exchanges)
    assert (streamed_usage.billed_prompt, streamed_usage.billed_generated) == (whole_usage.billed_prompt, 50)
    assert whole_usage.billed_generated == 50
