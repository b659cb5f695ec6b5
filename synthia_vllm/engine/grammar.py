"""Bounds on what a reply may be made to follow: JSON schemas, regular expressions, choices, grammars.

The engine compiles them for its whole vocabulary, on processor cores that it needs itself, with no limit on time. A few
dozen characters can ask for minutes of that. So what is costly is bounded by its form, before any engine is asked: it
takes microseconds, and works in a gateway without xgrammar. What is wrong in itself the engine refuses.

Measured on xgrammar 0.2.8 with a vocabulary of 49,152, seconds of one core at the bounds: 64 levels 0.02 (800: over
60), 500 optional properties 0.3 (1,000: 1.7; 5,000: over 60), 1,000 values of an enum 0.7 (10,000: 8), a grammar of
16 KiB 0.9 (1 MiB: 7 and 0.5 GB), each new length above 128 about 0.6, a pattern that unrolls to 400 items 7 (to 16,000:
over 30).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from synthia_vllm.errors import RequestError

MAX_TEXT = 65_536  # characters of a schema or of all choices
MAX_GRAMMAR = 16_384
MAX_REGEX = 4_096
MAX_DEPTH = 64  # of the JSON; an object in an object is two levels
MAX_PROPERTIES = 500
MAX_VALUES = 1_000  # of all enums, or choices
MAX_LENGTHS = 16  # different lengths of strings above `_CHEAP`, or counts in a regular expression
MAX_UNROLLED = 512  # items of all patterns in a schema, with their counts multiplied out
# Above it xgrammar counts instead of unrolling. In the pattern of a schema it then fails, after vLLM has accepted the
# request: the engine ends it with an error.
_MOST_IN_PATTERN = 128
_CHEAP = 16

_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_COUNT = re.compile(r"\{(\d{1,9})(,?)(\d{0,9})\}")


def check_grammar(given: Mapping[str, Any], *, param: str = "structured_outputs") -> None:
    """Checks the fields of vLLM's StructuredOutputsParams. Raises RequestError for what no engine should be asked."""
    kinds = [kind for kind in _KINDS if given.get(kind) is not None]
    if len(kinds) != 1:
        told = f"not {' and '.join(kinds)}" if kinds else f"one of {', '.join(_KINDS)}"
        raise RequestError(f"{param} takes exactly one kind of constraint, {told}", param=param)
    (kind,) = kinds
    value = given[kind]
    try:
        _CHECKS[kind](value)
    except _Refused as refused:
        raise RequestError(f"{param}: {refused}", param=param) from None


