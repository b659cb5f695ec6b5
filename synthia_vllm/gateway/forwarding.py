"""What all proxies to engines share."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.call import call_of
from synthia_vllm.gateway.tracing import TRACE_HEADERS

# Of one connection only (RFC 9110, 7.6.1), or set anew for the next.
_HOP_HEADERS = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"content-length", b"accept-encoding", b"date", b"server",
}  # fmt: skip
_CLIENTS_OWN = (b"authorization", b"x-api-key", b"cookie")

_KEEP_ALIVE_S = 4.0  # less than the 5 of vLLM's uvicorn, so that no request meets a connection that is being closed
_READ_BUFFER = 256 * 1024

Headers = Sequence[tuple[bytes, bytes]]


def open_session(connect_timeout: float, read_timeout: float) -> aiohttp.ClientSession:
    """The connections to engines: as many as there are requests, replies as they come. Timeouts in seconds."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=read_timeout),
        auto_decompress=False,
        read_bufsize=_READ_BUFFER,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that a proxy passes on, names in lower case."""
    lowered = [(key.lower(), value) for key, value in headers]
    named = {name.strip().lower() for key, value in lowered if key == b"connection" for name in value.split(b",")}
    return [(key, value) for key, value in lowered if key not in _HOP_HEADERS and key not in named]


def request_headers(scope: Scope, key: str | None, replica: str) -> list[tuple[str, str]]:
    """A client's headers as they go upstream: without its keys, with the engine's own and the trace's."""
    call = call_of(scope)
    trace = call.trace.attempt(replica) if call is not None and call.trace is not None else []
    dropped = (*_CLIENTS_OWN, *TRACE_HEADERS) if trace else _CLIENTS_OWN
    passed = [pair for pair in end_to_end(scope["headers"]) if pair[0] not in dropped]
    found = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in (*passed, *trace)]
    return [*found, *own_headers(key).items()]


def own_headers(key: str | None) -> dict[str, str]:
    plain = {"Accept-Encoding": "identity"}  # the layers read the reply
    return plain if key is None else {**plain, "Authorization": f"Bearer {key}"}


def error_event(error: RequestError, route: str = "") -> bytes:
    """An error within a stream, in the form of the API that is spoken."""
    if route == "/v1/messages":
        inner = {"type": "api_error", "message": error.message}
        return b"event: error\ndata: " + msgspec.json.encode({"type": "error", "error": inner}) + b"\n\n"
    if route == "/v1/responses":
        event = {"type": "error", "code": str(error.status), "message": error.message, "param": None}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"


async def whole_body(receive: Receive) -> bytes | None:
    """The request's body; None where the client has left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body.extend(message.get("body", b""))
        if not message.get("more_body", False):
            return bytes(body)


async def while_client_stays(exchange: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Runs an exchange to its end, or to the moment when the client leaves. Raises what the exchange raises."""
    task = asyncio.ensure_future(exchange)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message: Message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def cache_tokens(text: str) -> int | None:
    """Tokens that an engine's KV cache holds, from vLLM's `/metrics`; None where it does not tell."""
    for family in text_string_to_metric_families(text):
        if family.name == "vllm:cache_config_info":
            return sum(
                int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"])
                for sample in family.samples
                if sample.labels.get("num_gpu_blocks", "").isdigit()
            )
    return None


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
