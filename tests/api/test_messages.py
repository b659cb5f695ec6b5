"""Anthropic's messages API, read by the official package."""

import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.api.base import Model
from synthia_vllm.api.messages import CountTokens, Messages, MessagesRequest
from synthia_vllm.api.sampling import contract_stops
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import Overloaded, RequestError, SynthiaError
from synthia_vllm.prompt import STOP_STRINGS, SYSTEM_PROMPTS, clean
from tests.api.official import (
    CACHED,
    MODEL,
    bodies,
    broken,
    check_bounded_or_refused,
    events,
    generated,
    prepared,
    reply,
    said,
    scripts,
    strictly,
    transport,
)

API = Messages()
COUNT = CountTokens()
OWN = ("END", "\n\n")
USER = [{"role": "user", "content": "What is an orca?"}]
ASKED: dict[str, Any] = {"model": "synthia", "max_tokens": 64, "messages": USER}


def client(deltas: Sequence[Delta], error: SynthiaError | None = None) -> anthropic.Anthropic:
    http: Any = httpx2.Client(transport=transport(API, deltas, error=error))
    return anthropic.Anthropic(api_key="none", base_url="http://gateway", max_retries=0, http_client=http)


def whole(body: dict[str, Any], deltas: Sequence[Delta]) -> Message:
    return strictly(Message, json.loads(b"".join(reply(prepared(API, body), deltas))))


def streamed(body: dict[str, Any], deltas: Sequence[Delta]) -> list[Any]:
    out = b"".join(reply(prepared(API, {**body, "stream": True}), deltas))
    return [strictly(RawMessageStreamEvent, one) for one in events(out)]


def refused(body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as raised:
        prepared(API, {**ASKED, **body})
    return raised.value


def text_of(messages: list[dict[str, Any]], **fields: Any) -> str | None:
    """The prompt that the engine would get."""
    return prepared(API, {**ASKED, "messages": messages, **fields}).sequences[0].text


@given(deltas=scripts(OWN), own=st.sampled_from([[], list(OWN)]))
@settings(deadline=None)
def test_the_package_reads_every_reply_the_same_whole_and_streamed(deltas: list[Delta], own: list[str]) -> None:
    body = {**ASKED, "stop_sequences": own}
    told = whole(body, deltas)
    (block,) = told.content
    assert block.text == clean(generated(deltas), contract_stops(tuple(own)))
    assert (told.stop_reason == "stop_sequence") == (told.stop_sequence is not None)
    assert told.stop_sequence in (None, *own)
    assert told.usage.output_tokens == len(deltas)
    assert told.usage.cache_read_input_tokens == CACHED

    out = streamed(body, deltas)
    kinds = [one.type for one in out]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"content_block_delta"}
    assert "".join(one.delta.text for one in out[2:-3]) == block.text
    assert (out[-2].delta.stop_reason, out[-2].delta.stop_sequence) == (told.stop_reason, told.stop_sequence)
    assert out[-2].usage.model_dump(exclude_unset=True) == told.usage.model_dump(exclude_unset=True)
    assert (out[0].message.id, out[0].message.model) == (told.id, told.model)
    assert out[0].message.stop_reason is None


@given(deltas=scripts(OWN))
@settings(max_examples=30, deadline=None)
def test_the_packages_own_client_accumulates_the_same_message(deltas: list[Delta]) -> None:
    with client(deltas) as claude:
        told = claude.messages.create(**ASKED)
        with claude.messages.stream(**ASKED) as out:
            text = "".join(out.text_stream)
            final = out.get_final_message()
    assert text == told.content[0].text
    assert final.model_dump(exclude_none=True) == told.model_dump(exclude_none=True)


def test_all_of_the_prompt_is_in_the_usage_by_anthropics_sum() -> None:
    ready = prepared(API, ASKED)
    usage = whole(ASKED, said("x")).usage
    assert usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens == ready.prompt_tokens
    assert COUNT.answer(COUNT.decode(json.dumps(ASKED).encode()), MODEL) == b'{"input_tokens":%d}' % ready.prompt_tokens


@pytest.mark.parametrize(
    ("deltas", "told"),
    [
        (said("Hi"), ("end_turn", None)),
        (said("Hi", finish="length"), ("max_tokens", None)),
        (said("Hi", "\nUSER:", stop_reason="\nUSER:"), ("end_turn", None)),
        (said("Hi", "END", stop_reason="END"), ("stop_sequence", "END")),
        (said("Hi", stop_reason=2), ("end_turn", None)),
    ],
)
def test_why_a_message_ended(deltas: list[Delta], told: tuple[str, str | None]) -> None:
    message = whole({**ASKED, "stop_sequences": ["END"]}, deltas)
    assert (message.stop_reason, message.stop_sequence) == told
    assert message.content[0].text == "Hi"


