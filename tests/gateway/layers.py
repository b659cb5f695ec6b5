"""Requests, engines and replies for tests of single layers: no HTTP, no API."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from typing import Any

from synthia_vllm.api.base import Counts, Prepared
from synthia_vllm.engine.port import Delta, Generation, Sampling
from synthia_vllm.errors import SynthiaError
from synthia_vllm.gateway.accounts import Account
from synthia_vllm.gateway.request import Exchange, Layer, Request, Usage


class PlainReply:
    """A reply that is the texts, with marks at its start and its end."""

    def __init__(self, streamed: bool = True) -> None:
        self._streamed = streamed
        self._text = b""

    def start(self, counts: Counts) -> bytes:
        return self._say(b"<%d|" % counts.prompt)

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        return self._say(delta.text.encode())

    def end(self, counts: Counts) -> bytes:
        end = b"|%d>" % counts.generated
        return end if self._streamed else self._text + end

    def error(self, error: SynthiaError) -> bytes:
        return f"!{error}!".encode()

    def _say(self, text: bytes) -> bytes:
        self._text += text
        return text if self._streamed else b""


def make_request(
    user: str = "alice",
    *,
    id: str = "1",
    prompt: int = 1,
    most: int = 1,
    prompts: int = 1,
    replies: int = 1,
    streamed: bool = True,
    exact: bool = True,
    queue_timeout: float | None = None,
    account: Account | None = None,
) -> Request:
    """A request for `prompts` times `replies` sequences, with `prompt` and at `most` so many tokens each."""
    sequences = [
        Generation(id=f"{id}-{number}", prompt=[1 + number // replies] * prompt, sampling=Sampling(max_tokens=most))
        for number in range(prompts * replies)
    ]
    prepared = Prepared(
        sequences=sequences,
        reply=PlainReply(streamed),
        streamed=streamed,
        prompt_tokens=prompt * prompts,
        max_generated=most * len(sequences),
        exact=exact,
        replies=replies,
    )
    usage = Usage(prompt=prepared.prompt_tokens)
    return Request(id, account or Account(user), prepared, usage, queue_timeout)


def make_exchange(request: Request) -> Exchange:
    """The exchange that a request belongs to."""
    return Exchange(
        id=request.id,
        request_id=request.id,
        route="/v1/completions",
        account=request.account,
        model="synthia",
        request=request,
        usage=request.usage,
    )


class Saying:
    """An engine of these deltas; an error among them is raised in its turn."""

    def __init__(self, *said: Delta | Exception) -> None:
        self.said = said
        self.asked = 0
        self.left = 0  # before it had said all

    async def generate(self, asked: Any) -> AsyncGenerator[Delta, None]:
        self.asked += 1
        whole = False
        try:
            for one in self.said:
                await asyncio.sleep(0)
                if isinstance(one, Exception):
                    whole = True
                    raise one
                yield replace(one)
            whole = True
        finally:
            self.left += not whole


class Held:
    """An engine that notes who is in it, and says one token to each when it is told to."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.release = asyncio.Event()

    async def generate(self, asked: Request | Generation) -> AsyncGenerator[Delta, None]:
        self.entered.append(asked.id)
        await self.release.wait()
        yield Delta((5,), "a", "stop")


def tokens(*texts: str, sequence: int = 0) -> list[Delta]:
    """One token a text, the last with the end."""
    last = len(texts)
    return [
        Delta((number,), text, "stop" if number == last else None, sequence=sequence)
        for number, text in enumerate(texts, start=1)
    ]


async def collect(layer: Layer, request: Request) -> list[Delta]:
    return [delta async for delta in layer.generate(request)]


def collecting(layer: Layer, requests: Iterable[Request]) -> "list[asyncio.Task[list[Delta]]]":
    return [asyncio.ensure_future(collect(layer, one)) for one in requests]


async def settle() -> None:
    """Lets all tasks go on until they wait for something."""
    for _ in range(10):
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)
