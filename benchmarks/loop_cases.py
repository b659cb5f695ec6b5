"""The requests that `benchmarks.loop` sends: each as large as a gateway's bounds let it be, or over them."""

import asyncio
import gzip
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import msgspec

from synthia_vllm.api.base import MAX_SEQUENCES, MAX_STOP_CHARACTERS
from synthia_vllm.api.conversation import MAX_MESSAGES
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.bench.streams import CHAT, COMPLETIONS
from synthia_vllm.engine.demo import NAME, demo_model
from synthia_vllm.engine.grammar import MAX_DEPTH
from synthia_vllm.engine.local import LocalEngine
from synthia_vllm.engine.port import Delta, Engine, Generation, Position, TokenLogprob
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import RequestError
from synthia_vllm.prompt import MAX_CLIENT_STOPS

CONTEXT, LARGE = 8192, 1 << 22
BODY = 4 * 2**20 - 4096  # bytes of what makes a body large
TOP = 20
BUSY_MS = 0.3
_RATE = 20.0  # tokens a second; at full speed the stand-in itself would take long turns with so many
_OUTPUTS_A_TURN = 128  # vLLM's VLLM_V1_OUTPUT_PROC_CHUNK_SIZE
MANY = "1,024 sequences"
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
    stay: tuple[str, ...] = ()  # seconds after which the client leaves

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
    yield Case("128 replies", lambda: chat("a", n=128, max_tokens=10), engine=Steady)
    yield Case("1,024 prompts of 250 token ids", lambda: {"prompt": [[300] * 250] * 1024}, COMPLETIONS, Steady)
    yield Case("1,024 prompts, each another", different, COMPLETIONS, Steady)
    yield Case(MANY, many, COMPLETIONS, Steady)
    yield Case(f"{MANY}, streamed", lambda: many() | {"stream": True}, COMPLETIONS, Steady)
    yield Case(f"{MANY}, the engine busy for {BUSY_MS:g} ms with each", many, COMPLETIONS, Busy)
    yield Case(f"{MANY}, refused by it", many, COMPLETIONS, lambda: Busy(error=RequestError("no")))
    yield Case(f"{MANY}, broken off by it", many, COMPLETIONS, lambda: Busy(faults=Faults(break_after=3)))
    yield Case(f"{MANY}, the client leaves", many, COMPLETIONS, Busy, stay=("0.3",))
    yield Case("a schema of 250 kB", lambda: schema(MAX_DEPTH - 8, 250_000))
    yield Case("a schema nested 50,000 deep", lambda: schema_bytes(50_000))
    yield Case(f"prompt_logprobs={TOP} of a full context", prompt_logprobs, engine=KnownPrompts)
    yield Case(f"prompt_logprobs={TOP} of 8 full contexts", several_prompt_logprobs, COMPLETIONS, KnownPrompts)
    yield Case(f"prompt_logprobs={TOP} of a full context, by vLLM", prompt_logprobs, engine=of_vllm)
    for how in ({"stream": False}, {"stream": True}, {"stream": True, "stream_interval": 4000}):
        told = ", ".join(f"{name} {value}" for name, value in how.items())
        yield Case(f"top_logprobs={TOP} of 4,000 tokens, {told}, by vLLM", partial(logprobs, **how), engine=of_vllm)
    yield Case(f"top_logprobs={TOP} of 128 replies, by vLLM", partial(logprobs, n=128, max_tokens=20), engine=of_vllm)


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


def several_prompt_logprobs() -> dict[str, Any]:
    return {"prompt": [[300] * (CONTEXT - 2)] * 8, "max_tokens": 1, "prompt_logprobs": TOP}


def logprobs(**fields: Any) -> dict[str, Any]:
    return chat("a", **{"logprobs": True, "top_logprobs": TOP, "max_tokens": 4000, **fields})


