"""Bounds on what a reply may be made to follow: JSON schemas, regular expressions, choices, grammars.

The engine compiles them for its whole vocabulary, on processor cores that it needs itself, with no limit on time. A few
dozen characters can ask for minutes of that. So what is costly is bounded by its form, before any engine is asked: it
takes microseconds, and works in a gateway without xgrammar. What is wrong in itself the engine refuses.

Keywords of JSON Schema that xgrammar 0.2.8 passes over are refused too: the reply would look constrained and not be.
What it does otherwise is left: `oneOf` as `anyOf`, `type` beside `enum` or `const`, and annotations.

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

# Keywords that xgrammar passes over wherever they stand, or vLLM refuses without saying which.
_UNDONE = (
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "uniqueItems", "contains", "multipleOf",
    "patternProperties", "propertyNames", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_CHOICES = ("anyOf", "oneOf", "allOf")
_DECIDING = ("$ref", "const", "enum", *_CHOICES)  # beside them xgrammar looks at no other keyword
_OF_OBJECTS = ("properties", "additionalProperties", "unevaluatedProperties")
_OF_LISTS = ("items", "prefixItems", "unevaluatedItems")
_LENGTHS = ("minLength", "maxLength")
_NEED_TYPE = (
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern", "format", *_LENGTHS,
    "required", "minProperties", "maxProperties", "minItems", "maxItems",
)  # fmt: skip
_ASSERTING = frozenset((*_DECIDING, *_OF_OBJECTS, *_OF_LISTS, *_NEED_TYPE))
_FORMATS = frozenset((
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
    "uri-template", "json-pointer", "relative-json-pointer",
))  # fmt: skip
_LOOKAHEAD = re.compile(r"(?<!\\)\(\?[=!]")

_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_FIELDS = ("structured_outputs", "response_format")  # as engines name them
_OF_GRAMMAR = re.compile(r"grammar|schema|regex|choices|structural tag|structured output", re.IGNORECASE)
_INTERNALS = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")  # xgrammar's: the time, and where in its source
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


def refusal_of_engine(error: RequestError, param: str | None) -> RequestError:
    """What an engine refused as the client is told it: without its internals, and with the field that it wrote.

    `param` is that of the request's schema or grammar. Engines name their own field, or none.
    """
    message = _INTERNALS.sub("", error.message).strip()
    if param is None or not (_OF_GRAMMAR.search(message) or str(error.param).startswith(_FIELDS)):
        error.message = message  # and whatever else it tells of itself, such as the limit that it is over
        return error
    return RequestError(message if message.startswith(param) else f"{param}: {message}", param=param)


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
    _check_keywords(value)


def _check_tag(value: Any) -> None:
    if not isinstance(value, str):
        _refuse("structural_tag must be a string")
    tag = _parsed(value, "structural_tag")
    if not isinstance(tag, dict):
        _refuse("structural_tag must hold a JSON object")
    _check_schema(tag)
    for key, inner, _ in _walk(tag):
        if key in ("schema", "json_schema") and isinstance(inner, dict):
            _check_keywords(inner)


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


def _check_keywords(schema: dict[str, Any]) -> None:
    """Refuses what xgrammar would pass over, in a schema and in those inside it."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        _check_one(one)
        inner = [one.get(key) for key in ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")]
        for key in (*_CHOICES, "prefixItems"):
            inner += found if isinstance(found := one.get(key), list) else ()
        for key in ("properties", "$defs", "definitions"):
            inner += found.values() if isinstance(found := one.get(key), dict) else ()
        waiting += [each for each in inner if isinstance(each, dict)]


def _check_one(schema: dict[str, Any]) -> None:
    for key in _UNDONE:
        if key in schema and schema[key] is not False:
            _refuse(f"the keyword {key} is not done by the engine")
    deciding = next((key for key in _DECIDING if key in schema), None)
    if deciding is not None:
        return _check_deciding(schema, deciding)
    kinds = schema.get("type")
    if kinds is None and not any(key in schema for key in (*_OF_OBJECTS, *_OF_LISTS)):
        if (lonely := next((key for key in _NEED_TYPE if key in schema), None)) is not None:
            _refuse(f"{lonely} needs a type beside it: without one the engine passes over it")
        return None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds:
        _check_string(schema)
    if "object" in kinds or None in kinds:
        _check_required(schema)
    return None


def _check_deciding(schema: dict[str, Any], deciding: str) -> None:
    """A schema with `$ref`, `const`, `enum` or a choice."""
    value = schema[deciding]
    if deciding == "$ref" and isinstance(value, str) and value != "#" and not value.startswith("#/"):
        _refuse(f"$ref is '#' or begins with '#/', not {value[:100]!r}")
    if deciding == "allOf" and isinstance(value, list) and len(value) > 1:
        _refuse("allOf of several schemas is not done by the engine; write them as one")
    for key in schema:
        if key in _ASSERTING and key != deciding:
            _refuse(f"beside {deciding} the engine passes over {key}; write it inside")
    if deciding in _CHOICES and "type" in schema:
        for branch in value if isinstance(value, list) else ():
            if isinstance(branch, dict) and not any(key in branch for key in ("type", *_DECIDING)):
                _refuse(f"beside {deciding} the engine passes over type; write it into each of its schemas")


def _check_required(schema: dict[str, Any]) -> None:
    required, known = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else ():
        if isinstance(name, str) and not (isinstance(known, dict) and name in known):
            _refuse(f"required names {name[:100]!r}, which is not in properties: the engine passes over it")


def _check_string(schema: dict[str, Any]) -> None:
    wanted = schema.get("format")
    if isinstance(wanted, str) and wanted not in _FORMATS:
        _refuse(f"the format {wanted[:100]!r} is not done by the engine; use pattern")
    if isinstance(pattern := schema.get("pattern"), str) and _LOOKAHEAD.search(pattern):
        _refuse("a pattern looks ahead, which the engine passes over")
    if "format" in schema and "pattern" in schema:
        _refuse("beside format the engine passes over pattern; send one of them")
    shaping = next((key for key in ("pattern", "format") if key in schema), None)
    if shaping is not None and (key := next((key for key in _LENGTHS if key in schema), None)) is not None:
        _refuse(f"beside {shaping} the engine passes over {key}; write the length into a pattern")


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