def test_a_stop_string_of_the_contract_is_the_clients_where_it_asked_for_it() -> None:
    message = whole({**ASKED, "stop_sequences": ["\nUSER:"]}, said("Hi", "\nUSER:", stop_reason="\nUSER:"))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "\nUSER:")


def test_a_reply_without_text_has_one_empty_text() -> None:
    message = whole(ASKED, said(" \n"))
    assert [block.text for block in message.content] == [""]


def test_a_last_message_of_the_assistant_is_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "An orca is"}]
    assert text_of(messages) == "USER: What is an orca?\nASSISTANT: An orca is"
    assert whole({**ASKED, "messages": messages}, said(" a", " whale.", " ")).content[0].text == " a whale."
    out = streamed({**ASKED, "messages": messages}, said(" a", " whale."))
    assert "".join(one.delta.text for one in out[2:-3]) == " a whale."


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_an_empty_last_message_of_the_assistant_is_begun(answer: dict[str, Any]) -> None:
    messages = [*USER, {"role": "assistant", **answer}]
    assert text_of(messages) == "USER: What is an orca?\nASSISTANT:"
    assert whole({**ASKED, "messages": messages}, said(" A", " whale.")).content[0].text == "A whale."


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_an_assistant_message_without_content_is_an_empty_turn(answer: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}, {"role": "user", "content": "c"}]
    assert text_of(messages) == "USER: a\nASSISTANT:\nUSER: c\nASSISTANT:"


@pytest.mark.parametrize("last", [[], [{"role": "user", "content": "more"}]])
@pytest.mark.parametrize("said", [[], [{"type": "text", "text": "b"}]])
def test_the_reasoning_of_earlier_turns_is_left_out_of_the_prompt(said: list[Any], last: list[Any]) -> None:
    reasoning = [{"type": "thinking", "thinking": "x", "signature": "y"}, {"type": "redacted_thinking", "data": "z"}]

    def asked(content: list[Any]) -> dict[str, Any]:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}, *last]
        return {**ASKED, "messages": turns}

    (with_it,), (without,) = (prepared(API, asked(content)).sequences for content in ([*reasoning, *said], said))
    assert with_it.text == without.text
    assert with_it.affinity == without.affinity
    assert count(asked([*reasoning, *said])) == count(asked(said))


def test_a_user_has_no_reasoning() -> None:
    with pytest.raises(RequestError) as refused:
        prepared(API, {**ASKED, "messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]})
    assert refused.value.param == "messages[0].content[0]"


def test_several_parts_are_joined_by_a_newline() -> None:
    parts = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("a", "b")]
    assert text_of([{"role": "user", "content": parts}]) == "USER: a\nb\nASSISTANT:"


@pytest.mark.parametrize(
    ("system", "told"),
    [
        ("Be brief.", "SYSTEM: Be brief.\n"),
        ([{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}], "SYSTEM: Be\nbrief.\n"),
        (
            [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "A."}],
            "SYSTEM: A.\n",
        ),
        (None, ""),
        ("", ""),
        ([], ""),
    ],
)
def test_system_is_a_text_or_parts(system: Any, told: str) -> None:
    assert text_of([{"role": "user", "content": "a"}], system=system) == f"{told}USER: a\nASSISTANT:"


def test_the_alias_adds_its_preset_where_no_system_message_is_given() -> None:
    messages = [{"role": "user", "content": "a"}]
    preset = SYSTEM_PROMPTS["tot"]
    assert text_of(messages, model="synthia-tot") == f"SYSTEM: {preset}\nUSER: a\nASSISTANT:"
    assert text_of(messages, model="synthia-tot", system="A.") == "SYSTEM: A.\nUSER: a\nASSISTANT:"


@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("choice", [None, {"type": "auto"}, {"type": "none"}])
def test_no_tools_in_any_spelling(tools: Any, choice: Any) -> None:
    assert text_of([{"role": "user", "content": "a"}], tools=tools, tool_choice=choice) == "USER: a\nASSISTANT:"


def test_sampling_is_the_cards_where_nothing_is_given_and_the_clients_where_it_is() -> None:
    sampling = prepared(API, ASKED).sequences[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.75, 1.0, 50, 64)
    assert sampling.stop == STOP_STRINGS
    fields = {"temperature": 0, "top_p": 0.5, "top_k": 5, "stop_sequences": ["END"], "seed": 7}
    sampling = prepared(API, {**ASKED, **fields}).sequences[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 5, 7)
    assert sampling.stop == ("END", *STOP_STRINGS)