def with_grammar_for_choice(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, with choices that hold control characters as a grammar.

    vLLM 0.29 makes a grammar of choices itself, and leaves their newlines as they are, which xgrammar can't read.
    """
    choices = fields["choice"]
    if all(character.isprintable() for text in choices for character in text):
        return dict(fields)
    literals = (f'"{"".join(map(_escaped, text))}"' for text in choices)
    return {name: value for name, value in fields.items() if name != "choice"} | {
        "grammar": f"root ::= {' | '.join(literals)}"
    }


def _escaped(character: str) -> str:
    """As it stands in a literal of xgrammar's EBNF."""
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


class _Refused(Exception):
    """Why, as the client is told it."""


def _check_json(value: Any) -> None:
    if isinstance(value, str):
        value = _parsed(value, "json")
    if not isinstance(value, dict):
        _refuse("the JSON schema must be an object")
    _check_schema(value)


def _check_tag(value: Any) -> None:
    if not isinstance(value, str):
        _refuse("structural_tag must be a string")
    tag = _parsed(value, "structural_tag")
    if not isinstance(tag, dict):
        _refuse("structural_tag must hold a JSON object")
    _check_schema(tag)


def _check_json_object(value: Any) -> None:
    if value is not True:
        _refuse("json_object must be true; leave it out for free text")


def _check_regex(value: Any) -> None:
    if not isinstance(value, str) or "\0" in value:
        _refuse("regex must be a string without NUL")
    _check_text(value, MAX_REGEX, "regex")
    _check_counts(value)


def _check_grammar(value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        _refuse("grammar must be a string that is not empty")
    _check_text(value, MAX_GRAMMAR, "grammar")
    _check_counts(value)


def _check_choice(value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        _refuse("choice must be a list of strings that is not empty")
    if len(value) > MAX_VALUES:
        _refuse(f"{len(value)} choices, more than {MAX_VALUES}")
    _check_text("".join(value), MAX_TEXT, "choice")


_CHECKS = {
    "json": _check_json,
    "json_object": _check_json_object,
    "regex": _check_regex,
    "choice": _check_choice,
    "grammar": _check_grammar,
    "structural_tag": _check_tag,
}


def _check_schema(schema: dict[str, Any]) -> None:
    properties = values = unrolled = text = 0
    lengths: set[tuple[Any, Any]] = set()
    for key, value, depth in _walk(schema):
        if depth > MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH} levels")
        text += len(key) + (len(value) if isinstance(value, str) else 4)
        if text > MAX_TEXT:
            _refuse(f"longer than {MAX_TEXT} characters")
        if key == "enum" and isinstance(value, list):
            values += len(value)
        if key == "pattern" and isinstance(value, str):
            _check_text(value, MAX_REGEX, "a pattern")
            size, largest = unroll(value)
            if largest > _MOST_IN_PATTERN:
                _refuse(f"a pattern counts to {largest}; the most is {_MOST_IN_PATTERN}, or use maxLength")
            unrolled += size if largest > 1 else 0
        if isinstance(value, dict):
            if key == "properties":
                properties += len(value)
            length = value.get("minLength"), value.get("maxLength")
            if any(isinstance(bound, int) and bound > _CHEAP for bound in length):
                lengths.add(length)
    for count, most, of in (
        (properties, MAX_PROPERTIES, "properties"),
        (values, MAX_VALUES, "values of enums"),
        (len(lengths), MAX_LENGTHS, "different lengths of strings"),
        (unrolled, MAX_UNROLLED, "items of patterns, with their counts multiplied out"),
    ):
        if count > most:
            _refuse(f"{count} {of}, more than {most}")


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """All values in it, each with its key (empty in a list) and its depth. Not recursive: it may be of any depth."""
    waiting: list[tuple[str, Any, int]] = [("", schema, 1)]
    while waiting:
        key, value, depth = waiting.pop()
        yield key, value, depth
        if isinstance(value, dict):
            waiting += [(str(name), inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [("", inner, depth + 1) for inner in value]


def unroll(pattern: str) -> tuple[int, int]:
    """How many items a regular expression has with its counts multiplied out, and the largest count. In one pass."""
    open_groups: list[int] = []  # items before each
    items = last = largest = place = 0
    while place < len(pattern):
        character = pattern[place]
        count = _COUNT.match(pattern, place) if character == "{" else None
        if count:
            times = max(int(count[1]), int(count[3] or 0))
            largest = max(largest, times)
            items = min(items + last * (max(times, 1) - 1), 10**9)
            last = min(last * max(times, 1), 10**9)
            place = count.end()
            continue
        if character == "(":
            open_groups.append(items)
        elif character == ")" and open_groups:
            last = items - open_groups.pop()
        elif character not in ")*+?|^$":
            if character == "[":
                place = _end_of_class(pattern, place)
            elif character == "\\":
                place += 1
            items, last = items + 1, 1
        place += 1
    return items, largest


def _end_of_class(pattern: str, place: int) -> int:
    """Where the `]` is that ends the class that starts here."""
    place += 1
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place


def _check_counts(text: str) -> None:
    """In a regular expression or a grammar; there xgrammar counts cheaply, but each large count has its price."""
    large = sum(max(int(count[1]), int(count[3] or 0)) > _CHEAP for count in _COUNT.finditer(text))
    if large > MAX_LENGTHS:
        _refuse(f"{large} counts above {_CHEAP}, more than {MAX_LENGTHS}")


def _check_text(text: str, most: int, of: str) -> None:
    if len(text) > most:
        _refuse(f"{of} has {len(text)} characters, more than {most}")


def _parsed(text: str, of: str) -> Any:
    _check_text(text, MAX_TEXT, of)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        _refuse(f"{of} is not valid JSON")


def _refuse(why: str) -> NoReturn:
    raise _Refused(why)
