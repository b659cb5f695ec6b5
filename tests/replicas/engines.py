"""Engines for the tests here: null engines (no model) over real sockets, and some that answer what they are told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.null.tokens import expected
from synthia_vllm.engine.port import Delta, Engine, Generation, Sampling
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.replicas.pool import ReplicaPool
from synthia_vllm.settings import ReplicasSettings

Live = Callable[[ASGIApp], str]
GENERATE = "/inference/v1/generate"


def asking(text: str = "hi", *, ids: bool = True, model: str = "", **sampling: Any) -> Generation:
    """Twelve tokens after a text; `ids` off: as a gateway without a tokenizer asks for it."""
    prompt = null_tokenizer().encode_with_bos(text) if ids else []
    asked = Sampling(**{"max_tokens": 12} | sampling)
    return Generation(id=f"id-{text}", prompt=prompt, text=text, sampling=asked, model=model)


def reply_to(text: str = "hi", tokens: int = 12) -> str:
    """What null engines say to it."""
    return "".join(expected({"prompt": text}, tokens))


async def read(engine: Engine, generation: Generation | None = None) -> list[Delta]:
    async with aclosing(engine.generate(generation or asking())) as deltas:
        return [delta async for delta in deltas]


async def read_into(found: list[Delta], engine: Engine, generation: Generation | None = None) -> None:
    """As `read`, for what ends with an error."""
    async for delta in engine.generate(generation or asking()):
        found.append(delta)


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def count_of(deltas: Sequence[Delta]) -> int:
    return sum(len(delta.ids) for delta in deltas)


@asynccontextmanager
async def pool_of(
    *urls: str,
    tokenizer: bool | Tokenizer = True,
    key: str | None = None,
    resume: bool = True,
    silence_s: float = 300.0,
    up: int | None = None,
    wakes: bool = False,
    **options: Any,
) -> AsyncIterator[ReplicaPool]:
    """All of them up, or so many."""
    options = {"canary_period_s": 0.3, "canary_deadline_s": 1.0, "slow_start_s": 0, "handover_s": 0.2} | options
    known = (null_tokenizer() if tokenizer else None) if isinstance(tokenizer, bool) else tokenizer
    settings = ReplicasSettings(**options)
    async with ReplicaPool(settings, tokenizer=known, key=key, resume=resume, silence_s=silence_s, wakes=wakes) as pool:
        pool.update({f"r{number}": url for number, url in enumerate(urls)})
        await until(lambda: len(pool.up()) == (len(urls) if up is None else up))
        yield pool


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


class Answers:
    """An engine that lives, takes text alone, and answers what it is told; `tokenize`: what its `/tokenize` says."""

    def __init__(self, answer: ASGIApp, *, tokenize: Any = None) -> None:
        self.answer = answer
        self.tokenize = tokenize
        self.asked = 0
        self.canaries = 0
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await NullEngine()(scope, receive, send)
        body = await body_of(receive)
        self.headers.append(dict(scope["headers"]))
        if scope["path"] == "/v1/models":
            return await JSONResponse({"data": [{"id": "other", "max_model_len": 64}]})(scope, receive, send)
        if scope["path"] == "/tokenize" and self.tokenize is not None:
            return await JSONResponse(self.tokenize)(scope, receive, send)
        if scope["path"] in (GENERATE, "/tokenize", "/metrics"):
            return await PlainTextResponse("nothing here", 404)(scope, receive, send)
        if json.loads(body).get("prompt") == [1]:
            self.canaries += 1
            return await JSONResponse({})(scope, receive, send)
        self.asked += 1
        self.seen.append(json.loads(body))
        return await self.answer(scope, receive, send)


def streaming(
    *parts: bytes, then: Exception | None = None, never: bool = False, kind: str = "text/event-stream"
) -> ASGIApp:
    """Sends these bytes, and breaks the connection if `then` says so, or is silent from there on (`never` ends)."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0.02)
        if then is not None:
            raise then
        if never:
            await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": b""})

    return answer


async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
    """Breaks the connection before any answer."""
    raise ConnectionResetError("as ordered")


def event(choice: Any = None, **more: Any) -> bytes:
    """A chunk of `/v1/completions`."""
    choices = [{"index": 0, **choice}] if choice is not None else []
    return b"data: " + json.dumps({"id": "1", "choices": choices, **more}).encode() + b"\n\n"


class WithoutTokensRoute:
    """A vLLM without `/inference/v1/generate`, as later ones are by default."""

    def __init__(self, engine: NullEngine) -> None:
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == GENERATE:
            return await PlainTextResponse("Not Found", 404)(scope, receive, send)
        return await self.engine(scope, receive, send)


async def body_of(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)
