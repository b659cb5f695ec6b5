"""Engines that run elsewhere, as an ASGI app."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp
import structlog
from starlette.types import Receive, Scope, Send

from synthia_vllm.errors import SetupError, UpstreamLost, UpstreamTimeout
from synthia_vllm.gateway.call import call_of
from synthia_vllm.gateway.forwarding import (
    answer_lifespan,
    cache_tokens,
    end_to_end,
    error_event,
    open_session,
    own_headers,
    request_headers,
    while_client_stays,
    whole_body,
)
from synthia_vllm.gateway.replies import send_json
from synthia_vllm.metrics.replicas import ReplicaView, engine_name

_RESTING_S = 5.0  # an upstream that refused a connection is asked again after so long
_CAPACITY_TIMEOUT_S = 5.0
_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Target:
    url: str
    name: str  # in metrics: host, port and path
    in_flight: int = 0
    resting_until: float = 0.0


class HttpUpstream:
    """Passes requests on to OpenAI-compatible engines over HTTP; to the one with the fewest in flight.

    Raises UpstreamLost (502) where none accepts a connection, or one breaks off before its reply starts, and
    UpstreamTimeout (504) where nothing comes for `read_timeout` seconds. A stream that breaks ends with one error
    event in the band and without `[DONE]`. Only refused connections are tried elsewhere: anything later may have been
    begun. A client that leaves ends its request upstream at once. `async with` opens and closes the connections.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
    ) -> None:
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise SetupError(f"--upstream {url}: a URL like http://127.0.0.1:8001")
        self._targets = [_Target(url.rstrip("/"), engine_name(url)) for url in urls]
        self.headers = own_headers(key)  # of every question to an engine
        self._key = key  # that the engines themselves ask for; a client's key never goes on
        self._timeouts = connect_timeout, read_timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "HttpUpstream":
        self._session = open_session(*self._timeouts)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await answer_lifespan(receive, send)
        if scope["path"] == "/health":
            return await send_json(200, {}, send)
        body = await whole_body(receive)
        if body is not None:
            await while_client_stays(self._pass(scope, body, send), receive)
        return None

    async def capacity(self) -> int | None:
        """Tokens that the KV caches of all upstreams hold, by vLLM's own metric; None if any does not tell."""
        assert self._session is not None
        total = 0
        for target in self._targets:
            try:
                timeout = aiohttp.ClientTimeout(_CAPACITY_TIMEOUT_S)
                async with self._session.get(f"{target.url}/metrics", headers=self.headers, timeout=timeout) as reply:
                    text = await reply.text()
                tokens = cache_tokens(text)
            except (aiohttp.ClientError, TimeoutError, ValueError):
                return None
            if tokens is None:
                return None
            total += tokens
        return total

    def replicas(self) -> list[ReplicaView]:
        """The engines as replicas: `out` while one rests that refused a connection."""
        now = time.monotonic()
        return [
            ReplicaView(target.name, target.url, "out" if target.resting_until > now else "up", target.in_flight)
            for target in self._targets
        ]

    async def _pass(self, scope: Scope, body: bytes, send: Send) -> None:
        call = call_of(scope)
        for target in self._by_load():
            target.in_flight += 1
            if call is not None:
                call.replica = target.name
            try:
                return await self._ask(target, scope, body, send)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                target.resting_until = time.monotonic() + _RESTING_S
                _log.warning("upstream_refuses", upstream=target.url, error=str(error))
            finally:
                target.in_flight -= 1
        raise UpstreamLost("no engine can be reached")

    def _by_load(self) -> list[_Target]:
        """All, the least busy first; those that refused of late last, to be tried only if nothing else is there."""
        now = time.monotonic()
        return sorted(self._targets, key=lambda target: (target.resting_until > now, target.in_flight))

    async def _ask(self, target: _Target, scope: Scope, body: bytes, send: Send) -> None:
        assert self._session is not None
        headers = request_headers(scope, self._key, target.name)
        path = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope.get("query_string") else "")
        started = streaming = False
        try:
            async with self._session.request(
                scope["method"], target.url + path, data=body or None, headers=headers, allow_redirects=False
            ) as reply:
                streaming = reply.content_type == "text/event-stream"
                started = True
                start = {
                    "type": "http.response.start",
                    "status": reply.status,
                    "headers": end_to_end(reply.raw_headers),
                }
                await send(start)
                async for part in reply.content.iter_any():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientConnectorError:
            raise
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise
            await _broken(UpstreamTimeout("the engine sent nothing for too long"), started and streaming, scope, send)
        except aiohttp.ClientError as error:
            await _broken(UpstreamLost(f"the engine broke off: {error}"), started and streaming, scope, send)


async def _broken(error: UpstreamLost, streaming: bool, scope: Scope, send: Send) -> None:
    if streaming:
        event = error_event(error, scope["path"])
        await send({"type": "http.response.body", "body": event, "more_body": True})
    raise error
