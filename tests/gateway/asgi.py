"""A client without a socket: for tests that send thousands of requests, or leave in the middle of one."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

from synthia_vllm.gateway.edge.replies import UNBOUNDED_SEND


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    tokens: int = 0  # of a streamed completion
    first_token_s: float | None = None
    whole: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of its events; `[DONE]` is left out."""
        lines = [line[len(b"data:") :].strip() for line in self.body.split(b"\n") if line.startswith(b"data:")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]


async def post(
    app: ASGIApp,
    body: dict[str, Any] | bytes,
    *,
    path: str = "/v1/completions",
    headers: Mapping[str, str] | None = None,
    on_token: Callable[[], None] | None = None,
    leave: asyncio.Event | None = None,
) -> Answer:
    """Sends a POST and reads its reply; counts the tokens of a streamed completion. `leave` closes the connection."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await ask(app, "POST", path, content, headers=headers, on_token=on_token, leave=leave)


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    headers: Mapping[str, str] | None = None,
    on_token: Callable[[], None] | None = None,
    leave: asyncio.Event | None = None,
) -> Answer:
    """Any request."""
    clock = asyncio.get_running_loop().time
    answer, began = Answer(), clock()
    pending = [body]
    leaving = leave or asyncio.Event()

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if leaving.is_set():
            return  # as uvicorn does it
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
            return
        answer.whole = not message.get("more_body", False)
        found = message.get("body", b"")
        answer.body += found
        if tokens := found.count(b'"text":'):
            if answer.first_token_s is None:
                answer.first_token_s = clock() - began
            answer.tokens += tokens
            for _ in range(tokens if on_token else 0):
                on_token()  # type: ignore[misc]

    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    path, _, query = path.partition("?")
    scope: dict[str, Any] = {"type": "http", "method": method, "path": unquote(path), "query_string": query.encode()}
    scope |= {"headers": pairs, "extensions": {UNBOUNDED_SEND: {}}}
    await app(scope, receive, send)
    return answer