def test_a_json_schema_as_output_format_becomes_structured_outputs() -> None:
    schema = {"type": "object"}
    body = {**ASKED, "output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}}
    assert prepared(API, body).sequences[0].sampling.structured_outputs == {"json": schema}


def test_fields_of_other_routes_change_nothing() -> None:
    plain = prepared(API, ASKED)
    others = {"n": 3, "prompt_logprobs": 1, "stop": "x", "stream_options": {"include_usage": True}, "echo": True}
    ready = prepared(API, {**ASKED, **others, "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}})
    assert ready.sequences[0].sampling == plain.sequences[0].sampling
    assert len(ready.sequences) == 1


def test_the_generation_is_the_askers() -> None:
    (generation,) = prepared(API, ASKED).sequences
    assert (generation.id, generation.model) == ("1f", "synthia")
    assert generation.affinity is not None
    assert API.decode(b'{"max_tokens":1,"messages":[{"role":"user"}]}').model is None


BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "4000"}, "max_tokens"),
    ({"max_tokens": 4000.0}, "max_tokens"),
    ({"max_tokens": 10**18}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"temperature": -1}, "temperature"),
    ({"top_k": "5"}, "top_k"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image", "source": {}}]}, "system[0]"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"tools": [{"name": "x", "input_schema": {}}]}, "tools"),
    ({"tools": 5}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x" * 1500]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input_is_an_error_that_names_the_field(body: dict[str, Any], param: str) -> None:
    error = refused(body)
    assert error.status == 400
    assert error.param == param
    assert error.message


def test_max_tokens_is_required() -> None:
    with pytest.raises(RequestError) as raised:
        API.decode(b'{"messages":[{"role":"user","content":"x"}]}')
    assert raised.value.param == "max_tokens"


@pytest.mark.parametrize(("body", "param"), BAD)
def test_every_refusal_has_anthropics_form_and_name(body: dict[str, Any], param: str) -> None:
    strictly(ErrorResponse, API.form(refused(body), "req_1"))
    with client(()) as claude, pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(**ASKED, extra_body=body)
    assert raised.value.type == "invalid_request_error"
    assert raised.value.body["type"] == "error"


def test_what_is_not_json_is_refused_in_the_same_form() -> None:
    for body in (b"", b"x", b"[]", b'{"a":"\xff"}', b"[" * 100_000, b'{"messages":' + b"[" * 100_000):
        for api in (API, COUNT):
            with pytest.raises(RequestError) as raised:
                api.decode(body)
            told = api.form(raised.value, "")
            assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize("deltas", [(), said("Hi", " there")])
@pytest.mark.parametrize(
    ("error", "name"),
    [(broken(), "api_error"), (Overloaded("too much", 2), "overloaded_error"), (SynthiaError("secret"), "api_error")],
)
def test_an_error_in_a_stream_is_anthropics(deltas: Sequence[Delta], error: SynthiaError, name: str) -> None:
    ready = prepared(API, {**ASKED, "stream": True})
    told = events(b"".join([*reply(ready, deltas, error)]))[-1]
    strictly(ErrorResponse, told)
    assert told["error"]["type"] == name
    assert "secret" not in str(told)
    with (
        client(deltas, error) as claude,
        pytest.raises(anthropic.APIStatusError) as raised,
        claude.messages.stream(**ASKED) as out,
    ):
        list(out)
    assert raised.value.type == name


def test_role_markers_are_refused_by_name_where_the_policy_says_so() -> None:
    strict = Model(names=MODEL.names, context=4096, role_markers="reject")
    with pytest.raises(RequestError) as raised:
        prepared(API, {**ASKED, "system": "fine", "messages": [{"role": "user", "content": "a USER: b"}]}, strict)
    assert raised.value.param == "messages[0].content"


@given(bodies(ASKED, [*MessagesRequest.__struct_fields__, "metadata"]))
@settings(max_examples=400, deadline=None)
def test_anything_in_any_field_is_a_bounded_request_or_refused(body: dict[str, Any]) -> None:
    check_bounded_or_refused(API, body)


def count(body: dict[str, Any]) -> int:
    answer = COUNT.answer(COUNT.decode(json.dumps(body).encode()), MODEL)
    found: int = strictly(MessageTokensCount, json.loads(answer)).input_tokens
    return found


@pytest.mark.parametrize(
    "body",
    [
        {"messages": USER},
        {"messages": USER, "system": "Be brief.", "tools": []},
        {"messages": USER, "model": "synthia-tot"},
        {"messages": [*USER, {"role": "assistant", "content": "An orca is"}]},
    ],
)
def test_the_tokens_counted_are_those_of_the_prompt(body: dict[str, Any]) -> None:
    assert count(body) == prepared(API, {**body, "max_tokens": 1}).prompt_tokens
    assert COUNT.decode(json.dumps(body).encode()).model == body.get("model")


@given(bodies({"messages": USER}, ["messages", "system", "model", "tools", "tool_choice", "thinking"]))
@settings(max_examples=200, deadline=None)
def test_anything_can_be_asked_to_be_counted(body: dict[str, Any]) -> None:
    try:
        assert count(body) > 0
    except RequestError as error:
        strictly(ErrorResponse, COUNT.form(error, ""))
