"""Small helpers of the edge: answering, reading a header."""

import re
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import Message, Scope, Send

from synthia_vllm.api.errors import ErrorForm, form_of
from synthia_vllm.errors import RequestError, SynthiaError

UNBOUNDED_SEND = "synthia.unbounded_send"  # of the ASGI scope's extensions: `send` never waits for the client
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


async def send_json(status: int, value: Any, send: Send, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answers with a JSON value; `bytes` are taken for JSON that is encoded already."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(error: SynthiaError, send: Send, *, form: ErrorForm, request_id: str = "") -> None:
    """Answers with an error in the form of the API that was asked. What is no RequestError is a 500."""
    status, headers = (error.status, error.headers) if isinstance(error, RequestError) else (500, [])
    if request_id:
        headers = [*headers, (b"x-request-id", request_id.encode())]
    await send_json(status, form(error, request_id), send, headers)


async def refuse(error: SynthiaError, scope: Scope, send: Send) -> None:
    """Answers in front of all else, in the form of the route that was asked, under the client's own request id."""
    _, told = request_ids(header(scope, b"x-request-id"))
    await send_error(error, send, form=form_of(scope["path"], dict(scope["headers"])), request_id=told)


def request_ids(given: bytes) -> tuple[str, str]:
    """Ours, which is unique, and the one to tell: the client's X-Request-Id, if it can go into headers and logs."""
    unique = secrets.token_hex(8)
    name = given.decode() if _REQUEST_ID.fullmatch(given) else ""
    return (f"{name}-{unique}", name) if name else (unique, unique)


def header(holder: Scope | Message, name: bytes) -> bytes:
    """A header's value, empty if absent; `name` in lower case, as ASGI has it."""
    return next((value for key, value in holder["headers"] if key.lower() == name), b"")
