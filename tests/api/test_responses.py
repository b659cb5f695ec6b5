"""OpenAI's responses API, read by the official package."""

import json
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

from synthia_vllm.api.base import Model
from synthia_vllm.api.responses import Responses, ResponsesRequest
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
    position,
    prepared,
    reply,
    said,
    scripts,
    strictly,
    transport,
)

API = Responses()
OWN = ("END", "\n\n")
ASKED: dict[str, Any] = {"model": "synthia", "input": "What is an orca?"}


def client(deltas: Sequence[Delta], error: SynthiaError | None = None, model: Model = MODEL) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="none",
        base_url="http://gateway/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=transport(API, deltas, error=error, model=model)),
    )


def whole(body: dict[str, Any], deltas: Sequence[Delta]) -> Response:
    out = b"".join(reply(prepared(API, body), deltas))
    read: Response = strictly(Response, json.loads(out))
    return read


def streamed(body: dict[str, Any], deltas: Sequence[Delta], error: SynthiaError | None = None) -> list[Any]:
    out = b"".join(reply(prepared(API, {**body, "stream": True}), deltas, error))
    read = [strictly(ResponseStreamEvent, one) for one in events(out)]
    assert [one.sequence_number for one in read] == list(range(len(read)))
    return read


def refused(body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as raised:
        prepared(API, {**ASKED, **body})
    return raised.value


def text_of(body: dict[str, Any]) -> str | None:
    """The prompt that the engine would get."""
    return prepared(API, {"model": "synthia", **body}).sequences[0].text


@given(deltas=scripts(OWN), own=st.sampled_from([[], list(OWN)]), include=st.booleans())
@settings(deadline=None)
def test_the_package_reads_every_reply_the_same_whole_and_streamed(
    deltas: list[Delta], own: list[str], include: bool
) -> None:
    body = {**ASKED, "stop": own, "include_stop_str_in_output": include}
    told = whole(body, deltas)
    assert told.output_text == clean(generated(deltas), STOP_STRINGS if include else contract_stops(tuple(own)))
    assert told.usage is not None
    assert told.usage.input_tokens_details.cached_tokens == CACHED
    assert told.usage.output_tokens == len(deltas)
    assert told.usage.total_tokens == told.usage.input_tokens + len(deltas)

    out = streamed(body, deltas)
    kinds = [one.type.removeprefix("response.") for one in out]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", told.status]
    middle = kinds[len(begin) : -len(end)]
    assert kinds == [*begin, *middle, *end]
    assert set(middle) <= {"output_text.delta"}
    assert "".join(one.delta for one in out if one.type == "response.output_text.delta") == told.output_text
    assert out[-1].response == told
    assert out[-2].item == told.output[0]
    assert out[-3].part == told.output[0].content[0]
    assert out[-4].text == told.output_text
    assert {getattr(one, "item_id", None) or getattr(getattr(one, "item", None), "id", None) for one in out} == {
        None,
        told.output[0].id,
    }


@given(deltas=scripts(OWN))
@settings(max_examples=30, deadline=None)
def test_the_packages_own_client_accumulates_the_same_text(deltas: list[Delta]) -> None:
    with client(deltas) as oai:
        told = oai.responses.create(**ASKED)
        text = ""
        last: Any = None
        with oai.responses.stream(**ASKED) as out:
            for one in out:
                last = one
                if one.type == "response.output_text.delta":
                    text += one.delta
                    assert one.snapshot == text
    assert text == told.output_text == last.response.output_text
    assert last.type == f"response.{told.status}"


def test_a_reply_that_is_cut_by_its_length_is_incomplete() -> None:
    told = whole({**ASKED, "max_output_tokens": 2}, said("An", " orca", finish="length"))
    assert told.status == "incomplete"
    assert told.incomplete_details is not None
    assert told.incomplete_details.reason == "max_output_tokens"
    assert told.output[0].status == "incomplete"
    assert told.max_output_tokens == 2


def test_a_stop_string_that_the_engine_ran_over_still_completes_the_reply() -> None:
    told = whole(ASKED, said("Hi", "\nUSER:", " more", finish="length"))
    assert told.status == "completed"
    assert told.output_text == "Hi"


def test_what_was_asked_is_told_again() -> None:
    told = whole(
        {**ASKED, "instructions": "Be brief.", "metadata": {"run": "7"}, "temperature": 0.5, "user": "ann"}, said("x")
    )
    assert (told.instructions, told.metadata, told.temperature, told.user) == ("Be brief.", {"run": "7"}, 0.5, "ann")
    assert (told.top_p, told.max_output_tokens, told.model) == (1.0, 1024, MODEL.names[0])
    assert told.created_at == 1_764_000_000


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_come_where_they_are_included(top: int) -> None:
    body = {**ASKED, "include": ["message.output_text.logprobs"], "top_logprobs": top}
    deltas = [
        Delta([5], "Hi", logprobs=[position("Hi", top=top)]),
        Delta([6], " é", logprobs=[position(" é", float("-inf"), top)]),
        Delta([7], "\nUSER:", "stop", "\nUSER:", [position("\nUSER:", top=top)]),
    ]
    assert prepared(API, body).sequences[0].sampling.logprobs == top
    part = whole(body, deltas).output[0].content[0]
    assert [one.token for one in part.logprobs or ()] == ["Hi", " é"]
    assert part.logprobs[1].logprob == -9999.0
    assert part.logprobs[1].bytes == list(" é".encode())
    assert [len(one.top_logprobs) for one in part.logprobs] == [top, top]
    out = streamed(body, deltas)
    sent = [one.token for each in out if each.type == "response.output_text.delta" for one in each.logprobs]
    assert sent == ["Hi", " é"]
    assert [one.token for one in out[-4].logprobs] == sent
    assert out[-3].part == part


def test_without_the_include_there_are_no_logprobs() -> None:
    assert prepared(API, {**ASKED, "top_logprobs": 5}).sequences[0].sampling.logprobs is None


def test_an_error_in_the_middle_of_a_stream_is_told_and_fails_the_response() -> None:
    out = streamed(ASKED, said("Hi", " there"), broken())
    assert [one.type for one in out[-2:]] == ["error", "response.failed"]
    assert (out[-2].code, out[-2].message, out[-2].param) == ("upstream_lost", "the engine broke off", None)
    assert out[-1].response.status == "failed"
    assert out[-1].response.error.code == "server_error"


def test_an_error_before_the_first_token_of_a_stream_is_one_event() -> None:
    (only,) = streamed(ASKED, (), Overloaded("too much", 2))
    assert (only.type, only.code) == ("error", "overloaded")


def test_an_error_of_ours_tells_no_details() -> None:
    out = streamed(ASKED, said("Hi"), SynthiaError("secret"))
    assert "secret" not in str(out)
    assert out[-2].code == "internal_error"


def test_the_package_sees_an_error_in_the_middle_of_a_stream() -> None:
    with client(said("Hi"), broken()) as oai, oai.responses.stream(**ASKED) as out:
        assert [one.type for one in out][-2:] == ["error", "response.failed"]


def test_the_package_raises_what_is_refused() -> None:
    with client(()) as oai, pytest.raises(openai.BadRequestError) as raised:
        oai.responses.create(**ASKED, temperature=7)
    assert raised.value.param == "temperature"


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ("Hi", "USER: Hi"),
        ([{"role": "user", "content": "Hi"}], "USER: Hi"),
        ([{"type": "message", "role": "user", "content": "Hi"}], "USER: Hi"),
        (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "SYSTEM: Be brief.\nUSER: Hi",
        ),
    ],
)
def test_input_is_a_text_or_messages(given: Any, turns: str) -> None:
    assert text_of({"input": given}) == f"{turns}\nASSISTANT:"


