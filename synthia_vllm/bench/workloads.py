"""Workloads without memory: a closed loop of streams, and an open loop that sends whether or not replies come."""

import asyncio
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from synthia_vllm.bench.client import Call
from synthia_vllm.bench.measuring import Kind, Load
from synthia_vllm.bench.prompts import Lengths, Span


@dataclass(frozen=True)
class ClosedLoop:
    """`streams` clients, each of which sends the next request when its reply is there; `requests` in all.

    calls      what is sent, instead of drawn lengths: one for each request
    chat       prompts are words of a user, about a token each, through the chat route; else token ids
    spread_s   the streams begin evenly over so long; 0: all at once
    """

    streams: int
    requests: int
    prompt: Lengths = Span(32, 32)  # noqa: RUF009
    output: Lengths = Span(64, 64)  # noqa: RUF009
    label: str = ""
    kind: Kind = "closed"
    rate: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    chat: bool = False
    spread_s: float = 0.0

    @property
    def name(self) -> str:
        return self.label or "closed loop"

    async def drive(self, load: Load) -> None:
        made = chat_of if self.chat else call_of
        drawn = (made(load, self.prompt, self.output) for _ in range(self.requests))
        calls = iter(self.calls) if self.calls else drawn
        async with asyncio.TaskGroup() as group:
            for number in range(min(self.streams, self.requests)):
                group.create_task(self._stream(load, calls, number * self.spread_s / self.streams))

    async def _stream(self, load: Load, calls: Iterator[Call], due: float) -> None:
        for call in calls:
            due = (await load.send(call, due)).done_s


@dataclass(frozen=True)
class OpenLoop:
    """`rate` requests a second for `seconds`, as many at once as that makes.

    burstiness   1: a Poisson process; less: bursts (gamma distributed gaps, as in `vllm bench serve`)
    """

    rate: float
    seconds: float
    prompt: Lengths
    output: Lengths
    burstiness: float = 1.0
    kind: Kind = "open"
    streams: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "open loop, Poisson" if self.burstiness == 1 else f"open loop, bursty ({self.burstiness:g})"

    async def drive(self, load: Load) -> None:
        moments = arrivals(load.random, self.rate, self.seconds, self.burstiness)
        calls = [call_of(load, self.prompt, self.output) for _ in moments]
        async with asyncio.TaskGroup() as group:
            for call, moment in zip(calls, moments, strict=True):
                group.create_task(load.send(call, moment))


def call_of(
    load: Load,
    prompt: Lengths,
    output: Lengths,
    user: str = "",
    key: str | None = None,
    source: random.Random | None = None,
) -> Call:
    """A request of drawn lengths, with a prompt that no other has."""
    source = source or load.random
    return Call(output.draw(source), load.prompts.ids(prompt.draw(source)), user=user, key=key)


def chat_of(load: Load, prompt: Lengths, output: Lengths) -> Call:
    """A chat of one message, of drawn lengths, that no other has."""
    text = load.prompts.text(prompt.draw(load.random))
    return Call(output.draw(load.random), messages=({"role": "user", "content": text},))


def arrivals(source: random.Random, rate: float, seconds: float, burstiness: float = 1.0) -> list[float]:
    """Moments of `rate * seconds` requests, gaps gamma distributed and scaled to fill the time.

    The law is that of `vllm.benchmarks.serve.get_request`, which does not tell when a request was due.
    """
    count = max(1, round(rate * seconds))
    moments, at = [], 0.0
    for _ in range(count):
        at += source.gammavariate(burstiness, 1 / (rate * burstiness))
        moments.append(at)
    stretch = count / rate / moments[-1]
    return [moment * stretch for moment in moments]
