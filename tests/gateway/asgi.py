"""A client without a socket, for tests that send thousands of requests."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    tokens: int = 0
    first_token_s: float | None = None
    whole: bool = False


async def post(
    app: ASGIApp,
    body: dict[str, Any],
    *,
    headers: dict[str, str] | None = None,
    on_token: Callable[[], None] | None = None,
) -> Answer:
    """POST /v1/completions; counts the tokens of a stream."""
    answer, began = Answer(), time.perf_counter()
    pending = [json.dumps(body).encode()]

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
            return
        answer.whole = not message.get("more_body", False)
        found = message.get("body", b"").count(b'"text":')
        if found and answer.first_token_s is None:
            answer.first_token_s = time.perf_counter() - began
        answer.tokens += found
        if on_token:
            for _ in range(found):
                on_token()

    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": pairs}
    await app(scope, receive, send)
    return answer
