"""Small helpers of the edge: answering, reading a header."""

from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import Message, Scope, Send

from synthia_vllm.api.errors import ErrorForm
from synthia_vllm.errors import RequestError, SynthiaError

UNBOUNDED_SEND = "synthia.unbounded_send"  # of the ASGI scope's extensions: `send` never waits for the client


async def send_json(status: int, value: Any, send: Send, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answers with a JSON value; `bytes` are taken for JSON that is encoded already."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(error: SynthiaError, send: Send, *, form: ErrorForm, request_id: str = "") -> None:
    """Answers with an error in the form of the API that was asked. What is no RequestError is a 500."""
    status, headers = (error.status, error.headers) if isinstance(error, RequestError) else (500, [])
    await send_json(status, form(error, request_id), send, headers)


def header(holder: Scope | Message, name: bytes) -> bytes:
    """A header's value, empty if absent; `name` in lower case, as ASGI has it."""
    return next((value for key, value in holder["headers"] if key.lower() == name), b"")
