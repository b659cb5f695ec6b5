"""Clients of a service that is disturbed, and what became of their requests."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.resume import APIS, ask

_ROUTE = APIS[1]  # completions: nothing ends a reply before its last token
_LONG_WORDS = 490  # three tokens each in the demo model
_PATIENCE_S = 900.0  # of a client; one that waits longer has lost its reply


@dataclass(frozen=True)
class Request:
    """What one client asks for, each time with another prompt."""

    tokens: int
    streamed: bool = False
    long: bool = False  # a prompt of about 1,500 tokens

    @property
    def kind(self) -> str:
        return ("long prompt, " if self.long else "") + ("streamed" if self.streamed else "whole")

    def body(self, name: str) -> dict[str, Any]:
        # The name comes first: no prompt begins as another one, and the prefix cache helps none.
        prompt = f"{name} {'orca whale ' * _LONG_WORDS}" if self.long else f"{name} What is an orca?"
        more = {"stream_options": {"include_usage": True}} if self.streamed else {}
        body = {"model": "synthia", "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
        return {**body, "stream": self.streamed, **more}


@dataclass(frozen=True)
class Reply:
    """What a client got, after how many seconds; `failed` says why it is not what was asked for."""

    kind: str
    seconds: float
    tokens: int = 0
    failed: str | None = None


def why_failed(request: Request, told: tuple[Any, ...]) -> str | None:
    """None for a reply with all its tokens; `told` is what `benchmarks.resume.ask` found."""
    if told[0] == "broken":
        return str(told[1])
    _, end, generated = told
    if end == "length" and generated == request.tokens:
        return None
    return f"{generated} tokens and {end!r}, where {request.tokens} tokens were asked for"


class Clients:
    """Ask a service, each over connections of its own: one that is kept may be closed under a request by its end.

    `async with` opens what they ask through.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._asked = 0
        self._run = f"{time.time_ns():x}"

    async def __aenter__(self) -> "Clients":
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def one(self, request: Request) -> Reply:
        self._asked += 1
        body = request.body(f"{self._run}.{self._asked}")
        began = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                told = await ask(self._session, self._url, _ROUTE, body)
        except TimeoutError:
            told = "broken", f"no reply after {_PATIENCE_S:.0f} s"
        failed, seconds = why_failed(request, told), time.monotonic() - began
        return Reply(request.kind, seconds, 0 if failed else request.tokens, failed)

    async def at_once(self, requests: Sequence[Request]) -> list[Reply]:
        return list(await asyncio.gather(*(self.one(request) for request in requests)))

    async def closed_loop(self, requests: Sequence[Request], enough: asyncio.Event) -> list[Reply]:
        """A client for each request asks again and again; after `enough` each waits for its reply and goes."""
        found: list[Reply] = []

        async def client(request: Request) -> None:
            while not enough.is_set():
                found.append(await self.one(request))

        await asyncio.gather(*(client(request) for request in requests))
        return found


def figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Counts and times of replies, those that failed included."""
    seconds: dict[str, list[float]] = {}
    for reply in replies:
        seconds.setdefault(reply.kind, []).append(reply.seconds)
    reasons = Counter(reply.failed for reply in replies if reply.failed is not None)
    return {
        "replies": len(replies),
        "failed": sum(reasons.values()),
        "reasons": dict(reasons.most_common(5)),
        "slowest_s": round(max((reply.seconds for reply in replies), default=0.0), 2),
        "median_s": {kind: round(statistics.median(each), 2) for kind, each in seconds.items()},
        "slowest_of_kind_s": {kind: round(max(each), 2) for kind, each in seconds.items()},
    }
