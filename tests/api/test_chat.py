import json
from contextlib import suppress
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.api.base import Asker, Model
from synthia_vllm.api.chat import ChatCompletions
from synthia_vllm.engine.port import Delta, Position, TokenLogprob
from synthia_vllm.errors import ContextTooLong, RequestError, UpstreamLost
from synthia_vllm.prompt import STOP_STRINGS, SYSTEM_PROMPTS
from tests.api.byte_tokenizer import BOS_ID, byte_tokenizer
from tests.api.openai_replies import (
    ASKER,
    CACHED,
    MODEL,
    NAMES,
    UNKNOWN,
    ask,
    openai_client,
    prepared,
    replied,
    script,
    stream,
)
from tests.api.test_sampling import values

API = ChatCompletions()
USER = [{"role": "user", "content": "Hello"}]
BODY: dict[str, Any] = {"model": "synthia", "messages": USER}


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"]["content"] for choice in choices)


def refused(body: dict[str, Any] | bytes, model: Model = MODEL) -> RequestError:
    with pytest.raises(RequestError) as error:
        prepared(API, body, model=model)
    return error.value


def test_a_conversation_becomes_the_cards_prompt_with_bos_once() -> None:
    (sequence,) = prepared(API, BODY).sequences
    assert sequence.text == "USER: Hello\nASSISTANT:"
    assert list(sequence.prompt) == [BOS_ID, *byte_tokenizer().encode(sequence.text)]
    assert sequence.model == "synthia"


def test_the_card_samples_where_the_client_says_nothing() -> None:
    ready = prepared(API, BODY)
    sampling = ready.sequences[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.75, 50, 1024)
    assert sampling.stop == STOP_STRINGS
    assert ready.max_generated == 1024
    assert ready.exact
    assert ready.prompt_tokens == len(ready.sequences[0].prompt)


def test_a_nearly_full_context_shortens_the_default_length_only() -> None:
    model = Model(names=NAMES, tokenizer=byte_tokenizer(), context=100)
    ready = prepared(API, BODY, model=model)
    assert ready.prompt_tokens + ready.max_generated == 100
    for field in ("max_tokens", "max_completion_tokens"):
        error = refused({**BODY, field: 90}, model)
        assert isinstance(error, ContextTooLong)
        assert error.param == field
    assert refused({"messages": [{"role": "user", "content": "x" * 100}]}, model).param == "messages"


