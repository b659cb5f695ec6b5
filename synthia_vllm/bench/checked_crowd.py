"""A crowd of clients that believe nothing: so many at once, streams and whole replies of null engines, each checked."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from synthia_vllm.bench.checked_stream import CHAT, COMPLETIONS, Wanted, numbered, run_stream

# refused: a 503; lost: no answer, or another error; broken: ended early; wrong: says anything else
Outcome = Literal["right", "refused", "lost", "broken", "wrong"]

RATE = 20.0  # tokens a second of each reply
PREFILL = 8000.0  # prompt tokens a second of each engine
_LONGEST_S = 300.0  # for what should end by itself
_AGAIN_S = 1.0  # who was refused is followed by another so late


@dataclass
class Told:
    """What became of one request. Times are loop time."""

    wanted: Wanted
    whole: bool
    prompt: int  # tokens, about
    began: float
    ended: float = 0.0
    outcome: Outcome = "right"
    reason: str = ""
    offending: str = ""
    gaps: Callable[[float], float | None] = lambda _: None  # a stream's, by the moment that they span
    first: float | None = None

    @property
    def beyond(self) -> float:
        """Seconds beyond its own work."""
        return self.ended - self.began - self.wanted.tokens / RATE - self.prompt / PREFILL


@dataclass
class Crowd:
    """Requests to gateways, so many at once."""

    urls: list[str]
    session: aiohttp.ClientSession
    tokens: tuple[int, int]
    prompts: tuple[int, int]
    only_whole: bool = False
    done: list[Told] = field(default_factory=list)
    open: int = 0
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def run(self, at_once: int, most: int | None = None) -> None:
        """Until `most` have ended; until it is cancelled if None."""

        async def one_after_another(number: int) -> None:
            await asyncio.sleep(number / 100)
            while most is None or (number := next(self.numbers)) < most:
                told = await self.ask(next(self.numbers) if most is None else number)
                if told.outcome == "refused":
                    await asyncio.sleep(_AGAIN_S)

        async with asyncio.TaskGroup() as group:
            for number in range(at_once):
                group.create_task(one_after_another(number))

    async def ask(self, number: int, start: str = "Request") -> Told:
        """One request, of a length that is drawn; every other one streams."""
        whole = self.only_whole or number % 2 == 0
        length = random.randint(*self.prompts)
        prompt = f"{start} {number}: what is an orca?".ljust(length, ".")
        wanted = numbered(
            CHAT if number % 4 < 2 else COMPLETIONS, prompt, random.randint(*self.tokens), ignore_eos=True
        )
        told = Told(wanted, whole, length, asyncio.get_running_loop().time())
        self.open += 1
        try:
            await (self._whole if whole else self._stream)(self.urls[number // 2 % len(self.urls)], told)
        finally:
            self.open -= 1
        told.ended = asyncio.get_running_loop().time()
        self.done.append(told)
        return told

    async def _stream(self, url: str, told: Told) -> None:
        stream = await run_stream(url, told.wanted)
        told.gaps = stream.pause_at
        told.first = stream.times[0] if stream.times else None
        if stream.broken is None:
            return
        told.reason, told.offending = stream.broken, stream.offending.decode(errors="replace")
        told.outcome = _outcome(stream.broken, begun=told.first is not None)

    async def _whole(self, url: str, told: Told) -> None:
        body = {name: value for name, value in told.wanted.body.items() if name not in ("stream", "stream_options")}
        try:
            async with self.session.post(url + told.wanted.path, json=body) as reply:
                said = await reply.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            told.outcome, told.reason = "lost", f"{type(error).__name__}: {error}"
            return
        if reply.status != 200:
            told.outcome, told.reason = "refused" if reply.status == 503 else "lost", f"status {reply.status}"
            told.offending = said[:400].decode(errors="replace")
            return
        answer = json.loads(said)
        choice = answer["choices"][0]
        got = choice["message"]["content"] if told.wanted.path == CHAT else choice["text"]
        right = got == told.wanted.text and choice["finish_reason"] == "length"
        if not right or answer["usage"]["completion_tokens"] != told.wanted.tokens:
            told.outcome, told.reason, told.offending = "wrong", "another text, end or usage", said[:400].decode()


def _outcome(reason: str, *, begun: bool) -> Outcome:
    """Of a stream that is not right."""
    if reason.startswith(("status", "no connection")):
        return "refused" if reason == "status 503" else "lost"
    if reason.startswith(("the connection", "an error", "no [DONE]", "finish_reason missing")):
        return "broken" if begun else "lost"
    return "wrong"


@asynccontextmanager
async def crowd(urls: list[str], **options: Any) -> AsyncIterator[Crowd]:
    timeout = aiohttp.ClientTimeout(total=_LONGEST_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield Crowd(urls, session, **options)
