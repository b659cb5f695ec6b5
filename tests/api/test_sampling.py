import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.api.base import MAX_STOP_CHARACTERS, Model, decode
from synthia_vllm.api.sampling import (
    SamplingFields,
    client_stops,
    contract_stops,
    reply_length,
    sampling_of,
    sequences_of,
)
from synthia_vllm.engine.port import Sampling
from synthia_vllm.errors import ContextTooLong, RequestError
from synthia_vllm.prompt import STOP_STRINGS
from tests.api.byte_tokenizer import byte_tokenizer

MODEL = Model(names=["synthia"], tokenizer=byte_tokenizer(), context=100)
UNKNOWN = Model(names=["synthia"])


def read(**fields: Any) -> SamplingFields:
    return decode(json.dumps(fields).encode(), SamplingFields)


def sampled(*, card_defaults: bool = True, model: Model = MODEL, **fields: Any) -> Sampling:
    request = read(**fields)
    return sampling_of(request, max_tokens=20, stops=(), logprobs=None, model=model, card_defaults=card_defaults)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 5.0),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", 1.0),
        ("n", 0),
        ("n", 129),
        ("n", "8"),
        ("max_tokens", "4000"),
        ("max_tokens", 4000.0),
        ("max_tokens", 10**400),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1] * 1025),
        ("stream", "true"),
        ("stream", 1),
        ("stream_interval", 0),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("allowed_token_ids", []),
        ("bad_words", [""]),
        ("bad_words", ["x"] * 257),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("logprob_token_ids", [1] * 129),
        ("ignore_eos", "yes"),
        ("cache_salt", ""),
        ("cache_salt", "x" * 1025),
        ("vllm_xargs", {"a": {}}),
        ("vllm_xargs", {"a": 2**64}),
        ("stop", 5),
        ("stop", [5]),
        ("response_format", {"type": "xml"}),
        ("structured_outputs", {"choice": []}),
        ("structured_outputs", {"choice": "a"}),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        read(**{field: value})
    assert str(refused.value.param).startswith(field)


def test_null_is_not_given() -> None:
    assert read(**dict.fromkeys(SamplingFields.__struct_fields__)) == SamplingFields()


def test_the_cards_sampling_is_only_for_what_is_not_given() -> None:
    assert sampled() == Sampling(max_tokens=20, temperature=0.75, top_p=1.0, top_k=50)
    assert sampled(temperature=0, top_k=-1) == Sampling(max_tokens=20, temperature=0, top_p=1.0, top_k=0)
    assert sampled(card_defaults=False) == Sampling(max_tokens=20)


def test_what_is_given_reaches_the_engine() -> None:
    given: dict[str, Any] = {
        "min_tokens": 3,
        "temperature": 0.2,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "seed": 2**63 - 1,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "prompt_logprobs": 2,
    }
    sampling = sampled(**given)
    assert {name: getattr(sampling, name) for name in given} == given
    lists = sampled(stop_token_ids=[5, 5, 6], bad_words=["a", "a"], allowed_token_ids=[7], logit_bias={"8": 1})
    assert (lists.stop_token_ids, lists.bad_words, lists.allowed_token_ids) == ((5, 6), ("a",), (7,))
    assert lists.logit_bias == {8: 1.0}
    assert sampled(vllm_xargs={"a": [1, "b"]}).extra_args == {"a": [1, "b"]}
    assert sampled(logprob_token_ids=[4, 4]).logprob_token_ids == (4, 4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"best_of": 2}, "best_of"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"min_tokens": 21}, "min_tokens"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"allowed_token_ids": [1, 300]}, "allowed_token_ids"),
        ({"logprob_token_ids": [300]}, "logprob_token_ids"),
    ],
)
def test_what_can_not_be_done_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        sampled(**fields)
    assert refused.value.param == param


def test_a_token_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(RequestError, match=r"no token 300, only 0 to 256"):
        sampled(stop_token_ids=[1, 300])
    assert sampled(stop_token_ids=[300], model=UNKNOWN).stop_token_ids == (300,)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"a": 1}}},
            {"structural_tag": '{"type":"structural_tag","format":{"a":1}}'},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            {"json": SCHEMA, "disable_any_whitespace": True},
        ),
        (
            {"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}},
            {"regex": "a+"},
        ),
    ],
)
def test_structured_outputs_are_vllms(fields: dict[str, Any], expected: Any) -> None:
    assert sampled(**fields).structured_outputs == expected


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format.format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"json": nested(70)}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"const": 10**30}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs"),
    ],
)
def test_structured_outputs_are_of_one_kind_and_bounded(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        sampled(**fields)
    assert refused.value.param == param


def test_each_reply_has_a_seed_of_its_own() -> None:
    assert [one.seed for one in sequences_of(sampled(seed=5), 3)] == [5, 6, 7]
    assert [one.seed for one in sequences_of(sampled(seed=2**63 - 1), 2)] == [2**63 - 1, -(2**63)]
    assert [one.seed for one in sequences_of(sampled(seed=-1), 2)] == [None, None]


def test_a_reply_is_as_long_as_asked_or_as_the_prompt_leaves() -> None:
    def length(wanted: int | None, default: int | None, prompt: int, model: Model = MODEL) -> int:
        return reply_length(wanted, default, prompt, model, param="max_tokens", prompt_param="messages")

    assert length(20, 50, 80) == 20
    assert length(None, 50, 20) == 50
    assert length(None, 50, 80) == 20
    assert length(None, None, 40) == 60
    assert length(None, None, 40, UNKNOWN) == 1024
    estimated = Model(names=["synthia"], context=100)
    assert length(100, None, 5000, estimated) == 100
    assert length(None, 50, 5000, estimated) == 1
    for wanted, prompt, param in ((21, 80, "max_tokens"), (None, 100, "messages"), (1, 100, "messages")):
        with pytest.raises(ContextTooLong) as refused:
            length(wanted, 50, prompt)
        assert refused.value.param == param


def test_client_stops_are_few_short_and_not_empty() -> None:
    assert client_stops(None, "stop") == client_stops([], "stop") == ()
    assert client_stops(["b", "a", "b"], "stop") == ("b", "a")
    assert client_stops("a" * MAX_STOP_CHARACTERS, "stop")
    for bad in ("", [""], ["a"] * 17, "a" * (MAX_STOP_CHARACTERS + 1)):
        with pytest.raises(RequestError) as refused:
            client_stops(bad, "stop_sequences")
        assert refused.value.param == "stop_sequences"


def test_the_clients_stops_come_first() -> None:
    assert contract_stops(("END", "USER:"))[:2] == ("END", "USER:")
    assert sorted(contract_stops(("END", "USER:"))) == sorted({"END", *STOP_STRINGS})


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab01", max_size=4), inner, max_size=4),
    max_leaves=8,
)
formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema", "structural_tag"])},
    optional={"json_schema": values, "format": values, "structures": values, "triggers": values},
)
fields = st.dictionaries(st.sampled_from(SamplingFields.__struct_fields__), values, max_size=6)


@given(fields, st.none() | formats | values)
def test_any_json_becomes_sampling_that_can_be_sent_or_a_refusal(given: dict[str, Any], wanted: Any) -> None:
    try:
        sampling = sampled(**{**given, "response_format": wanted})
    except RequestError:
        return
    assert msgspec.msgpack.encode(sampling)
