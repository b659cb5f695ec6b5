"""Small helpers that the layers share: answering, reading a header."""

from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import Message, Scope, Send

from synthia_vllm.errors import RequestError


async def send_error(error: RequestError, send: Send) -> None:
    """Answers with an error in OpenAI's shape."""
    await send_json(error.status, error.body(), send, error.headers)


async def send_json(status: int, value: Any, send: Send, more_headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answers with a JSON value."""
    body = msgspec.json.encode(value)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *more_headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def header(holder: Scope | Message, name: bytes) -> bytes:
    """A header's value, empty if absent; `name` in lower case, as ASGI has it."""
    return next((value for key, value in holder["headers"] if key.lower() == name), b"")
