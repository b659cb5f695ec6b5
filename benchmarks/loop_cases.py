"""The requests that `benchmarks.loop` sends: each as large as a gateway's bounds let it be, or over them."""

import gc
import gzip
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import msgspec

from benchmarks.null_port import NullEnginePort
from benchmarks.streams import CHAT, COMPLETIONS
from synthia_vllm.api.base import MAX_DEPTH, MAX_STOP_CHARACTERS
from synthia_vllm.api.conversation import MAX_MESSAGES
from synthia_vllm.engine.demo import NAME, demo_model
from synthia_vllm.engine.local import LocalEngine
from synthia_vllm.engine.port import Delta, Engine, Generation, Position, TokenLogprob
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.prompt import MAX_CLIENT_STOPS

CONTEXT, LARGE = 8192, 1 << 22
BODY = 4 * 2**20 - 4096  # bytes of what makes a body large
TOP = 20
_SENTENCE = "What is an orca, and what does it eat? It eats fish, squid and seals. "


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model())


def null(**given: Any) -> NullEnginePort:
    return NullEnginePort(**{"tokenizer": tokenizer(), "context": CONTEXT, "names": [NAME], **given})


@dataclass(frozen=True)
class Case:
    """A request: what its body says, where it goes, and the engine that would answer it."""

    name: str
    content: Callable[[], Any]  # JSON in the making, or bytes
    path: str = CHAT
    engine: Callable[[], Engine] = null
    encoding: str = "identity"

    def body(self) -> bytes:
        made = self.content()
        return made if isinstance(made, bytes) else msgspec.json.encode({"model": NAME, **made})