def test_instructions_go_before_the_inputs_own_system_message() -> None:
    messages = [{"role": "system", "content": "In French."}, {"role": "user", "content": "Hi"}]
    text = text_of({"instructions": "Be brief.", "input": messages})
    assert text == "SYSTEM: Be brief.\nIn French.\nUSER: Hi\nASSISTANT:"


def test_the_alias_adds_its_preset_where_no_system_message_is_given() -> None:
    asked = {"model": "synthia-tot", "input": "Hi"}
    assert text_of(asked) == f"SYSTEM: {SYSTEM_PROMPTS['tot']}\nUSER: Hi\nASSISTANT:"
    assert text_of({**asked, "instructions": "Be brief."}) == "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT:"


def history(answer: dict[str, Any]) -> str | None:
    return text_of({"input": [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "c"}]})


def test_an_assistant_item_with_output_text_parts_and_no_type_is_taken_whole() -> None:
    parts = [{"type": "output_text", "text": "b", "annotations": []}]
    answer = {"id": "msg_1", "role": "assistant", "status": "completed", "content": parts}
    assert history(answer) == "USER: a\nASSISTANT: b\nUSER: c\nASSISTANT:"


def test_several_parts_are_joined_by_a_newline() -> None:
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": text} for text in ("b", "d")]}
    assert history(answer) == "USER: a\nASSISTANT: b\nd\nUSER: c\nASSISTANT:"


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_an_assistant_message_without_content_is_an_empty_turn(answer: dict[str, Any]) -> None:
    assert history({"role": "assistant", **answer}) == "USER: a\nASSISTANT:\nUSER: c\nASSISTANT:"


def test_the_packages_own_output_is_a_history() -> None:
    told = whole(ASKED, said("b"))
    answer = told.output[0].model_dump(mode="json")
    assert history(answer) == "USER: a\nASSISTANT: b\nUSER: c\nASSISTANT:"


