"""What every API shares: how a request is read, what it becomes, and what its reply has to offer."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from synthia_vllm.api.errors import ErrorForm
from synthia_vllm.engine.grammar import MAX_DEPTH
from synthia_vllm.engine.port import Delta, Generation
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import MalformedBody, RequestError, SynthiaError
from synthia_vllm.prompt import MarkerPolicy, Style

# Bounds that several APIs share. What is over them is a 400 that names the field.
MAX_TOKENS = 2**31 - 1  # of any count of tokens
MAX_SEQUENCES = 1024  # replies to one request: prompts times `n`
MAX_N = 128
MAX_STOP_CHARACTERS = 256
MAX_CONTAINERS = 65_536  # lists and objects in a body
MAX_ITEMS = 2**18  # values in a body, as commas tell

_LONG_BODY = 64 * 1024  # bytes; shorter ones can't hold up anybody
_AT = re.compile(r" - at `(?:key` in `)?\$\.?(.*)`$", re.DOTALL)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model behind a gateway, as far as APIs need to know it."""

    names: Sequence[str]  # that clients may ask for, its own first
    tokenizer: Tokenizer | None = None  # None: prompts are counted by estimate
    context: int | None = None  # most tokens of prompt and reply together
    style: Style = "card"
    turn_end: str = ""
    role_markers: MarkerPolicy = "allow"


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks, as far as a generation depends on it."""

    id: str  # of the request, unique
    user: str
    session: str = ""  # X-Session-Id
    salt: Callable[[str | None], str | None] = lambda given: None  # of the prefix cache; `given` is the client's own
    created: int = 0  # Unix time, seconds
    on_attempt: Callable[[str], Mapping[str, str]] = lambda replica: {}  # for each Generation


@dataclass(kw_only=True)
class Prepared:
    """A request as the layers and the engine take it, and the object that makes its reply."""

    sequences: Sequence[Generation]
    reply: "Reply"
    streamed: bool
    prompt_tokens: int  # over all prompts, each counted once however many replies it gets
    max_generated: int  # over all sequences
    exact: bool  # whether `prompt_tokens` is the engine's own count, not an estimate
    replies: int = 1  # sequences to each prompt: those of one prompt follow each other in `sequences`


@dataclass(slots=True)
class Counts:
    """What a reply tells as its usage. Tokens."""

    prompt: int
    cached: int
    generated: int


class Reply(Protocol):
    """Makes one reply's bytes. Not streamed, `start` and `feed` give nothing and `end` gives the whole reply.

    Called in this order: `start` with the first delta's arrival, `feed` with every delta, `end` once. `error` may come
    instead of any of them, after which nothing follows.
    """

    def start(self, counts: Counts) -> bytes: ...

    def feed(self, delta: Delta, counts: Counts) -> bytes: ...

    def end(self, counts: Counts) -> bytes | list[bytes]:
        """In pieces where it is long, to be sent one by one."""
        ...

    def error(self, error: SynthiaError) -> bytes:
        """The event that tells of an error in the middle of a stream."""
        ...


class GeneratingApi(Protocol):
    """One route that generates. `decode` and `prepare` raise RequestError, and run in a thread where a body is long."""

    path: str
    body: type[msgspec.Struct]  # what `decode` gives
    form: ErrorForm

    def decode(self, body: bytes) -> Any:
        """The request, strictly read and within its bounds. It has a `model`: the name that was asked for, or None."""
        ...

    def prepare(self, request: Any, model: Model, asker: Asker) -> Prepared: ...


class AnsweringApi(Protocol):
    """One route that answers from the gateway alone. Raises RequestError."""

    path: str
    body: type[msgspec.Struct]  # what `decode` gives
    form: ErrorForm

    def decode(self, body: bytes) -> Any: ...

    def answer(self, request: Any, model: Model) -> bytes:
        """The whole reply, JSON."""
        ...


def decode(body: bytes, kind: type[T]) -> T:
    """A JSON object as a struct: numbers are numbers, `true` is true, unknown fields are ignored.

    Raises MalformedBody for what is no JSON, RequestError that names the field for all else.
    """
    if len(body) > _LONG_BODY:
        _check_items(body)
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look at the names and texts that it passes over
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        if kind is not object:
            decode(body, object)  # of a body that is no JSON at all, the field tells nothing
        raise field_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(str(error)) from None
    except RecursionError:
        raise MalformedBody("nested too deeply") from None


def _check_items(body: bytes) -> None:
    """Raises RequestError for a body of far too many small things, whose decoding would hold up everybody.

    Brackets and commas in texts count as well; no prompt that fits a model has so many.
    """
    containers = body.count(b"[") + body.count(b"{")
    if containers > MAX_CONTAINERS:
        raise RequestError(
            f"the body has {containers} lists and objects; at most {MAX_CONTAINERS} are read", param="body"
        )
    if (items := body.count(b",")) > MAX_ITEMS:
        raise RequestError(f"the body has {items} values; at most {MAX_ITEMS} are read", param="body")


def field_error(message: str) -> RequestError:
    """msgspec's complaint as an error that names the field: `Expected `int`, got `str` - at `$.max_tokens``."""
    found = _AT.search(message)
    param = found[1] if found and found[1] not in ("", "[...]") else "body"  # msgspec can't name it everywhere
    told = (message[: found.start()] if found else message).replace("`", "")
    missing = re.match(r"Object missing required field (\w+)", told)
    if missing:
        param = missing[1] if param == "body" else f"{param}.{missing[1]}"
        told = "is required"
    return RequestError(f"{param}: {told[0].lower() + told[1:]}", param=param)


def event(data: bytes, name: bytes = b"") -> bytes:
    """One server-sent event (WHATWG HTML, 9.2)."""
    return b"event: " + name + b"\ndata: " + data + b"\n\n" if name else b"data: " + data + b"\n\n"


def check_depth(value: Any, param: str) -> None:
    """Raises RequestError for free-form JSON that is nested deeper than any schema is."""
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(inner for inner in item.values() if isinstance(inner, dict | list))
            elif isinstance(item, list):
                deeper.extend(inner for inner in item if isinstance(inner, dict | list))
        if not deeper:
            return
        level = deeper
    raise RequestError(f"{param} is nested more than {MAX_DEPTH} deep", param=param)
