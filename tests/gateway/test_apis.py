"""What the API routes share: the model that is asked for, what goes to the engine, and whose event loop it is."""

import asyncio
import json
import time
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import ModelInfo
from anthropic.types.shared import ErrorResponse

from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.bench.null.tokens import prompt_ids
from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.access import Access
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.apis import Apis
from synthia_vllm.gateway.app import METHODS
from synthia_vllm.gateway.edge.routes import Routes
from synthia_vllm.gateway.meter import Meter
from synthia_vllm.gateway.sequences import Sequences
from synthia_vllm.prompt import STOP_STRINGS
from synthia_vllm.settings import PromptSettings
from tests.api.official import strictly
from tests.gateway.asgi import Answer, ask, post
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
            before = time.thread_time()  # a machine that stands still holds up nobody
            await asyncio.sleep(0.001)
            held = max(held, time.thread_time() - before)

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


SCHEMA = {"type": "object"}
REFUSED_BY_XGRAMMAR = (
    "Failed to transform json schema into a grammar: "
    "[03:54:30] /project/cpp/regex_converter.cc:83: The parenthesis is not closed.\n"
)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("path", "asked", "field"),
    [
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
         "response_format"),
        (CHAT, {"structured_outputs": {"json": SCHEMA}}, "structured_outputs"),
        (CHAT, {"response_format": {"type": "text"}, "structured_outputs": {"json": SCHEMA}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "output_config.format"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}, "text.format"),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("engines", [None, "structured_outputs", "response_format.json_schema"])
async def test_a_grammar_that_the_engine_refuses_names_the_clients_field_and_no_internals(
    path: str, asked: dict[str, Any], field: str, streamed: bool, engines: str | None
) -> None:
    engine = NullEnginePort(error=RequestError(REFUSED_BY_XGRAMMAR, param=engines))
    told = await send(Stack(engine), path, {**BODIES[path], **asked, "stream": streamed})
    assert told.status == 400
    error = told.json()["error"]
    reason = "Failed to transform json schema into a grammar: The parenthesis is not closed."
    assert error["message"] == f"{field}: {reason}"
    assert error.get("param") == (None if path == MESSAGES else field)


async def test_what_the_engine_refuses_for_another_reason_keeps_its_field() -> None:
    engine = NullEnginePort(error=RequestError("too long", param="prompt"))
    told = await send(Stack(engine), CHAT, {**BODIES[CHAT], "structured_outputs": {"json": SCHEMA}})
    assert (told.status, told.json()["error"]["param"], told.json()["error"]["message"]) == (400, "prompt", "too long")


@pytest.mark.parametrize(
    "schema",
    [{"not": {}}, {"const": 10**30}, {"description": "x" * 300_000}, json.loads('{"items":' * 70 + "{}" + "}" * 70)],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
async def test_a_schema_that_is_refused_here_names_the_clients_field(path: str, schema: dict[str, Any]) -> None:
    wanted, field = {
        MESSAGES: ({"output_config": {"format": {"type": "json_schema", "schema": schema}}}, "output_config.format"),
        RESPONSES: ({"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}, "text.format"),
    }.get(
        path,
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
            "response_format",
        ),
    )
    told = await send(Stack(NullEnginePort()), path, {**BODIES[path], **wanted})
    assert told.status == 400
    error = told.json()["error"]
    assert error["message"].startswith(field)
    assert error.get("param") == (None if path == MESSAGES else field)


@pytest.mark.parametrize(
    "given", ["1_0", "1__0", "_1", "", " ", "0", "-1", "nan", "inf", "infinity", "1e999", "0x1", "1,5"]
)
async def test_a_queue_timeout_that_is_no_number_over_0_is_refused(given: str) -> None:
    told = await send(Stack(NullEnginePort()), CHAT, **{"x-queue-timeout-s": given})
    assert (told.status, told.json()["error"]["param"]) == (400, "X-Queue-Timeout-S")


@pytest.mark.parametrize(("given", "seconds"), [("1", 1.0), ("0.5", 0.5), (".5", 0.5), ("1e1", 10.0)])
async def test_a_queue_timeout_is_a_number_of_seconds(given: str, seconds: float) -> None:
    stack = Stack(NullEnginePort())
    assert (await send(stack, CHAT, **{"x-queue-timeout-s": given})).status == 200
    request = stack.exchanges[0].request
    assert request is not None
    assert request.queue_timeout == seconds


def models_client(engine: NullEnginePort, account: Account | None) -> anthropic.Anthropic:
    """Anthropic's own, with a key that is this account's; None: that opens nothing."""

    async def lookup(key: str) -> Account | None:
        return account

    access = Access(Apis(engine, Sequences(Meter(engine)), PromptSettings()), lookup=lookup, keys_required=True)
    app = Routes(access, methods=METHODS)

    def answer(request: httpx2.Request) -> httpx2.Response:
        told = asyncio.run(ask(app, request.method, request.url.path, headers=dict(request.headers)))
        return httpx2.Response(told.status, headers=list(told.headers.items()), content=told.body)

    http: Any = httpx2.Client(transport=httpx2.MockTransport(answer))
    return anthropic.Anthropic(api_key="none", base_url="http://gateway", max_retries=0, http_client=http)


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, ["null", "synthia", "synthia-tot"]),
        (frozenset({"synthia"}), ["synthia"]),
        (frozenset({"other"}), []),
    ],
)
def test_anthropics_client_reads_the_models(allowed: frozenset[str] | None, names: list[str]) -> None:
    client = models_client(NullEnginePort(context=64), Account("ann", models=allowed))
    page = client.models.with_raw_response.list().json()
    assert {name: page[name] for name in page if name != "data"} == {
        "has_more": False,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
    }
    told = [strictly(ModelInfo, one) for one in page["data"]]
    assert [(one.id, one.display_name, one.max_input_tokens) for one in told] == [(name, name, 64) for name in names]
    assert [one.id for one in client.models.list()] == names
    for name in names:
        assert strictly(ModelInfo, client.models.with_raw_response.retrieve(name).json()) in told


def test_anthropics_client_reads_what_is_wrong_with_a_model() -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        models_client(NullEnginePort(), Account("ann")).models.retrieve("none")
    assert strictly(ErrorResponse, unknown.value.body).error.type == "not_found_error"
    with pytest.raises(anthropic.InternalServerError) as lost:
        models_client(NullEnginePort(faults=Faults(dead=True)), Account("ann")).models.list()
    assert strictly(ErrorResponse, lost.value.body).error.type == "api_error"


@pytest.mark.parametrize(
    ("account", "kind", "name"),
    [
        (None, anthropic.AuthenticationError, "authentication_error"),
        (Account("root", admin=True), anthropic.PermissionDeniedError, "permission_error"),
    ],
)
def test_anthropics_client_reads_why_its_key_opens_no_models(
    account: Account | None, kind: type[anthropic.APIStatusError], name: str
) -> None:
    client = models_client(NullEnginePort(), account)
    for asked in (client.models.list, lambda: client.models.retrieve("synthia")):
        with pytest.raises(kind) as refused:
            asked()
        told = strictly(ErrorResponse, refused.value.body)
        assert (told.type, told.error.type) == ("error", name)


def test_anthropics_client_reads_that_models_are_not_deleted() -> None:
    with pytest.raises(anthropic.APIStatusError) as refused:
        models_client(NullEnginePort(), Account("ann")).delete("/v1/models/synthia", cast_to=object)
    assert refused.value.status_code == 405
    assert strictly(ErrorResponse, refused.value.body).error.type == "invalid_request_error"
