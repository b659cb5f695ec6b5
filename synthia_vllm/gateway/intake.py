"""Reading a request: the body within its limits, once, and the JSON object in it."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope

from synthia_vllm.errors import BodyTimeout, BodyTooLarge, MalformedBody
from synthia_vllm.gateway.replies import header

DEFAULT_MAX_BODY_BYTES = 4 * 2**20
# Those that tell the body's length, which changes, and the one that would jump vLLM's queue.
_DROPPED_HEADERS = (b"content-length", b"transfer-encoding", b"x-vllm-priority")


async def read_body(scope: Scope, receive: Receive, limit: int, idle: float | None = None) -> bytes | None:
    """The whole body; None where the client has left.

    Raises BodyTooLarge over `limit` bytes, unread if announced; BodyTimeout after `idle` seconds without a byte.
    """
    announced = header(scope, b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(limit)
    body = bytearray()
    while True:
        try:
            async with asyncio.timeout(idle):
                message = await receive()
        except TimeoutError:
            assert idle is not None
            raise BodyTimeout(idle) from None
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body", False):
            return bytes(body)


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises MalformedBody for all else, numbers that JSON has not (NaN) included."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(str(error)) from None
    except RecursionError:
        raise MalformedBody("nested too deeply") from None
    if not isinstance(value, dict):
        raise MalformedBody(f"expected an object, got {type(value).__name__}")
    return value


def replay(body: Callable[[], bytes], receive: Receive) -> Receive:
    """A `receive` that gives a body and then what really arrives, such as the client's disconnect.

    The body is asked for when it is needed: layers below may still change what it is made from.
    """
    pending = iter((body,))

    async def replayed() -> Message:
        for part in pending:
            return {"type": "http.request", "body": part(), "more_body": False}
        return await receive()

    return replayed


def without_body_headers(scope: Scope) -> Scope:
    """The scope for an upstream that gets another body than the client sent."""
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() not in _DROPPED_HEADERS]}
