from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.api.base import MAX_SEQUENCES, Asker, Model
from synthia_vllm.api.completions import CompletionRequest, Completions
from synthia_vllm.engine.port import Delta, Position, Sampling, TokenLogprob
from synthia_vllm.errors import ContextTooLong, RequestError
from tests.api.byte_tokenizer import BOS_ID, byte_tokenizer
from tests.api.openai_replies import CACHED, MODEL, NAMES, UNKNOWN, ask, prepared, replied, script, stream
from tests.api.test_sampling import values

API = Completions()
TOKENIZER = byte_tokenizer()
BODY: dict[str, Any] = {"model": "synthia", "prompt": "ab"}
AB = TOKENIZER.encode("ab")


def at(text: str, *others: str, token: int = 65) -> Position:
    chosen = TokenLogprob(token, text, -0.5, 1)
    return Position(chosen, (chosen, *(TokenLogprob(100 + n, other, -1.0, 2 + n) for n, other in enumerate(others))))


def refused(body: dict[str, Any], model: Model = MODEL) -> RequestError:
    with pytest.raises(RequestError) as error:
        prepared(API, body, model=model)
    return error.value


def test_a_text_goes_on_as_it_is_with_the_tokenizers_own_bos() -> None:
    (sequence,) = prepared(API, {**BODY, "prompt": " USER: a "}).sequences
    assert list(sequence.prompt) == [BOS_ID, *TOKENIZER.encode(" USER: a ")]
    assert sequence.text == " USER: a "
    assert sequence.sampling == Sampling(max_tokens=16)
    bare = prepared(API, {**BODY, "add_special_tokens": False}).sequences[0]
    assert list(bare.prompt) == AB
    assert bare.text is None  # who is sent text would add BOS


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS_ID, *AB]]),
        (["ab", ""], [[BOS_ID, *AB], [BOS_ID]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts_are_texts_or_ids_one_or_several(prompt: Any, expected: list[list[int]]) -> None:
    ready = prepared(API, {"prompt": prompt, "n": 2, "max_tokens": 3})
    assert [list(sequence.prompt) for sequence in ready.sequences] == [ids for ids in expected for _ in range(2)]
    assert ready.prompt_tokens == sum(map(len, expected))
    assert ready.max_generated == 3 * len(ready.sequences)
    assert len({sequence.id for sequence in ready.sequences}) == len(ready.sequences)
    assert ready.exact


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [10**8]}, "prompt"),
        ({"prompt": [[1], [257]]}, "prompt"),
        ({"prompt": ["a"] * (MAX_SEQUENCES + 1)}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 100}, "prompt"),
        ({**BODY, "max_tokens": 0}, "max_tokens"),
        ({**BODY, "max_tokens": -5}, "max_tokens"),
        ({**BODY, "max_tokens": 5000}, "max_tokens"),
        ({**BODY, "suffix": "x"}, "suffix"),
        ({**BODY, "prompt_embeds": "x"}, "prompt_embeds"),
        ({**BODY, "logprobs": 21}, "logprobs"),
        ({**BODY, "logprobs": True}, "logprobs"),
        ({**BODY, "best_of": 2}, "best_of"),
        ({**BODY, "logprob_token_ids": [1]}, "logprob_token_ids"),
    ],
)
def test_a_bad_request_names_its_field(body: dict[str, Any], param: str) -> None:
    assert refused(body).param == param


def test_a_prompt_over_the_context_is_refused_by_name() -> None:
    error = refused({"prompt": "a" * 5000})
    assert isinstance(error, ContextTooLong)
    assert error.param == "prompt"


def test_without_a_tokenizer_text_is_estimated_and_ids_are_counted() -> None:
    ready = prepared(API, BODY, model=UNKNOWN)
    assert (ready.sequences[0].text, list(ready.sequences[0].prompt), ready.exact) == ("ab", [], False)
    ready = prepared(API, {"prompt": [5, 6]}, model=UNKNOWN)
    assert (ready.prompt_tokens, ready.exact) == (2, True)


def test_text_is_untouched() -> None:
    texts = (" a \n", "USER: b ", "\n")
    assert ask(API, BODY, script(*texts))["choices"][0]["text"] == "".join(texts)
    chunks = stream(API, BODY, script(*texts))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "".join(texts)


def test_a_whole_reply_has_vllms_shape() -> None:
    reply = ask(API, {**BODY, "stop": ["END"]}, script("a ", "END", stop="END"))
    assert (reply["id"], reply["object"], reply["model"]) == ("cmpl-r1", "text_completion", NAMES[0])
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a ", "stop", "END")
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": CACHED},
    }
    kept = ask(API, {**BODY, "stop": "END", "include_stop_str_in_output": True}, script("a ", "END", stop="END"))
    assert kept["choices"][0]["text"] == "a END"


def test_a_stream_has_vllms_shape() -> None:
    body = {**BODY, "stop": ["END"], "stream_options": {"include_usage": True}}
    first, last, told = stream(API, body, script("a ", "E", "ND", stop="END"))
    assert first["choices"] == [
        {
            "index": 0,
            "text": "a ",
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
    ]
    assert (last["choices"][0]["text"], last["choices"][0]["stop_reason"]) == ("", "END")
    assert (told["choices"], told["usage"]["completion_tokens"]) == ([], 3)


def test_usage_of_each_prompt_is_told_with_every_chunk_where_asked() -> None:
    body = {"prompt": ["a", "abc"], "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = stream(API, body, [*script("x", "y", sequence=1), *script("z", sequence=0)])
    counted = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in chunks]
    assert counted == [(4, 1), (4, 2), (2, 1), (6, 3)]


def test_token_ids_are_told_where_asked() -> None:
    body = {**BODY, "return_token_ids": True}
    choice = ask(API, body, script("x", "y"))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS_ID, *AB], [0, 1])
    chunks = [chunk["choices"][0] for chunk in stream(API, body, script("x", "y"))]
    assert [chunk["prompt_token_ids"] for chunk in chunks] == [[BOS_ID, *AB], None]
    assert [chunk["token_ids"] for chunk in chunks] == [[0], [1]]


