"""`/ready`: whether the engine generates, which `/health` does not tell."""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.errors import Overloaded, RequestError
from synthia_vllm.gateway.replies import send_error, send_json

_FRESH_S = 5.0  # a token is proof for so long
_DEADLINE_S = 5.0


class Readiness:
    """Answers `GET /ready` with 200 if upstream has generated a token in the last seconds, or does so now; else 503.

    A pure ASGI layer next to upstream. `last_token` tells the time (`perf_counter`) of the last token of any running
    request: an engine that works needs no canary, and a busy one could not answer it in time. Probes that come
    together ask once.
    """

    def __init__(self, app: ASGIApp, *, last_token: Callable[[], float]) -> None:
        self.app = app
        self._last_token = last_token
        self._proved = float("-inf")
        self._asking: asyncio.Task[bool] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/ready":
            return await self.app(scope, receive, send)
        if max(self._proved, self._last_token()) < perf_counter() - _FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._canary())
            if not await asyncio.shield(self._asking):
                return await send_error(Overloaded("the engine generates nothing", _DEADLINE_S), send)
        return await send_json(200, {}, send)

    async def _canary(self) -> bool:
        try:
            async with asyncio.timeout(_DEADLINE_S):
                status, body = await _ask(self.app, "GET", "/v1/models")
                models = msgspec.json.decode(body).get("data") if status == 200 else None
                model = models[0]["id"] if models else None
                request = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}
                status, _ = await _ask(self.app, "POST", "/v1/completions", msgspec.json.encode(request))
        except (TimeoutError, RequestError, msgspec.DecodeError):
            return False
        if status == 200:
            self._proved = perf_counter()
        return status == 200


async def _ask(app: ASGIApp, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of a small reply."""
    status, found = 0, bytearray()
    pending = [body]

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await asyncio.Event().wait() and {}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        found.extend(message.get("body", b""))

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"readiness"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return status, bytes(found)