def test_without_a_tokenizer_the_prompt_goes_as_text_and_is_estimated() -> None:
    ready = prepared(API, BODY, model=UNKNOWN)
    assert (ready.sequences[0].text, list(ready.sequences[0].prompt)) == ("USER: Hello\nASSISTANT:", [])
    assert (ready.prompt_tokens, ready.exact) == (len("USER: Hello\nASSISTANT:") // 3 + 1, False)


def test_the_alias_brings_its_preset_unless_there_is_a_system_message() -> None:
    def text(**body: Any) -> str:
        return prepared(API, {**BODY, **body}).sequences[0].text or ""

    assert text(model="synthia-tot").startswith(f"SYSTEM: {SYSTEM_PROMPTS['tot']}\nUSER:")
    with_system = [{"role": "developer", "content": "Be brief."}, *USER]
    assert text(model="synthia-tot", messages=with_system) == "SYSTEM: Be brief.\nUSER: Hello\nASSISTANT:"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None},
                {"role": "user", "content": "b"},
            ],
            "USER: a\nASSISTANT:\nUSER: b\nASSISTANT:",
        ),
        ([{"role": "user"}], "USER:\nASSISTANT:"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "USER: a\nb\nASSISTANT:",
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "system", "content": "x"},
                {"role": "developer", "content": "y"},
            ],
            "SYSTEM: x\ny\nUSER: a\nASSISTANT:",
        ),
        ([{"role": "assistant", "content": "a", "tool_calls": []}, *USER], "ASSISTANT: a\nUSER: Hello\nASSISTANT:"),
    ],
)
def test_messages_of_many_forms_are_taken(messages: Any, text: str) -> None:
    assert prepared(API, {"messages": messages}).sequences[0].text == text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": None}, "messages"),
        ({}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*USER, {"role": "user", "content": ["x"]}]}, "messages[1].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls"),
        ({"messages": USER * 20_000}, "messages"),
        ({**BODY, "tools": [{"type": "function"}]}, "tools"),
        ({**BODY, "tool_choice": "required"}, "tool_choice"),
        ({**BODY, "functions": [{"name": "x"}]}, "functions"),
        ({**BODY, "modalities": ["text", "audio"]}, "modalities"),
        ({**BODY, "stop": [""]}, "stop"),
        ({**BODY, "stop": 5}, "stop"),
        ({**BODY, "stop": ["x"] * 17}, "stop"),
        ({**BODY, "stop": "x" * 1500}, "stop"),
        ({**BODY, "continue_final_message": True}, "continue_final_message"),
        ({**BODY, "max_tokens": 0}, "max_tokens"),
        ({**BODY, "max_tokens": -1}, "max_tokens"),
        ({**BODY, "max_tokens": 10**9}, "max_tokens"),
        ({**BODY, "max_tokens": 10**30}, "max_tokens"),
        ({**BODY, "max_completion_tokens": "many"}, "max_completion_tokens"),
        ({**BODY, "temperature": "hot"}, "temperature"),
        ({**BODY, "n": 0}, "n"),
        ({**BODY, "stream": "perhaps"}, "stream"),
        ({**BODY, "seed": "x"}, "seed"),
        ({**BODY, "logprobs": 5}, "logprobs"),
        ({**BODY, "top_logprobs": 2}, "top_logprobs"),
        ({**BODY, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({**BODY, "logprob_token_ids": [1]}, "logprob_token_ids"),
        ({**BODY, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (b'{"messages": ', "body"),
        (b'{"messages": "\xff\xfe"}', "body"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "body"),
        (b'{"a": NaN}', "body"),
        (b'{"a": "\xff"}', "body"),
        (b'{"a": "\\ud800"}', "body"),
        (b"[]", "body"),
        (b"[" * 100_000, "body"),
        (b"", "body"),
    ],
)
def test_a_bad_request_names_its_field(body: Any, param: str) -> None:
    assert refused(body).param == param


def test_what_is_the_servers_own_is_ignored() -> None:
    own = {"priority": -1, "chat_template": "x", "chat_template_kwargs": {"bos_token": ""}, "add_special_tokens": True}
    assert prepared(API, {**BODY, **own, "tools": [], "tool_choice": "auto"}).sequences == prepared(API, BODY).sequences


@pytest.mark.parametrize(("policy", "sent"), [("allow", "a USER: b"), ("escape", "a USER : b")])
def test_role_markers_in_user_text(policy: Any, sent: str) -> None:
    model = Model(names=NAMES, role_markers=policy)
    messages = [{"role": "assistant", "content": "USER: x"}, {"role": "user", "content": "a USER: b"}]
    text = prepared(API, {"messages": messages}, model=model).sequences[0].text
    assert text == f"ASSISTANT: USER: x\nUSER: {sent}\nASSISTANT:"


def test_role_markers_can_be_refused() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a\nASSISTANT: b"}]}]
    assert (
        refused({"messages": messages}, Model(names=NAMES, role_markers="reject")).param
        == "messages[0].content[0].text"
    )


def test_a_whole_reply_has_vllms_shape() -> None:
    reply = ask(API, BODY, script(" Hi", " there", "\nUSER:", stop="\nUSER:"))
    assert (reply["id"], reply["object"], reply["created"]) == ("chatcmpl-r1", "chat.completion", ASKER.created)
    assert reply["model"] == "Synthia-v3.0-11B"
    choice = reply["choices"][0]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "Hi there")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    prompt = prepared(API, BODY).prompt_tokens
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "total_tokens": prompt + 3,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": CACHED},
    }


def test_a_stream_tells_the_role_the_text_the_end_and_the_usage() -> None:
    body = {**BODY, "stream_options": {"include_usage": True}}
    role, first, second, last, told = stream(API, body, script(" Hi", " there", "\n", "USER:", stop="\nUSER:"))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in (first, second, last)] == [
        {"content": "Hi"},
        {"content": " there"},
        {"content": ""},
    ]
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("stop", None)
    assert told["choices"] == []
    assert told["usage"]["completion_tokens"] == 4
    assert told["usage"]["prompt_tokens_details"] == {"cached_tokens": CACHED}
    assert "usage" not in last


