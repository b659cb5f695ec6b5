"""Reads replies as the official `openai` and `anthropic` packages do, and more strictly than they do by themselves."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import httpx2
import pydantic
from hypothesis import strategies as st

from synthia_vllm.api.base import Asker, Counts, GeneratingApi, Model, Prepared
from synthia_vllm.engine.port import Delta, Position, TokenLogprob
from synthia_vllm.errors import RequestError, SynthiaError, UpstreamLost
from synthia_vllm.prompt import STOP_STRINGS

MODEL = Model(names=("Synthia-v3.0-11B", "synthia", "synthia-tot"), context=4096)
CACHED = 3


def asker(**fields: Any) -> Asker:
    return Asker(**{"id": "1f", "user": "ann", "created": 1_764_000_000, **fields})


def prepared(api: GeneratingApi, body: dict[str, Any], model: Model = MODEL) -> Prepared:
    return api.prepare(api.decode(json.dumps(body).encode()), model, asker())


def reply(ready: Prepared, deltas: Sequence[Delta], error: SynthiaError | None = None) -> Iterator[bytes]:
    """The chunks that a gateway would send for these deltas; `error` ends them in the place of the last."""
    counts = Counts(ready.prompt_tokens, CACHED, 0)
    for number, delta in enumerate(deltas):
        counts.generated += len(delta.ids)
        if number == 0:
            yield ready.reply.start(counts)
        yield ready.reply.feed(delta, counts)
    yield ready.reply.end(counts) if error is None else ready.reply.error(error)


def transport(
    api: GeneratingApi, deltas: Sequence[Delta], *, model: Model = MODEL, error: SynthiaError | None = None
) -> httpx2.MockTransport:
    """A gateway with only this API, whose engine says what it is told to."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.url.path == api.path
        try:
            ready = api.prepare(api.decode(request.content), model, asker())
        except RequestError as refused:
            return httpx2.Response(refused.status, json=api.form(refused, "req"))
        kind = "text/event-stream; charset=utf-8" if ready.streamed else "application/json"
        body = b"".join(reply(ready, deltas, error))
        return httpx2.Response(200, content=body, headers={"content-type": kind})

    return httpx2.MockTransport(answer)


def events(stream: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events, each named as its `type` says."""
    found = []
    assert stream.endswith(b"\n\n")
    for block in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        told: dict[str, Any] = json.loads(data.removeprefix("data: "))
        assert name == f"event: {told['type']}"
        found.append(told)
    return found


def strictly(kind: Any, value: Any) -> Any:
    """The value as one of a package's own types: nothing missing, nothing unknown, nothing of another type."""
    read = _adapter(kind).validate_json(json.dumps(value), strict=True)
    _check_known(read)
    return read


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _check_known(value: Any) -> None:
    if isinstance(value, pydantic.BaseModel):
        assert not value.model_extra, f"{type(value).__name__} has no {sorted(value.model_extra)}"
        for _, inner in value:
            _check_known(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_known(inner)


def said(*texts: str, finish: Any = "stop", stop_reason: Any = None) -> list[Delta]:
    """One token a text; the last ends the sequence."""
    deltas = [Delta(ids=[number + 5], text=text) for number, text in enumerate(texts)]
    deltas[-1].finish, deltas[-1].stop_reason = finish, stop_reason
    return deltas


def position(text: str, logprob: float = -0.5, top: int = 0) -> Position:
    ranked = [TokenLogprob(rank, f"t{rank}", -float(rank), rank) for rank in range(1, top + 1)]
    return Position(TokenLogprob(7, text, logprob, 1), ranked)


@st.composite
def scripts(draw: st.DrawFn, own: Sequence[str] = ()) -> list[Delta]:
    """What an engine may say: a text in any pieces that ends by itself, at a stop string, or at its length."""
    pieces = ["a", "Orca", " ", "\n", "é", "🐋", "U", "USE", "S", ":", '"', "\\", "\x00", *own, *STOP_STRINGS[:2]]
    text = "".join(draw(st.lists(st.sampled_from(pieces), max_size=12)))
    end = draw(st.sampled_from(["eos", "length", *own, *STOP_STRINGS]))
    reason = None if end in ("eos", "length") else end
    text += reason or ""
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return said(*parts, finish="length" if end == "length" else "stop", stop_reason=reason)


def generated(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**18, 10**400]),
    st.sampled_from([0.5, -1.5, 1e300, 300.0]),
)
texts = st.sampled_from(
    ["", "x", "300", "true", "auto", "text", "json_schema", "assistant", "\x00", "é" * 300, "USER:"]
)
names = st.sampled_from(["type", "role", "content", "text", "format", "schema", "name", "json", "regex", "choice", "1"])
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


def bodies(valid: dict[str, Any], fields: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A valid request with anything at all in some of its fields."""
    return st.dictionaries(st.sampled_from(sorted(fields)), anything, min_size=1, max_size=3).map(
        lambda changed: {**valid, **changed}
    )


def check_bounded_or_refused(api: GeneratingApi, body: dict[str, Any]) -> None:
    """Any other exception than RequestError fails the test."""
    try:
        ready = prepared(api, body)
    except RequestError:
        return
    assert len(ready.sequences) == 1
    assert 1 <= ready.max_generated <= 2**31
    (generation,) = ready.sequences
    assert generation.sampling.max_tokens == ready.max_generated
    assert generation.text
    body_out = b"".join(reply(ready, said("ok")))
    assert events(body_out) if ready.streamed else json.loads(body_out)


def broken(kind: Callable[[str], SynthiaError] = UpstreamLost) -> SynthiaError:
    return kind("the engine broke off")