def test_an_unfinished_answer_at_the_end_is_continued_as_vllm_does_it() -> None:
    answer = {"role": "assistant", "content": "An orca", "status": "incomplete"}
    body = {"model": "synthia", "input": [{"role": "user", "content": "a"}, answer]}
    assert text_of(body) == "USER: a\nASSISTANT: An orca"
    assert whole(body, said(" is", " a whale. ")).output_text == " is a whale."
    answer["status"] = "completed"
    assert text_of(body) == "USER: a\nASSISTANT: An orca\nASSISTANT:"


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_in_any_spelling(tools: Any) -> None:
    assert text_of({"input": "Hi", "tools": tools, "tool_choice": "auto"}) == "USER: Hi\nASSISTANT:"


def test_text_format_becomes_structured_outputs() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    body = {**ASKED, "text": {"format": wanted}}
    assert prepared(API, body).sequences[0].sampling.structured_outputs == {"json": schema}
    told = whole(body, said("{}"))
    assert told.text is not None
    assert told.text.model_dump(mode="json", by_alias=True, exclude_none=True) == {"format": wanted}
    body["text"] = {"format": {"type": "json_object"}}
    assert prepared(API, body).sequences[0].sampling.structured_outputs == {"json_object": True}
    for text in (None, {}, {"format": None}, {"format": {"type": "text"}}):
        body["text"] = text
        assert prepared(API, body).sequences[0].sampling.structured_outputs is None


def test_sampling_is_the_cards_where_nothing_is_given_and_vllms_fields_work() -> None:
    sampling = prepared(API, ASKED).sequences[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.75, 1.0, 50, 1024)
    assert sampling.stop == STOP_STRINGS
    fields = {"temperature": 0, "top_k": 5, "seed": 7, "repetition_penalty": 1.1, "ignore_eos": True, "stop": "END"}
    body = {**ASKED, **fields, "structured_outputs": {"choice": ["yes"]}, "max_output_tokens": 9}
    sampling = prepared(API, body).sequences[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.repetition_penalty) == (0, 5, 7, 1.1)
    assert (sampling.ignore_eos, sampling.stop, sampling.max_tokens) == (True, ("END", *STOP_STRINGS), 9)
    assert sampling.structured_outputs == {"choice": ["yes"]}


def test_fields_of_other_routes_change_nothing() -> None:
    plain = prepared(API, ASKED)
    extra = {
        "n": 3,
        "prompt_logprobs": 1,
        "max_tokens": 3,
        "stream_options": {"include_obfuscation": False},
        "echo": True,
    }
    ready = prepared(API, {**ASKED, **extra, "store": True, "reasoning": {"effort": "low"}, "truncation": "auto"})
    assert ready.sequences[0].sampling == plain.sequences[0].sampling
    assert len(ready.sequences) == 1


def test_the_generation_is_the_askers() -> None:
    (generation,) = prepared(API, ASKED).sequences
    assert (generation.id, generation.model) == ("1f", "synthia")
    assert generation.affinity is not None
    assert API.decode(b'{"input":"x"}').model is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_output_tokens": "x"}, "max_output_tokens"),
        ({"max_output_tokens": 300.0}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**400}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"n": "8"}, "n"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "function_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "reasoning", "summary": []}]}, "input[1].type"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"instructions": 5}, "instructions"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"tools": 5}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"metadata": {"a": 5}}, "metadata[...]"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["x" * 1500]}, "stop"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ],
)
def test_bad_input_is_an_error_that_names_the_field(body: dict[str, Any], param: str) -> None:
    error = refused(body)
    assert error.status == 400
    assert error.param == param
    assert error.message


def test_role_markers_are_refused_by_name_where_the_policy_says_so() -> None:
    strict = Model(names=MODEL.names, context=4096, role_markers="reject")
    for asked, param in (("a USER: b", "input"), ([{"role": "user", "content": "a USER: b"}], "input[0].content")):
        with pytest.raises(RequestError) as raised:
            prepared(API, {"input": asked}, strict)
        assert raised.value.param == param
    escaping = Model(names=MODEL.names, context=4096, role_markers="escape")
    (generation,) = prepared(API, {"input": "a USER: b"}, escaping).sequences
    assert generation.text == "USER: a USER : b\nASSISTANT:"


def test_deep_nesting_is_refused() -> None:
    deep: Any = {}
    for _ in range(700):
        deep = {"a": deep}
    assert refused({"text": {"format": {"type": "json_schema", "name": "a", "schema": deep}}}).status == 400
    assert refused({"input": [{"role": "user", "content": [deep]}]}).status == 400
    with pytest.raises(RequestError):
        API.decode(b'{"input":' + b"[" * 100_000)


@given(bodies(ASKED, [*ResponsesRequest.__struct_fields__, "reasoning"]))
@settings(max_examples=400, deadline=None)
def test_anything_in_any_field_is_a_bounded_request_or_refused(body: dict[str, Any]) -> None:
    check_bounded_or_refused(API, body)