def many() -> dict[str, Any]:
    return {"prompt": ["a"] * 8, "n": MAX_SEQUENCES // 8, "max_tokens": 10}


def different() -> dict[str, Any]:
    """A body that is read and prepared by the event loop itself."""
    return {"prompt": [f"orca {at}" for at in range(MAX_SEQUENCES)], "max_tokens": 5}


def roomy() -> Engine:
    return null(context=LARGE)


def stammering() -> Engine:
    return null(text=("a" * (MAX_STOP_CHARACTERS - 2) + "!") * 8)


class KnownPrompts(NullEnginePort):
    """Has the log-probabilities of prompts ready: making them is no gateway's work."""

    def __init__(self) -> None:
        super().__init__(tokenizer=tokenizer(), context=CONTEXT, names=[NAME])
        each = [TokenLogprob(300 + at, " word", -0.5 - at, at + 1) for at in range(TOP)]
        self._known: list[Position | None] = [Position(each[0], list(each)) for _ in range(CONTEXT)]

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        sampling = msgspec.structs.replace(generation.sampling, prompt_logprobs=None)
        first = True
        async for delta in super().generate(replace(generation, sampling=sampling)):
            if first:
                delta.prompt_logprobs = [None, *self._known[1 : len(generation.prompt)]]
                first = False
            yield delta


class Steady(NullEnginePort):
    """Has its tokens at the same moments for all sequences, and hands them over as vLLM does: so many in a turn."""

    def __init__(self, **given: Any) -> None:
        super().__init__(tokenizer=tokenizer(), context=CONTEXT, names=[NAME], tokens_per_second=_RATE, **given)
        self._asleep: list[asyncio.Future[None]] = []

    async def _next_step(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._asleep:
            loop.call_later(1 / _RATE - loop.time() % (1 / _RATE), self._wake)
        waiting = loop.create_future()
        self._asleep.append(waiting)
        await waiting

    def _wake(self) -> None:
        self._go_on(self._asleep)
        self._asleep = []

    def _go_on(self, waiting: list[asyncio.Future[None]]) -> None:
        for one in waiting[:_OUTPUTS_A_TURN]:
            if not one.done():
                one.set_result(None)
        if later := waiting[_OUTPUTS_A_TURN:]:
            asyncio.get_running_loop().call_soon(self._go_on, later)


class Busy(Steady):
    """Is at work for each sequence that begins or is left, as vLLM is that hands it to its own process."""

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        work()
        try:
            async with aclosing(super().generate(generation)) as deltas:
                async for delta in deltas:
                    yield delta
        except (asyncio.CancelledError, GeneratorExit):
            work()
            raise


def work() -> None:
    end = time.thread_time() + BUSY_MS / 1000
    while time.thread_time() < end:
        pass


@cache
def of_vllm() -> Engine:
    """The engine of this process over a stand-in for AsyncLLM, at full speed, with vLLM's own log-probabilities."""
    import torch
    from vllm.logprobs import create_prompt_logprobs, create_sample_logprobs
    from vllm.tokenizers import get_tokenizer
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    backend = get_tokenizer(str(demo_model()))
    ids = torch.arange(CONTEXT * (TOP + 1)).reshape(CONTEXT, -1) % 10_000 + 300
    known = LogprobsTensors(ids, -ids / 1000, torch.ones(CONTEXT))
    arrays = [each.numpy() for each in known[:3]]

    class Answering:
        model_config = SimpleNamespace(model=NAME, max_model_len=CONTEXT)

        async def add_request(self, request_id: str, prompt: dict[str, Any], params: Any, **_: Any) -> SimpleNamespace:
            """Gives what stands in for vLLM's collector."""
            outputs = self._outputs(prompt, params)
            return SimpleNamespace(request_id=request_id, get_nowait=lambda: None, get=outputs.__anext__)

        async def _outputs(self, prompt: dict[str, Any], params: Any) -> AsyncGenerator[SimpleNamespace, None]:
            """As vLLM's output handler: a token a turn, of all sequences in the same one."""
            own, prompts, interval = params.logprobs, params.prompt_logprobs, params.stream_interval or 1
            made = LogprobsProcessor(
                backend,
                logprobs=None if own is None else create_sample_logprobs(params.flat_logprobs),
                prompt_logprobs=None if prompts is None else create_prompt_logprobs(params.flat_logprobs),
                cumulative_logprob=0.0,
                num_logprobs=own,
                num_prompt_logprobs=prompts,
            )
            if prompts is not None:
                later = slice(len(prompt["prompt_token_ids"]) - 1)
                made._update_prompt_logprobs(LogprobsTensors(*(each[later] for each in known[:3])))
            sent, last = 0, params.max_tokens
            for number in range(1, last + 1):
                await asyncio.sleep(0)  # the handler's turn
                if own is not None:
                    one = slice(number - 1, number)
                    made._update_sample_logprobs(LogprobsLists(*(each[one] for each in arrays), None))
                await asyncio.sleep(0)
                if number in (1, last) or number - sent >= interval:
                    new, sent = number - sent, number
                    said = SimpleNamespace(
                        token_ids=[300] * new,
                        text=" word" * new,
                        finish_reason="length" if number == last else None,
                        stop_reason=None,
                        logprobs=None if made.logprobs is None else made.logprobs[-new:],
                    )
                    yield SimpleNamespace(
                        outputs=[said],
                        num_cached_tokens=0,
                        prompt_logprobs=made.pop_prompt_logprobs(),
                        finished=number == last,
                    )

    return LocalEngine(Answering(), tokenizer(), [NAME])
