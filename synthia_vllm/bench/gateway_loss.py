"""Replies of clients that come back, while gateways are killed under them: is anything lost, or billed twice?"""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import httpx2

from synthia_vllm.client import AsyncResuming
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.usage import usage

_PATIENCE_S = 600.0
_TOLD, _REASONS = 60, 5


class InTurn(httpx2.AsyncBaseTransport):
    """Sends each request to the next of several gateways, as a load balancer does; a refused one goes to the next."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._many = len(urls)
        self._urls = cycle([httpx2.URL(url) for url in urls])
        self._transport = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None), retries=0)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        for left in reversed(range(self._many)):
            to = next(self._urls)
            request.url = request.url.copy_with(host=to.host, port=to.port)
            try:
                return await self._transport.handle_async_request(request)
            except httpx2.ConnectError:
                if not left:
                    raise
        raise AssertionError

    async def aclose(self) -> None:
        await self._transport.aclose()


@dataclass
class Read:
    """One reply as its client got it; times by `time.monotonic`, seconds."""

    streamed: bool
    text: str = ""
    finish: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    at: list[float] = field(default_factory=list)  # of each event with text
    error: str = ""

    def pause(self, moments: Sequence[float]) -> float:
        """The longest gap between two events that spans one of these moments; 0 where none does."""
        return max(
            (after - before for before, after in pairwise(self.at) if any(before < at <= after for at in moments)),
            default=0,
        )

    @property
    def tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))


async def read_all(
    urls: Sequence[str],
    prompts: Sequence[str],
    tokens: int,
    *,
    key: str = "none",
    whole_every: int = 0,
    meanwhile: Callable[[Sequence[Read]], Coroutine[Any, Any, None]] | None = None,
) -> list[Read]:
    """One greedy chat reply of `tokens` to each prompt, all at once; every `whole_every`th is not streamed.

    `meanwhile` runs beside them, with what has been read so far.
    """
    replies = [Read(not (whole_every and number % whole_every == 0)) for number in range(len(prompts))]
    transport = AsyncResuming(InTurn(urls), patience_s=_PATIENCE_S)
    async with httpx2.AsyncClient(transport=transport, timeout=httpx2.Timeout(_PATIENCE_S)) as client:
        asked = [_read(client, one, prompt, tokens, key) for one, prompt in zip(replies, prompts, strict=True)]
        beside = [] if meanwhile is None else [meanwhile(replies)]
        await asyncio.gather(*asked, *beside)
    return replies


async def _read(client: httpx2.AsyncClient, reply: Read, prompt: str, tokens: int, key: str) -> None:
    body = {
        "model": "synthia",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": reply.streamed,
        **({"stream_options": {"include_usage": True}} if reply.streamed else {}),
    }
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with client.stream("POST", "http://gateway/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                reply.error = f"{response.status_code} {(await response.aread())[:200]!r}"
            elif not reply.streamed:
                _add(reply, json.loads(await response.aread()), "message")
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        _add(reply, json.loads(line[6:]), "delta")
    except httpx2.HTTPError as error:
        reply.error = repr(error)


def _add(reply: Read, told: dict[str, Any], part: str) -> None:
    if "error" in told:
        reply.error = str(told["error"])
        return
    reply.usage = told.get("usage") or reply.usage
    for choice in told["choices"]:
        if text := choice[part].get("content"):
            reply.text += text
            reply.at.append(time.monotonic())
        reply.finish = choice["finish_reason"] or reply.finish


def figures(wanted: Sequence[str], found: Sequence[Read], tokens: int, moments: Sequence[float]) -> dict[str, Any]:
    """What became of the replies; pauses are of the streams that a moment met, seconds."""
    pauses = sorted(pause for one in found if one.streamed and (pause := one.pause(moments)))
    told: dict[str, Any] = {
        "replies": len(found),
        "failed": sum(bool(one.error) for one in found),
        "why": dict(Counter(one.error[:_TOLD] for one in found if one.error).most_common(_REASONS)),
        "other texts": sum(one.text != text for one, text in zip(found, wanted, strict=True) if not one.error),
        "other token counts": sum(one.tokens != tokens for one in found if not one.error),
        "tokens": sum(one.tokens for one in found),
        "moments": len(moments),
    }
    gaps = sorted(after - before for one in found for before, after in pairwise(one.at))
    if gaps:
        told["any gap p95"] = round(gaps[int(0.95 * len(gaps))], 3)
    if len(pauses) > 1:
        told["pause p50"] = round(statistics.median(pauses), 3)
        told["pause p95"] = round(statistics.quantiles(pauses, n=20)[-1], 3)
        told["longest pause"] = round(pauses[-1], 3)
    return told


def billed(data: Path, user: str = "alice") -> tuple[int, int]:
    """A user's tokens of prompts, and generated, by the ledger in a gateway's data folder."""
    database = open_database(f"sqlite:///{data}/synthia.db")
    rows = usage(database, user=user)
    database.dispose()
    return sum(row.prompt_tokens for row in rows), sum(row.generated_tokens for row in rows)
