"""What one attempt brings of a sequence: an engine's events as deltas."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, ClassVar

import msgspec

from synthia_vllm.engine.port import Delta, Generation, Position
from synthia_vllm.engine.resume import Replayed
from synthia_vllm.engine.transcript import Transcript
from synthia_vllm.replicas.attempt import Attempt, AttemptLost, LossReason, all_of
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.http import EngineRefused, error_message
from synthia_vllm.replicas.logprobs import Entry, positions, prompt_positions, texts_of

# Ends that are none: the engine is going, or has failed.
_FAILED: dict[str, LossReason] = {"abort": "drained", "error": "error"}


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What an engine counted, in OpenAI's form."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class Chunk(msgspec.Struct):
    """One event, as far as the routes have it alike."""

    choices: list[Any] | None = None
    usage: Usage | None = None
    error: Any = None


class Reply(ABC):
    """Reads one reply. `replayed` are the ids that come first and that the client has.

    Several events of one read make one delta. The last delta waits for the usage, which follows at once.
    """

    path: ClassVar[str]
    decoder: ClassVar[msgspec.json.Decoder[Any]]  # of a Chunk

    def __init__(self, generation: Generation, transcript: Transcript, replayed: Sequence[int] = ()) -> None:
        self.generation = generation
        self.transcript = transcript
        self.usage: Usage | None = None
        self.prompt_ids: list[int] | None = None  # where the engine tells them
        self.prompt_logprobs: list[msgspec.Raw] | None = None
        self.began_at = transcript.count - len(replayed)
        self._replayed = replayed
        self._again = Replayed(replayed)
        self._cut = False  # ended by us: the engine would go on
        self._delta = Delta()  # that is being put together
        self._taken = 0  # tokens of those that were given
        self._ended = False  # the last one was
        sampling = generation.sampling
        self.with_logprobs = sampling.logprobs is not None or sampling.logprob_token_ids is not None
        self._before: list[int] = [*generation.prompt[-4:], *replayed] if self.with_logprobs else []

    @abstractmethod
    def body(self, endpoint: Endpoint) -> bytes:
        """The request."""

    @abstractmethod
    def add_choice(self, delta: Delta, chunk: Any) -> None:
        """Adds to a delta what an event has of the sequence; raises as `add` does."""

    def add(self, delta: Delta, data: bytes) -> None:
        """Adds one event to a delta, or raises EngineRefused, AttemptLost, or msgspec's errors and adds nothing."""
        chunk: Chunk = self.decoder.decode(data)
        if chunk.error is not None:
            raise in_band(chunk.error)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.choices:
            self.add_choice(delta, chunk)

    async def read(self, attempt: Attempt) -> AsyncGenerator[Delta, None]:
        """The deltas, up to one with a finish.

        Raises AttemptLost, EngineRefused, and UpstreamLost where other ids are replayed. Where it is left, it ends the
        request at the engine, and tells `on_untaken` of the tokens that nobody took.
        """
        with attempt:
            try:
                async with aclosing(attempt.events(self.path, self.body(attempt.endpoint))) as events:
                    async for read in events:
                        delta = self._delta
                        for number, data in enumerate(read, start=1):
                            try:
                                if data:
                                    self.add(delta, data)
                            except Exception:
                                if delta.ids:
                                    yield self._given(delta)  # what came before it counts
                                raise
                            if delta.finish is not None:
                                if not self._cut:
                                    self._add_usage([*read[number:], *await all_of(events)])
                                break
                        if self.prompt_logprobs is not None:
                            await self._add_prompt(delta)
                        if delta.finish is not None:
                            yield self._given(self.complete(delta))
                            return
                        if delta.ids:
                            yield self._given(delta)
                # vLLM sends no chunk without a token, not even the last one.
                if self.transcript.count - self.began_at >= self.generation.sampling.max_tokens:
                    yield self._given(self.complete(Delta(finish="length")))
                    return
            except (GeneratorExit, asyncio.CancelledError):
                self.generation.on_untaken(await self._untaken(attempt))
                raise
        raise AttemptLost("died", "the stream ended before its end")

    def _given(self, delta: Delta) -> Delta:
        self._taken += len(delta.ids)
        self._ended = delta.finish is not None
        self._delta = Delta()
        return delta

    async def _untaken(self, attempt: Attempt) -> int:
        """Tokens that the engine generated, and that were not given: of those of this attempt that are new."""
        known = len(self._delta.ids)
        if self._cut or self._ended or self._delta.finish is not None:
            return known
        total, events = await attempt.abort()
        for data in events:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                usage: Usage | None = self.decoder.decode(data).usage
                total = usage.completion_tokens if usage is not None else total
        return known if total is None else max(known, total - len(self._replayed) - self._taken)

    def add_ids(
        self, delta: Delta, ids: list[int], finish: str | None, content: Sequence[Entry], asked: int | None
    ) -> None:
        """Adds tokens, whose text is made here, to a delta. `asked`: as `logprobs.positions` has it."""
        check_end(finish)
        if skipped := self._again.skip(ids, ends=bool(finish)):
            ids, content = ids[skipped:], content[skipped:]
        found: list[Position] = []
        if self.with_logprobs and ids:
            assert self.transcript.tokenizer is not None
            found = positions(content, asked, texts_of(self.transcript.tokenizer), self._before)
            self._before += ids
        text, stop, used = self.transcript.take(ids, stopped=finish == "stop")
        if used < len(ids):
            ids, found = ids[:used], found[:used]
        if found:
            delta.logprobs = found if delta.logprobs is None else [*delta.logprobs, *found]
        delta.ids = [*delta.ids, *ids] if delta.ids else ids
        delta.text += text
        self.end(delta, finish, stop)

    def end(self, delta: Delta, finish: str | None, stop: int | str | None) -> None:
        """Notes how a sequence ends, if it does. A stop string that was found here ends it in any case."""
        if isinstance(stop, str):
            self._cut = not finish
            finish = "stop"
        if finish:
            delta.finish, delta.stop_reason = ("length" if finish == "length" else "stop"), stop

    def complete(self, delta: Delta) -> Delta:
        """The last delta, with what the engine counted. To an engine that goes on, the ids so far were prompt."""
        if self.usage is None:
            return delta
        prompt, details = self.usage.prompt_tokens, self.usage.prompt_tokens_details
        if prompt is not None:
            prompt -= self.began_at
            if self.transcript.tokenizer is None:
                delta.prompt_tokens = prompt
        if details is not None and details.cached_tokens is not None:
            delta.cached = details.cached_tokens if prompt is None else min(details.cached_tokens, prompt)
        return delta

    def _add_usage(self, events: Sequence[bytes]) -> None:
        for data in events:
            try:
                self.add(Delta(), data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, EngineRefused, AttemptLost):
                return  # whatever goes wrong behind its end, the sequence is whole

    async def _add_prompt(self, delta: Delta) -> None:
        texts = texts_of(self.transcript.tokenizer) if self.transcript.tokenizer is not None else None
        prompt = self.generation.prompt or self.prompt_ids or ()
        raw, self.prompt_logprobs = (self.prompt_logprobs or [])[: len(prompt) or None], None
        delta.prompt_logprobs = await asyncio.to_thread(prompt_positions, raw, prompt, texts)


def check_end(finish: str | None) -> None:
    """Raises AttemptLost for an end that is none."""
    if finish and (reason := _FAILED.get(finish)) is not None:
        raise AttemptLost(reason, f"it ended the sequence with {finish!r}")


def in_band(error: Any) -> EngineRefused | AttemptLost:
    """What an error object in the middle of a stream means. Without a client error's code, it is about the engine."""
    code = error.get("code") if isinstance(error, dict) else None
    message, param = error_message(error)
    if isinstance(code, int) and 400 <= code < 500:
        return EngineRefused(code, message or "", param=param)
    return AttemptLost("error", message or "an error without a text")
