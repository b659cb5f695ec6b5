"""A stand-in behind the engine port, in this process: no model, no HTTP. For unit tests, and for what a gateway costs.

engine = NullEnginePort(tokens_per_second=20, max_num_seqs=64)
async for delta in engine.generate(generation): ...
engine.faults.change({"break_after": 9})
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Literal

from synthia_vllm.bench.null.endings import Ending, Piece, ending, may_stop, words
from synthia_vllm.bench.null.faults import Faults
from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.null.tokens import logprob_of, prompt_ids, seed_of
from synthia_vllm.engine.port import Capacity, Delta, Generation, Position, TokenLogprob
from synthia_vllm.engine.tokenizer import TextStream, Tokenizer
from synthia_vllm.errors import Overloaded, RequestError, SynthiaError, UpstreamLost, UpstreamTimeout

_TURN = 64  # tokens, at full speed: then others may run
_LOOK_S = 0.02  # between two looks at whether a fault is over


class NullEnginePort:
    """Answers each generation with as many tokens as it wants: numbered words (`null_tokens`), or a text.

    tokenizer           the null tokenizer ("null"), another one, or None as for engines that are sent text
    context             most tokens of prompt and reply together; a longer prompt is a RequestError
    names               of the model
    tokens_per_second   of each sequence, at moments that all share, as an engine's steps are; None: as fast as it can
    prefill_s           before the first token
    max_num_seqs        sequences at once; the others wait in order of arrival
    reply_tokens        a reply ends with EOS after so many tokens, unless `ignore_eos`; None: after `max_tokens`
    text                what each reply says in place of words, EOS after it
    cached              prompt tokens that are told as cached
    faults              `null_faults`; of them the port knows break_after, end_after, stall_after, hang, status and dead
    error               is raised in place of every reply

    Plain attributes, which can be changed while it runs; a slow engine has few `tokens_per_second` or a long
    `prefill_s`. Stop strings, stop tokens, `min_tokens` and log-probabilities (made up) are honoured, nothing else of
    sampling.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Literal["null"] | None = "null",
        context: int | None = 8192,
        names: Sequence[str] = ("null",),
        tokens_per_second: float | None = None,
        prefill_s: float = 0.0,
        max_num_seqs: int | None = None,
        reply_tokens: int | None = None,
        text: str | None = None,
        cached: int | None = 0,
        faults: Faults | None = None,
        error: SynthiaError | None = None,
    ) -> None:
        self.tokenizer = null_tokenizer() if isinstance(tokenizer, str) else tokenizer
        self.context = context
        self.root: str | None = None
        self.capacity = Capacity(requests=max_num_seqs)
        self.names = list(names)
        self.tokens_per_second = tokens_per_second
        self.prefill_s = prefill_s
        self.reply_tokens = reply_tokens
        self.text = text
        self.cached = cached
        self.faults = faults or Faults()
        self.error = error
        self.running = 0
        self.waiting = 0
        self.finished = 0  # sequences that had their last token
        self.aborted = 0  # that the caller left
        self.failed = 0  # refused or broken
        self.prompt_tokens = 0  # of what was begun
        self.generated = 0
        self.seen: deque[Generation] = deque(maxlen=1000)  # the latest, in order of arrival
        self._slots = asyncio.Semaphore(max_num_seqs) if max_num_seqs else contextlib.nullcontext()
        self._step: asyncio.Event | None = None

    async def models(self) -> Sequence[str]:
        if self.faults.dead:
            raise UpstreamLost("the null engine is dead")
        return self.names

    async def ready(self) -> bool:
        return not (self.faults.dead or self.faults.hang)

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        self.seen.append(generation)
        generation.on_attempt("")
        begun = over = False
        self.waiting += 1
        try:
            async with self._slots:
                begun = True
                self.waiting -= 1
                self.running += 1
                self._refuse()
                prompt, pieces, end = self._reply(generation)
                self.prompt_tokens += prompt
                if self.prefill_s:
                    await asyncio.sleep(self.prefill_s)
                faults, last, plain = self.faults, end.count, generation.sampling.logprobs is None
                for number, (ids, text) in enumerate(end.of(pieces), start=1):
                    if self.tokens_per_second:
                        await self._next_step()
                    elif not number % _TURN:
                        await asyncio.sleep(0)
                    if faults.in_streams and await self._strike(number):
                        over = True
                        return
                    self.generated += 1
                    delta = Delta(ids, text)
                    if number == 1:
                        delta.cached = self.cached
                        delta.prompt_tokens = prompt if self.tokenizer is None else None
                        delta.prompt_logprobs = self._prompt_logprobs(generation)
                    if not plain:
                        delta.logprobs = [self._position(ids[0], text, number - 1, generation.sampling.logprobs)]
                    if number == last:
                        delta.finish, delta.stop_reason = end.finish, end.stop_reason
                        over = True
                        self.finished += 1
                        yield delta
                        return
                    yield delta
        except SynthiaError:
            over = True
            self.failed += 1
            raise
        finally:
            self.aborted += not over
            self.running -= begun
            self.waiting -= not begun

    def _refuse(self) -> None:
        """Raises what is ordered in place of a reply."""
        if self.error is not None:
            raise self.error
        status = self.faults.status
        if status is not None and status < 500:
            raise RequestError(f"the null engine answers {status}")
        if status == 503:
            raise Overloaded("the null engine answers 503", 1.0)
        if status == 504:
            raise UpstreamTimeout("the null engine answers 504")
        if status is not None or self.faults.dead:
            raise UpstreamLost(f"the null engine {'is dead' if status is None else f'answers {status}'}")

    async def _strike(self, number: int) -> bool:
        """Called before each token where a fault is on; True if the reply just ends. Raises UpstreamLost."""
        faults = self.faults
        while faults.hang or number == faults.stall_after:
            await asyncio.sleep(_LOOK_S)
        if number == faults.break_after or faults.dead:
            raise UpstreamLost(f"the null engine broke in place of token {number}")
        return number == faults.end_after

    async def _next_step(self) -> None:
        """Waits for the next of the moments at which all sequences get a token: one timer, however many they are."""
        if self._step is None:
            self._step = asyncio.Event()
            loop = asyncio.get_running_loop()
            gap = 1 / (self.tokens_per_second or 1.0)
            loop.call_later(gap - loop.time() % gap, self._take_step, self._step)
        await self._step.wait()

    def _take_step(self, step: asyncio.Event) -> None:
        self._step = None
        step.set()

    def _reply(self, generation: Generation) -> tuple[int, Iterator[Piece], Ending]:
        """The prompt's length, the reply's tokens, and its ending. Raises RequestError where there is no room."""
        sampling = generation.sampling
        prompt = generation.prompt or prompt_ids(generation.text or "")
        most = sampling.max_tokens
        if self.context is not None:
            most = min(most, self.context - len(prompt))
            if most < 1:
                raise RequestError(f"a prompt of {len(prompt)} tokens leaves no room in {self.context}", param="prompt")
        if self.text is None:
            pieces: Callable[[], Iterator[Piece]] = partial(words, seed_of(prompt))
            return len(prompt), pieces(), ending(pieces, sampling, most, self.reply_tokens, may_stop(sampling))
        said = _pieces(self.text, self.tokenizer or null_tokenizer())
        ends_after = len(said) if self.reply_tokens is None else self.reply_tokens
        pieces = partial(cycle, said)
        return len(prompt), pieces(), ending(pieces, sampling, most, ends_after, True)

    def _prompt_logprobs(self, generation: Generation) -> list[Position | None] | None:
        wanted = generation.sampling.prompt_logprobs
        if wanted is None or not generation.prompt:
            return None
        later = [
            self._position(token, self._text_of(token), at, wanted)
            for at, token in enumerate(generation.prompt[1:], start=1)
        ]
        return [None, *later]

    def _position(self, token: int, text: str, at: int, wanted: int | None) -> Position:
        chosen = TokenLogprob(token, text, logprob_of(at), 1)
        others = [
            TokenLogprob(other, self._text_of(other), chosen.logprob - (other - token), 1 + other - token)
            for other in range(token + 1, token + (wanted or 0))
        ]
        return Position(chosen, [chosen, *others] if wanted else [])

    def _text_of(self, token: int) -> str:
        return self.tokenizer.piece(token) if self.tokenizer else f"token_id:{token}"


@cache
def _pieces(text: str, tokenizer: Tokenizer) -> list[Piece]:
    """A text as the tokenizer's tokens; the middle of a character has no text, its last token all of it."""
    stream = TextStream(tokenizer, ())
    return [((token,), stream.feed(token)) for token in tokenizer.encode(text)]
