"""How engines are spoken to over HTTP: connections, headers, and what their answers mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

from synthia_vllm.errors import Overloaded, RequestError, UpstreamLost

_KEEP_ALIVE_S = 4.0  # less than the 5 of vLLM's uvicorn, so that no request meets a connection that is being closed
_READ_BUFFER = 256 * 1024
_MAX_MESSAGE = 1000  # characters of an engine's error that go on
_MAX_RETRY_AFTER_S = 60.0
BUSY = (429, 503)  # as servers and proxies in front of an engine say it
_OURS = (401, 403, 404, 405, 408)  # 4xx that the request's author can't help


def open_session(connect_timeout: float) -> aiohttp.ClientSession:
    """The connections to engines: as many as there are requests, replies as they come. Whoever reads judges silence."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
        auto_decompress=False,
        read_bufsize=_READ_BUFFER,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def own_headers(key: str | None) -> dict[str, str]:
    """Those of every question to an engine; `key` is the engine's own."""
    plain = {"Accept-Encoding": "identity"}
    return plain if key is None else {**plain, "Authorization": f"Bearer {key}"}


def request_headers(own: Mapping[str, str], request: str, attempt: int, trace: Mapping[str, str]) -> dict[str, str]:
    """Those of one attempt, counted from 1: an engine knows a request by its id, and two could meet on one engine."""
    name = request if attempt <= 1 else f"{request}-{attempt}"
    return {**own, "Content-Type": "application/json", "X-Request-Id": name, **trace}


class EngineRefused(Exception):
    """An engine answered with an error, or with what is no answer: then its status counts as 502."""

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message[:_MAX_MESSAGE]
        self.param = param
        self.retry_after = retry_after

    @property
    def of_request(self) -> bool:
        """Whether the request is at fault: another engine would say the same."""
        return 400 <= self.status < 500 and self.status not in BUSY and self.status not in _OURS

    @property
    def busy(self) -> bool:
        return self.status in BUSY

    def as_error(self) -> RequestError:
        """What the request's author is told."""
        if self.of_request:
            return RequestError(self.message, param=self.param)
        if self.busy:
            return Overloaded(f"the engine is busy: {self.message}", self.retry_after)
        if self.status in (401, 403):
            return UpstreamLost("the engine does not accept this gateway's key (--upstream-key)")
        return UpstreamLost(f"the engine answered {self.status}: {self.message}")


def refusal(status: int, body: bytes, retry_after: str | None = None) -> EngineRefused:
    """What an answer that is no 200 says, in OpenAI's form of errors, FastAPI's, or none."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    message, param = None, None
    if isinstance(found, dict):
        error = found.get("error", found.get("detail", found.get("message")))
        message, param = error_message(error)
    waits = float(retry_after) if retry_after and retry_after.isdecimal() else 1.0
    text = message or body[:200].decode(errors="replace") or "nothing"
    return EngineRefused(status, text, param=param, retry_after=min(waits, _MAX_RETRY_AFTER_S))


def error_message(error: Any) -> tuple[str | None, str | None]:
    """The text of an error object, and the field at fault."""
    if isinstance(error, dict):
        message, param = error.get("message"), error.get("param")
        return (str(message) if message else None), (param if isinstance(param, str) else None)
    if isinstance(error, Sequence) and not isinstance(error, str):
        error = msgspec.json.encode(error).decode()
    return (str(error) if error else None), None