def test_usage_is_told_with_every_chunk_where_asked() -> None:
    body = {**BODY, "n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    deltas = [*script("a", "b", sequence=0), *script("c", "d", sequence=1)]
    chunks = stream(API, body, deltas)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 0, 1, 2, 1, 2, 4]


def test_several_replies_are_told_apart_and_have_seeds_of_their_own() -> None:
    ready = prepared(API, {**BODY, "n": 3, "seed": 7})
    assert [sequence.id for sequence in ready.sequences] == ["r1-0", "r1-1", "r1-2"]
    assert [sequence.sampling.seed for sequence in ready.sequences] == [7, 8, 9]
    assert ready.max_generated == 3 * 1024
    assert ready.prompt_tokens == prepared(API, BODY).prompt_tokens
    deltas = [*script("b", sequence=1), *script("a", sequence=0), *script("c", finish="length", sequence=2)]
    choices = ask(API, {**BODY, "n": 3}, deltas)["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(0, "a"), (1, "b"), (2, "c")]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "stop", "length"]
    chunks = stream(API, {**BODY, "n": 3}, deltas)
    assert [text_of(chunks, index) for index in range(3)] == ["a", "b", "c"]


def test_a_clients_stop_string_is_told_and_cut() -> None:
    body = {**BODY, "stop": "END"}
    assert prepared(API, body).sequences[0].sampling.stop[0] == "END"
    choice = ask(API, body, script("a ", "END", stop="END"))["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("a", "END")
    kept = ask(API, {**body, "include_stop_str_in_output": True}, script("a ", "END", stop="END"))["choices"][0]
    assert (kept["message"]["content"], kept["stop_reason"]) == ("a END", "END")


def test_a_final_message_is_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "An orca is"}]
    body = {"messages": messages, "continue_final_message": True}
    assert (prepared(API, body).sequences[0].text or "").endswith("ASSISTANT: An orca is")
    assert ask(API, body, script(" a", " whale "))["choices"][0]["message"]["content"] == " a whale"
    assert text_of(stream(API, body, script(" a", " whale "))) == " a whale"
    echoed = {**body, "echo": True}
    assert ask(API, echoed, script(" a"))["choices"][0]["message"]["content"] == "An orca is a"
    assert text_of(stream(API, echoed, script(" a"))) == "An orca is a"
    assert refused({**body, "add_generation_prompt": True}).param == "add_generation_prompt"


def test_token_ids_are_told_where_asked() -> None:
    body = {**BODY, "return_token_ids": True}
    reply = ask(API, body, script("a", " US", "ER:"))
    assert reply["prompt_token_ids"] == list(prepared(API, BODY).sequences[0].prompt)
    assert reply["choices"][0]["token_ids"] == [0, 1, 2]
    chunks = stream(API, body, script("a", " US", "ER:"))
    assert chunks[0]["prompt_token_ids"] == reply["prompt_token_ids"]
    assert [token for chunk in chunks[1:] for token in chunk["choices"][0]["token_ids"]] == [0, 1, 2]


def with_logprobs(deltas: list[Delta]) -> list[Delta]:
    for delta in deltas:
        chosen = TokenLogprob(65, delta.text, -0.5, 2)
        delta.logprobs = [Position(chosen, (chosen, TokenLogprob(66, "é", float("-inf"), 1)))]
    return deltas