def cases() -> Iterator[Case]:
    """All of them. Bodies and engines are made when they are asked for."""
    large = "context of 4 M tokens"
    yield Case("a short chat", lambda: chat("What is an orca?"))
    yield Case("a chat of 4 MB", lambda: chat(long_text()))
    yield Case(f"a chat of 4 MB, {large}", lambda: chat(long_text()), engine=roomy)
    yield Case("a chat of one word of 4 MB", lambda: chat("x" * BODY))
    yield Case("a chat of 4 MB of escapes", escaped)
    yield Case("a chat of 16,384 messages", lambda: messages(MAX_MESSAGES, _SENTENCE * 2))
    yield Case(f"a chat of 16,384 messages, {large}", lambda: messages(MAX_MESSAGES, _SENTENCE * 2), engine=roomy)
    yield Case("a chat of 100,000 messages", lambda: messages(100_000, "a"))
    yield Case("a message of 100,000 parts", lambda: chat([{"type": "text", "text": "a"}] * 100_000))
    yield Case("a message nested 100,000 deep", lambda: b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield Case("a number of 4 million digits", lambda: b'{"messages":[],"max_tokens":1' + b"0" * BODY + b"}")
    yield Case("256 MB as gzip", lambda: gzip.compress(bytes(2**28)), encoding="gzip")
    yield Case("a completion of 1 M token ids", lambda: {"prompt": [300] * 10**6}, COMPLETIONS)
    yield Case(f"a completion of 1 M token ids, {large}", lambda: {"prompt": [300] * 10**6}, COMPLETIONS, roomy)
    yield Case("a completion of 2 M token ids", lambda: {"prompt": [1] * (BODY // 2)}, COMPLETIONS)
    yield Case("completions of 1,024 prompts", lambda: {"prompt": [[300] * 800] * 1024, "max_tokens": 9}, COMPLETIONS)
    yield Case("tokenize 4 MB", lambda: {"prompt": long_text()}, "/tokenize")
    yield Case("detokenize 1 M token ids", lambda: {"tokens": [300] * 10**6}, "/detokenize")
    yield Case("16 stop strings, text full of their beginnings", stopping, engine=stammering)
    yield Case("16 stop strings, the same, whole", lambda: stopping() | {"stream": False}, engine=stammering)
    yield Case("128 replies", lambda: chat("a", n=128, max_tokens=50), engine=steady)
    yield Case("1,024 sequences", lambda: {"prompt": ["a"] * 8, "n": 128, "max_tokens": 50}, COMPLETIONS, steady)
    yield Case("a schema of 250 kB", lambda: schema(MAX_DEPTH - 8, 250_000))
    yield Case("a schema nested 50,000 deep", lambda: schema_bytes(50_000))
    yield Case(f"prompt_logprobs={TOP} of a full context", prompt_logprobs, engine=KnownPrompts)
    yield Case(f"prompt_logprobs={TOP} of a full context, by vLLM's objects", prompt_logprobs, engine=of_vllm)
    yield Case(f"top_logprobs={TOP} of 8,000 tokens, whole", lambda: logprobs(stream=False))
    yield Case(f"top_logprobs={TOP} of 8,000 tokens, streamed", lambda: logprobs(stream=True))


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 50, **fields}


def messages(count: int, text: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at in range(count)]}


def long_text() -> str:
    return _SENTENCE * (BODY // len(_SENTENCE))


def escaped() -> bytes:
    text = b"\\u00e4" * (BODY // 6)
    return b'{"model":"%b","messages":[{"role":"user","content":"%b"}]}' % (NAME.encode(), text)


def stopping() -> dict[str, Any]:
    """Stop strings that differ in their last character alone."""
    stops = ["a" * (MAX_STOP_CHARACTERS - 1) + chr(ord("A") + at) for at in range(MAX_CLIENT_STOPS)]
    return chat("a", stop=stops, max_tokens=4000, ignore_eos=True, stream=True)


def schema(depth: int, size: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "object", "properties": {f"field{at}": {} for at in range(size // 16)}}
    for _ in range(depth):
        inner = {"not": inner}
    return chat("a", response_format={"type": "json_schema", "json_schema": {"name": "deep", "schema": inner}})


def schema_bytes(depth: int) -> bytes:
    inner = b'{"not":' * depth + b"{}" + b"}" * depth
    asked = msgspec.json.encode({"model": NAME, **chat("a", structured_outputs={"json": "HERE"})})
    return asked.replace(b'"HERE"', inner)


def prompt_logprobs() -> dict[str, Any]:
    return chat(_SENTENCE * 400, max_tokens=1, prompt_logprobs=TOP)


def logprobs(*, stream: bool) -> dict[str, Any]:
    return chat("a", logprobs=True, top_logprobs=TOP, max_tokens=8000, stream=stream)


def roomy() -> Engine:
    return null(context=LARGE)


def steady() -> Engine:
    """At full speed the stand-in itself takes long turns with so many."""
    return null(tokens_per_second=20)


def stammering() -> Engine:
    return null(text=("a" * (MAX_STOP_CHARACTERS - 2) + "!") * 8)


class KnownPrompts(NullEnginePort):
    """Has the log-probabilities of prompts ready: making them is no gateway's work."""

    def __init__(self) -> None:
        super().__init__(tokenizer=tokenizer(), context=CONTEXT, names=[NAME])
        each = [TokenLogprob(300 + at, " word", -0.5 - at, at + 1) for at in range(TOP)]
        self._known: list[Position | None] = [Position(each[0], list(each)) for _ in range(CONTEXT)]
        gc.freeze()

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        sampling = msgspec.structs.replace(generation.sampling, prompt_logprobs=None)
        first = True
        async for delta in super().generate(replace(generation, sampling=sampling)):
            if first:
                delta.prompt_logprobs = [None, *self._known[1 : len(generation.prompt)]]
                first = False
            yield delta


def of_vllm() -> Engine:
    """The engine of this process, over an AsyncLLM that answers at once with vLLM's own objects."""
    from vllm.logprobs import Logprob

    entries = [{300 + at: Logprob(-0.5 - at, at + 1, " word") for at in range(TOP)} for _ in range(CONTEXT)]
    gc.freeze()

    class Answering:
        model_config = SimpleNamespace(model=NAME, max_model_len=CONTEXT)

        async def generate(self, prompt: dict[str, Any], *_: Any, **__: Any) -> AsyncGenerator[Any, None]:
            found = [None, *entries[1 : len(prompt["prompt_token_ids"])]]
            one = SimpleNamespace(
                token_ids=[300], text=" word", finish_reason="length", stop_reason=None, logprobs=None
            )
            yield SimpleNamespace(outputs=[one], num_cached_tokens=0, prompt_logprobs=found)

    return LocalEngine(Answering(), tokenizer(), [NAME])
