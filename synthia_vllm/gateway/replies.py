"""Small helpers that every layer shares: answering with an error, naming a header."""

import msgspec
from starlette.types import Receive, Scope, Send

from synthia_vllm.errors import RequestError


async def send_error(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with an error in OpenAI's shape."""
    body = msgspec.json.encode(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def header(scope_or_message: Scope, name: bytes) -> bytes:
    """A header's value, empty if absent; `name` in lower case, as ASGI has it."""
    return next((value for key, value in scope_or_message["headers"] if key.lower() == name), b"")
