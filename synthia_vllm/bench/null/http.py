"""What the null engine needs of HTTP: bodies, answers, errors as vLLM writes them, and streams that others write."""

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.types import Message, Receive, Send

from synthia_vllm.bench.null.faults import SseForm

Headers = list[tuple[bytes, bytes]]
STREAM: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
_PAGE = b"<!doctype html><html><head><title>Sign in</title></head><body><h1>Sign in</h1></body></html>\n"


async def body_of(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def left(receive: Callable[[], Awaitable[Message]]) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(
    send: Send, status: int, body: bytes, kind: bytes = b"application/json", more: Headers | None = None
) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *(more or ())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error(message: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None) -> bytes:
    """vLLM's ErrorResponse."""
    told: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status}
    return json.dumps({"error": told}, separators=(",", ":")).encode()


async def no_such_thing(send: Send, status: int = 404, more: Headers | None = None) -> None:
    """As vLLM answers where there is no route, or none for this method."""
    phrase = HTTPStatus(status).phrase
    await answer(send, status, error(phrase, status, phrase), more=more)


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def written_as(form: SseForm, send: Send) -> Send:
    """A `send` that writes events as other servers do."""
    first = True

    async def other(message: Message) -> None:
        nonlocal first
        if message["type"] == "http.response.body":
            body = reshaped(form, message.get("body", b""), first)
            message = {**message, "body": body}
            first = False
        await send(message)

    return other


async def page(send: Send) -> None:
    """As something in between answers: a page, status 200."""
    await answer(send, 200, _PAGE, b"text/html; charset=utf-8")


def reshaped(form: SseForm, events: bytes, first: bool) -> bytes:
    """All but `null_choices` say the same to who reads by the standard (WHATWG HTML, 9.2)."""
    if form == "crlf":
        return events.replace(b"\n", b"\r\n")
    if form == "split":
        return events.replace(b',"', b',\ndata: "')
    if form == "ids":
        head = b"\xef\xbb\xbf: a comment\nretry: 3000\n\n" if first else b""
        return head + events.replace(b"data: ", b": keep-alive\nid: 7\nevent: message\ndata:")
    if form == "null_choices":
        extra = events[: events.find(b"\n\n") + 2] if first else b""
        return _without_choices(extra) + events.replace(b'"choices":[]', b'"choices":null')
    return events


def _without_choices(event: bytes) -> bytes:
    """The event, with `choices: null` and no more."""
    if not event.startswith(b"data: {"):
        return b""
    told = json.loads(event[6:])
    return b"data: " + json.dumps({**told, "choices": None}).encode() + b"\n\n"
