"""Makes replies of scripted deltas, and reads them as the official `openai` package does, strictly."""

import json
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from synthia_vllm.api.base import Asker, Counts, GeneratingApi, Model, Prepared
from synthia_vllm.api.chat import ChatCompletions
from synthia_vllm.api.completions import Completions
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import SynthiaError
from tests.api.byte_tokenizer import byte_tokenizer
from tests.api.official import transport

NAMES = ("Synthia-v3.0-11B", "synthia", "synthia-tot")
MODEL = Model(names=NAMES, tokenizer=byte_tokenizer(), context=4096)
UNKNOWN = Model(names=NAMES)
ASKER = Asker(id="r1", user="ann", created=1_764_000_000)
CACHED = 3


def prepared(
    api: GeneratingApi, body: dict[str, Any] | bytes, *, model: Model = MODEL, asker: Asker = ASKER
) -> Prepared:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return api.prepare(api.decode(content), model, asker)


def replied(ready: Prepared, deltas: Sequence[Delta]) -> bytes:
    """What a gateway sends for these deltas."""
    counts = Counts(ready.prompt_tokens, CACHED, 0)
    sent = ready.reply.start(counts)
    for delta in deltas:
        counts.generated += len(delta.ids)
        sent += ready.reply.feed(delta, counts)
    end = ready.reply.end(counts)
    return sent + (end if isinstance(end, bytes) else b"".join(end))


def ask(api: GeneratingApi, body: dict[str, Any], deltas: Sequence[Delta], **given: Any) -> dict[str, Any]:
    """A whole reply."""
    content = replied(prepared(api, body, **given), deltas)
    kind: Any = ChatCompletion if isinstance(api, ChatCompletions) else Completion
    told: dict[str, Any] = json.loads(content)
    checked = json.loads(content)
    for choice in checked["choices"]:
        if body.get("echo"):  # the package has no type for OpenAI's own null of a prompt's first token
            choice["logprobs"] = None
    kind.model_validate_json(json.dumps(checked), strict=True)
    return told


def stream(api: GeneratingApi, body: dict[str, Any], deltas: Sequence[Delta], **given: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed reply."""
    content = replied(prepared(api, {**body, "stream": True}, **given), deltas)
    events = content.decode().removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    if not isinstance(api, Completions):  # whose package has no type for a chunk: `finish_reason` can't be null in it
        for chunk in chunks:
            ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
    return chunks


def openai_client(api: GeneratingApi, deltas: Sequence[Delta], error: SynthiaError | None = None) -> openai.OpenAI:
    """The official client before a gateway with only this API."""
    http = httpx2.Client(transport=transport(api, deltas, model=MODEL, error=error))
    return openai.OpenAI(base_url="http://gateway/v1", api_key="none", max_retries=0, http_client=http)


def script(*texts: str, finish: Any = "stop", stop: Any = None, sequence: int = 0) -> list[Delta]:
    """A delta a text, of one token each, whose id is its place."""
    return [
        Delta(
            [place],
            text,
            finish if place == len(texts) - 1 else None,
            stop if place == len(texts) - 1 else None,
            sequence=sequence,
        )
        for place, text in enumerate(texts)
    ]