def test_logprobs_are_openais_four_lists() -> None:
    deltas = script("Hi", " you")
    deltas[0].logprobs, deltas[1].logprobs = [at("Hi", "Ho", "He")], [at(" you", "x", "y")]
    expected = {
        "text_offset": [0, 2],
        "token_logprobs": [-0.5, -0.5],
        "tokens": ["Hi", " you"],
        "top_logprobs": [{"Hi": -0.5, "Ho": -1.0}, {" you": -0.5, "x": -1.0}],
    }
    assert ask(API, {**BODY, "logprobs": 1}, deltas)["choices"][0]["logprobs"] == expected
    chunks = stream(API, {**BODY, "logprobs": 1}, deltas)
    joined = {name: [item for chunk in chunks for item in chunk["choices"][0]["logprobs"][name]] for name in expected}
    assert joined == expected
    as_ids = ask(API, {**BODY, "logprobs": 0, "return_tokens_as_token_ids": True}, deltas)["choices"][0]["logprobs"]
    assert as_ids["tokens"] == ["token_id:65", "token_id:65"]
    assert as_ids["top_logprobs"] == [{"token_id:65": -0.5}] * 2


@pytest.mark.parametrize("prompt", ["ab", AB, [AB]])
def test_the_prompt_is_echoed(prompt: Any) -> None:
    body = {"prompt": prompt, "echo": True}
    assert ask(API, body, script("c", "d"))["choices"][0]["text"] == "abcd"
    chunks = stream(API, body, script("c", "d"))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abc", "d"]


def test_an_echo_with_ids_leaves_its_text_out_as_vllm_does() -> None:
    body = {**BODY, "echo": True, "return_token_ids": True}
    assert ask(API, body, script("c"))["choices"][0]["text"] == "c"
    assert stream(API, body, script("c"))[0]["choices"][0]["prompt_token_ids"] == [BOS_ID, *AB]


def test_an_echo_has_the_prompts_logprobs() -> None:
    body = {"prompt": AB, "echo": True, "logprobs": 1}
    assert prepared(API, body).sequences[0].sampling.prompt_logprobs == 1
    prompt_logprobs = [None, at("b", "x", token=AB[1])]
    deltas = [Delta([65], "c", "length", logprobs=[at("c", "y")], prompt_logprobs=prompt_logprobs)]
    for choice in (ask(API, body, deltas)["choices"][0], stream(API, body, deltas)[0]["choices"][0]):
        assert choice["text"] == "abc"
        assert choice["logprobs"] == {
            "text_offset": [0, 1, 2],
            "token_logprobs": [None, -0.5, -0.5],
            "tokens": ["a", "b", "c"],
            "top_logprobs": [None, {"b": -0.5, "x": -1.0}, {"c": -0.5, "y": -1.0}],
        }
    assert ask(API, body, deltas)["choices"][0]["prompt_logprobs"][0] is None


def test_an_echo_alone_shows_no_generated_token() -> None:
    body = {"prompt": AB, "echo": True, "logprobs": 1, "max_tokens": 0}
    ready = prepared(API, body)
    assert (ready.sequences[0].sampling.max_tokens, ready.max_generated) == (1, 1)
    deltas = [Delta([65], "c", "length", logprobs=[at("c")], prompt_logprobs=[None, at("b", token=AB[1])])]
    for reply in (ask(API, body, deltas)["choices"], stream(API, body, deltas)[0]["choices"]):
        assert reply[0]["text"] == "ab"
        assert reply[0]["logprobs"]["tokens"] == ["a", "b"]
    assert ask(API, body, deltas)["usage"]["completion_tokens"] == 1


def test_ids_can_not_be_echoed_without_a_tokenizer() -> None:
    assert refused({"prompt": [5], "echo": True}, UNKNOWN).param == "echo"


def test_prompts_that_begin_alike_have_one_home() -> None:
    def key(prompt: Any, **given: Any) -> Any:
        asker = Asker(**{"id": "r", "user": "ann", **given})
        return prepared(API, {"prompt": prompt}, asker=asker).sequences[0].affinity

    assert key("a" * 1024 + "b") == key("a" * 1024 + "c")
    assert key("a") != key("b")
    assert key([1, 2]) == key([1, 2])
    assert key("a", session="s") == key("b", session="s")


@given(st.lists(st.text("abEND", max_size=3), min_size=1, max_size=8))
def test_a_stream_says_what_the_whole_reply_says(texts: list[str]) -> None:
    body = {**BODY, "stop": ["END"]}
    text = "".join(texts)
    stopped = text.endswith("END")
    whole = ask(API, body, script(text, stop="END" if stopped else None))["choices"][0]
    chunks = stream(API, body, script(*texts, stop="END" if stopped else None))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"] == text.removesuffix("END")


@given(st.dictionaries(st.sampled_from(CompletionRequest.__struct_fields__), values, max_size=5))
def test_any_json_in_any_field_is_prepared_or_refused(fields: dict[str, Any]) -> None:
    try:
        ready = prepared(API, {**BODY, **fields})
    except RequestError:
        return
    assert len(ready.sequences) <= MAX_SEQUENCES
    assert replied(ready, script("a"))