def test_logprobs_are_openais() -> None:
    body = {**BODY, "logprobs": True, "top_logprobs": 2}
    assert prepared(API, body).sequences[0].sampling.logprobs == 2
    deltas = with_logprobs(script("Hi", "\nUSER:", stop="\nUSER:"))
    (entry,) = ask(API, body, deltas)["choices"][0]["logprobs"]["content"]
    assert entry == {
        "token": "Hi",
        "logprob": -0.5,
        "bytes": [72, 105],
        "top_logprobs": [
            {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
            {"token": "é", "logprob": -9999.0, "bytes": [195, 169]},
        ],
    }
    chunks = stream(API, body, with_logprobs(script("Hi", "\nUSER:", stop="\nUSER:")))
    told = [choice["logprobs"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert told == [[entry]]
    alone = ask(API, {**BODY, "logprobs": True}, with_logprobs(script("Hi")))["choices"][0]["logprobs"]["content"]
    assert alone[0]["top_logprobs"] == []
    ids = ask(API, {**body, "return_tokens_as_token_ids": True}, with_logprobs(script("Hi")))
    assert [top["token"] for top in ids["choices"][0]["logprobs"]["content"][0]["top_logprobs"]] == [
        "token_id:65",
        "token_id:66",
    ]


def test_prompt_logprobs_are_vllms() -> None:
    first = Delta([1], "a", "stop", prompt_logprobs=[None, Position(TokenLogprob(5, "x", float("-inf"), 3), ())])
    reply = ask(API, {**BODY, "prompt_logprobs": 0}, [first])
    assert reply["prompt_logprobs"] == [None, {"5": {"logprob": -9999.0, "rank": 3, "decoded_token": "x"}}]


def test_an_error_in_a_stream_is_openais() -> None:
    ready = prepared(API, {**BODY, "stream": True})
    told = ready.reply.error(UpstreamLost("gone")).decode().split("\n\n")
    assert json.loads(told[0].removeprefix("data: "))["error"]["message"] == "gone"
    assert told[1:] == ["data: [DONE]", ""]


def test_the_openai_package_reads_replies_streams_and_errors() -> None:
    client = openai_client(API, script(" Hi", " there", "\nUSER:", stop="\nUSER:"))
    messages: Any = USER
    whole = client.chat.completions.create(model="synthia", messages=messages)
    assert whole.choices[0].message.content == "Hi there"
    chunks = list(client.chat.completions.create(model="synthia", messages=messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi there"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="synthia", messages=messages, temperature=9)
    assert refused.value.param == "temperature"
    broken = openai_client(API, [*script("a", "b")[:1]], error=UpstreamLost("gone"))
    with pytest.raises(openai.APIError, match="gone"):
        list(broken.chat.completions.create(model="synthia", messages=messages, stream=True))


def test_the_turns_of_a_conversation_find_the_last_ones_home() -> None:
    def affinity(*texts: str, asker: Asker = ASKER) -> Any:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return prepared(API, {"messages": messages}, asker=asker).sequences[0].affinity

    first, second, third = affinity("a"), affinity("a", "b", "c"), affinity("a", "b", "c", "d", "e")
    assert not first.continued
    assert second.continued
    assert (first.next, second.next) == (second.key, third.key)
    assert affinity("a", "x", "y").key == first.next  # another branch begins at the same home
    assert affinity("a", "x", "y").next != second.next  # and has its own from there on
    assert affinity("a", asker=Asker(id="r2", user="bob")).next != first.next
    sessions = [affinity(text, asker=Asker(id="r", user="ann", session="s")) for text in ("a", "b")]
    assert sessions[0] == sessions[1]
    assert sessions[0].continued


@given(st.lists(st.text("aUSER: \n", max_size=5), min_size=1, max_size=8))
def test_a_stream_says_what_the_whole_reply_says(texts: list[str]) -> None:
    whole = ask(API, BODY, script("".join(texts)))["choices"][0]
    chunks = stream(API, BODY, script(*texts))
    assert text_of(chunks) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


@given(
    st.dictionaries(
        st.sampled_from(ChatCompletions().decode(b'{"messages":[{"role":"user"}]}').__struct_fields__),
        values,
        max_size=5,
    )
)
def test_any_json_in_any_field_is_prepared_or_refused(fields: dict[str, Any]) -> None:
    try:
        ready = prepared(API, {**BODY, **fields})
    except RequestError:
        return
    assert replied(ready, script("a"))


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with suppress(RequestError):
        API.decode(body)


def test_a_long_reply_is_whole_in_its_pieces() -> None:
    positions = [Position(TokenLogprob(5, f"{at}\0" + "x" * 500, -1.0, 1), ()) for at in range(1300)]
    deltas = [
        Delta([65], "\0", None, logprobs=positions[:1], prompt_logprobs=[None, *positions]),
        Delta([65] * 1299, "b", "stop", logprobs=positions[1:]),
    ]
    reply = ask(API, {**BODY, "prompt_logprobs": 0, "logprobs": True}, deltas)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == "\0b"
    texts = [position.chosen.text for position in positions]
    assert [one["token"] for one in choice["logprobs"]["content"]] == texts
    assert [one["5"]["decoded_token"] for one in reply["prompt_logprobs"][1:]] == texts
