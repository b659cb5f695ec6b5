"""Bounds on schemas and grammars: what costs an engine minutes is refused in microseconds."""

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.engine.grammar import check_grammar, unroll, with_grammar_for_choice
from synthia_vllm.errors import RequestError


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def properties(count: int, **of: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string", **of} for i in range(count)}}


def lengths(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 100 + i} for i in range(count)}}


@pytest.mark.parametrize(
    "good",
    [
        {"json": {}},
        {"json": '{"type": "object"}'},
        {"json": nested(31)},
        {"json": properties(500)},
        {"json": {"enum": [str(i) for i in range(1000)]}},
        {"json": lengths(16)},
        {"json": properties(100, maxLength=1000, minLength=100)},
        {"json": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}(T.{1,128})?$"}},
        {"json": {"type": "object", "properties": {"enum": {"type": "string"}, "pattern": {"type": "integer"}}}},
        {"json_object": True, "json": None},
        {"regex": ""},
        {"regex": "([a-z]{1,128}){1,128}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "a" root | "b"', "disable_any_whitespace": True},
        {"structural_tag": '{"structures": [], "triggers": []}'},
    ],
)
def test_what_an_engine_can_do_passes(good: dict[str, Any]) -> None:
    check_grammar(good)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "exactly one"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "5"}, "must be an object"),
        ({"json": True}, "must be an object"),
        ({"json": "[" * 60_000}, "not valid JSON"),
        ({"json": nested(400)}, "deeper"),
        ({"json": properties(501)}, "501 properties"),
        ({"json": {"enum": [str(i) for i in range(1001)]}}, "values of enums"),
        ({"json": {"description": "a" * 70_000}}, "longer"),
        ({"json": lengths(17)}, "different lengths"),
        ({"json": {"pattern": "^.{1,129}$"}}, "counts to 129"),
        ({"json": {"pattern": "^([a-z]{1,128}){1,128}$"}}, "multiplied out"),
        ({"json": {"pattern": "^(([a-z]{20,}){20}){1,20}$"}}, "multiplied out"),
        ({"json": properties(20, pattern="^.{1,128}$")}, "multiplied out"),
        ({"json_object": False}, "must be true"),
        ({"json_object": 1}, "must be true"),
        ({"regex": "a\0b"}, "NUL"),
        ({"regex": 5}, "string"),
        ({"regex": "a" * 5000}, "4096"),
        ({"regex": ".{1,1000}x" * 17}, "counts above"),
        ({"choice": []}, "not empty"),
        ({"choice": [1]}, "strings"),
        ({"choice": "ab"}, "list"),
        ({"choice": ["a"] * 1001}, "1001 choices"),
        ({"grammar": " "}, "not empty"),
        ({"grammar": "root ::= " + "a " * 9000}, "16384"),
        ({"structural_tag": {}}, "string"),
        ({"structural_tag": "[]"}, "object"),
        ({"structural_tag": json.dumps({"structures": [{"schema": nested(40)}]})}, "deeper"),
    ],
)
def test_what_costs_too_much_or_is_none_is_refused(bad: dict[str, Any], why: str) -> None:
    began = time.process_time()
    with pytest.raises(RequestError, match=why) as refused:
        check_grammar(bad, param="response_format")
    assert time.process_time() - began < 0.05
    assert (refused.value.status, refused.value.param) == (400, "response_format")


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", (0, 0)),
        ("abc", (3, 0)),
        ("a{3}", (3, 3)),
        ("a{3}{2}", (6, 3)),
        ("(ab){2,5}c", (11, 5)),
        ("(a(b{2}){3}){4}", (28, 4)),
        ("[a-z{9}]{2}", (2, 2)),
        (r"\{9\}", (3, 0)),
        (r"[\]{9}]", (1, 0)),
        ("a{x}", (4, 0)),
        ("a{0}b", (2, 0)),
        ("a{5,}", (5, 5)),
        (")(", (0, 0)),
        ("[", (1, 0)),
        ("\\", (1, 0)),
    ],
)
def test_counts_are_multiplied_out(pattern: str, size: tuple[int, int]) -> None:
    assert unroll(pattern) == size


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a{999}{999}"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["properties", "enum", "pattern", "maxLength", "minLength", "items", "a"]), inner
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["json", "regex", "choice", "grammar", "structural_tag", "json_object"]), _JSON))
def test_any_value_passes_or_is_a_400(given: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        check_grammar(given)


@given(st.text(alphabet="ab(){}[]\\,0129*|", max_size=60))
def test_any_pattern_is_sized(pattern: str) -> None:
    items, largest = unroll(pattern)
    assert 0 <= items <= 10**9
    assert largest >= 0


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_choices_with_control_characters_become_a_grammar_that_can_be_read(choices: list[str]) -> None:
    from xgrammar import Grammar

    fields = with_grammar_for_choice({"choice": choices, "disable_any_whitespace": True})
    if all(text.isprintable() for text in choices):
        assert fields["choice"] == choices
    else:
        assert "choice" not in fields
        Grammar.from_ebnf(fields["grammar"])  # raises where it can't be read
