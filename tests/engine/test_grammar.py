"""Bounds on schemas and grammars: what costs an engine minutes is refused in microseconds."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.engine import grammar
from synthia_vllm.engine.grammar import check_grammar, unroll, with_grammar_for_choice
from synthia_vllm.errors import RequestError

PAGE = Path(__file__).parents[2] / "docs" / "apis.md"


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
    assert time.process_time() - began < 2  # to compile them takes far longer, or all memory
    assert (refused.value.status, refused.value.param) == (400, "response_format")


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
LIST = {"type": "array", "items": {"type": "integer"}}
TEXT = {"type": "string"}

# A schema, the keyword that the refusal names, and a value that the schema forbids.
PASSED_OVER: list[tuple[dict[str, Any], str, Any]] = [
    ({"allOf": [OBJECT, {"type": "object"}]}, "allOf", 10.22),
    ({**OBJECT, "required": ["a"], "allOf": [OBJECT]}, "properties", {}),
    ({"anyOf": [OBJECT, TEXT], "required": ["a"]}, "required", {}),
    ({"oneOf": [TEXT], "minLength": 3}, "minLength", "a"),
    ({"type": "string", "anyOf": [{"minLength": 3}]}, "minLength|type", 5),
    ({"type": "string", "anyOf": [{}]}, "type", 5),
    ({"$ref": "#/$defs/x", "minimum": 5, "$defs": {"x": {"type": "integer"}}}, "minimum", 1),
    ({"$ref": "http://a/b"}, "\\$ref", 5),
    ({"$ref": "#x", "$defs": {"x": {"$anchor": "x", "type": "integer"}}}, "\\$ref", "s"),
    ({"$dynamicRef": "#/$defs/x", "$defs": {"x": TEXT}}, "\\$dynamicRef", 5),
    ({"enum": [1, 5], "minimum": 3}, "minimum", 1),
    ({"const": "b", "pattern": "^a"}, "pattern", "b"),
    ({"not": TEXT}, "not", "a"),
    ({**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if", {"a": 1}),
    ({**OBJECT, "dependentRequired": {"a": ["b"]}}, "dependentRequired", {"a": 1}),
    ({**OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas", {"a": 1}),
    ({**OBJECT, "dependencies": {"a": ["b"]}}, "dependencies", {"a": 1}),
    ({**OBJECT, "propertyNames": {"pattern": "^x"}}, "propertyNames", {"a": 1}),
    ({**OBJECT, "required": ["c"]}, "'c'", {"a": 1}),
    ({"type": "object", "required": ["c"]}, "'c'", {}),
    ({**LIST, "uniqueItems": True}, "uniqueItems", [1, 1]),
    ({**LIST, "contains": {"const": 1}}, "contains", [2]),
    ({"type": "number", "multipleOf": 0.5}, "multipleOf", 0.3),
    ({**TEXT, "format": "idn-email"}, "idn-email", "a"),
    ({"type": ["string", "null"], "format": "iri"}, "iri", "a b"),
    ({**TEXT, "format": "email", "pattern": "^z"}, "pattern", "a@b.cc"),
    ({**TEXT, "pattern": "^a+$", "maxLength": 3}, "maxLength", "aaaaa"),
    ({**TEXT, "format": "email", "maxLength": 3}, "maxLength", "aaaa@bb.cc"),
    ({**TEXT, "pattern": "^(?!b)b$"}, "pattern", "b"),
    *(({key: value}, key, wrong) for key, value, wrong in (
        ("minLength", 3, "a"), ("pattern", "^a$", "b"), ("format", "date", "a"), ("minimum", 3, 1),
        ("exclusiveMaximum", 3, 5), ("required", ["a"], {}), ("minItems", 2, [1]),
        ("maxProperties", 1, {"a": 1, "b": 2}),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "keyword", "wrong"), PASSED_OVER)
def test_a_keyword_that_xgrammar_passes_over_is_refused_by_name(
    schema: dict[str, Any], keyword: str, wrong: Any
) -> None:
    for where in (schema, {"type": "object", "properties": {"p": {"anyOf": [schema, {"type": "null"}]}}}):
        with pytest.raises(RequestError, match=keyword):
            check_grammar({"json": where})
        tag = {"type": "json_schema", "json_schema": where}
        with pytest.raises(RequestError, match=keyword):
            check_grammar({"structural_tag": json.dumps({"type": "structural_tag", "format": tag})})
    assert accepts(schema, wrong)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({**OBJECT, "title": "t", "description": "d", "default": {}, "examples": [{}], "$comment": "c"}, {"a": 1}, 5),
        ({"$schema": "s", "$id": "i", "type": "string", "readOnly": True, "deprecated": True, "x-own": 1}, "a", 5),
        ({"$defs": {"x": OBJECT}, "$ref": "#/$defs/x", "title": "t", "description": "d"}, {"a": 1}, {"a": "x"}),
        ({"definitions": {"x": OBJECT}, "allOf": [{"$ref": "#/definitions/x"}], "default": {}}, {"a": 1}, 5),
        ({"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "t"}, None, 5),
        ({"type": "string", "enum": ["a", "b"]}, "a", "c"),
        ({"type": "string", "const": "a"}, "a", "b"),
        ({"type": "object", "oneOf": [OBJECT], "discriminator": {"propertyName": "a"}}, {"a": 1}, {"a": "x"}),
        ({**OBJECT, "required": ["a"], "additionalProperties": False, "minProperties": 1}, {"a": 1}, {}),
        ({"properties": {"not": TEXT, "if": TEXT}, "required": ["not"]}, {"not": "a"}, {}),
        ({**LIST, "minItems": 2, "uniqueItems": False}, [1, 1], [1]),
        ({"type": "array", "prefixItems": [TEXT], "items": False}, ["a"], ["a", "b"]),
        ({"type": "integer", "minimum": 3, "format": "int32"}, 3, 1),
        ({"type": ["string", "null"], "pattern": r"^\(\?=$"}, "(?=", "b"),
        ({"type": "array", "items": {"enum": [{"not": 1}]}}, [{"not": 1}], [{"not": 2}]),
    ],
)
def test_a_schema_that_passes_holds(schema: dict[str, Any], right: Any, wrong: Any) -> None:
    check_grammar({"json": schema})
    assert accepts(schema, right)
    assert not accepts(schema, wrong)


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether xgrammar would let a reply be this value."""
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    text = json.dumps(value, separators=(",", ":"))
    return bool(_is_grammar_accept_string(Grammar.from_json_schema(json.dumps(schema)), text))


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


@pytest.mark.parametrize(
    ("row", "bounds"),
    [
        ("a schema or structural tag", (grammar.MAX_TEXT, grammar.MAX_DEPTH)),
        ("its properties", (grammar.MAX_PROPERTIES, grammar.MAX_VALUES)),
        ("its patterns", (grammar.MAX_REGEX, grammar._MOST_IN_PATTERN, grammar.MAX_UNROLLED)),
        ("its different lengths of strings above 16", (grammar.MAX_LENGTHS,)),
        ("a regular expression; a grammar", (grammar.MAX_REGEX, grammar.MAX_GRAMMAR, grammar.MAX_LENGTHS)),
        ("choices", (grammar.MAX_VALUES, grammar.MAX_TEXT)),
    ],
)
def test_the_page_of_the_apis_tells_the_bounds(row: str, bounds: tuple[int, ...]) -> None:
    (line,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row}")]
    assert line.split(" | ")[-1].removesuffix(" |") == "; ".join(f"{bound:,}" for bound in bounds)
    assert grammar._CHEAP == 16
