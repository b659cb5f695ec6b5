"""One request from its first replica to its last."""

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import msgspec
import structlog
from starlette.types import Message, Scope, Send

from synthia_vllm.cluster.replica import Leg, LegLost, LossReason, Replica
from synthia_vllm.cluster.resume import COMPLETIONS, Progress, resumable
from synthia_vllm.cluster.routing import affinity_of
from synthia_vllm.errors import RequestError, UpstreamLost, UpstreamTimeout
from synthia_vllm.gateway.call import call_of
from synthia_vllm.gateway.events import is_one_event, take_events
from synthia_vllm.gateway.forwarding import end_to_end, error_event, request_headers
from synthia_vllm.metrics.replicas import STREAM_RESUMES

if TYPE_CHECKING:
    from synthia_vllm.cluster.pool import ReplicaPool

_ERROR = b'data: {"error"'
_MESSAGES_ERROR = b"event: error\n"
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]
_BUSY = 503  # what Ray Serve answers over max_ongoing_requests
_DETOKENIZE_TIMEOUT_S = 2.0
_CUT_CHARACTER = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, hence tokens
_SETTLE_S = 0.5

_log = structlog.get_logger(__name__)


class Exchange:
    """Asks replica after replica until the client has its whole reply.

    Raises UpstreamLost where that can't be, after one error event in the band if a stream has begun: the request was
    there when too many replicas died, or what it had can't be taken up by another.
    """

    def __init__(self, pool: "ReplicaPool", scope: Scope, body: bytes, send: Send) -> None:
        self._pool = pool
        self._scope = scope
        self._send = send
        self._body = body
        self._route: str = scope["path"]
        self._call = call_of(scope)
        self._request = _object(body) if scope["method"] == "POST" else None
        self._streams = self._request is not None and self._request.get("stream") is True
        self._affinity = affinity_of(scope, self._request)
        self._progress: Progress | None = None
        if self._request is not None and resumable(self._route, self._request):
            self._progress = Progress(self._route, self._request)
        self._started = False  # the reply's status went out
        self._sent = False  # and some of its body
        self._last_loss: LossReason | None = None
        self._legs = 0
        self._on_trial = False
        # Replicas lost under this request before it had a token there. From the first on it is tried where no other
        # suspect is, so that the next loss has one cause: who was there by chance is not refused.
        self._suspicion = 0
        self._position_before = 0  # of this leg
        self._refused_by: set[Replica] = set()  # answered with a 5xx of their own

    async def run(self) -> None:
        while True:
            replica = await self._acquire()
            self._position_before = self._position()
            try:
                await self._stay(replica)
            except LegLost as loss:
                self._pool.lost(replica, loss.reason)
                await self._judge(replica, loss)
            else:
                if self._last_loss is not None:
                    STREAM_RESUMES.labels(self._last_loss, "resumed" if self._progress else "retried").inc()
                return
            finally:
                self._pool.release(replica, self._on_trial)

    async def _acquire(self) -> Replica:
        self._on_trial = self._suspicion > 0
        if self._on_trial and self._last_loss == "died":
            # Replicas of one node die one after the other; a trial among them would find the wrong one guilty.
            await asyncio.sleep(_SETTLE_S)
        try:
            return await self._pool.acquire(
                self._affinity,
                self._refused_by,
                wait=self._request is not None,
                on_trial=self._on_trial,
                on_wait=self._tell_of_wait,
            )
        except RequestError as error:
            return await self._break(error)

    async def _stay(self, replica: Replica) -> None:
        """One leg. Raises LegLost where the next replica has to take over."""
        self._legs += 1
        if self._call is not None:
            self._call.replica, self._call.resumes = replica.name, self._legs - 1
        with Leg(replica, movable=self._progress is not None) as leg:
            try:
                path, body = await self._question(replica)
                if path is None:
                    return await self._send_body(body, last=True)
                reply = await leg.ask(
                    self._pool.session,
                    self._scope["method"],
                    replica.url + path + self._query(),
                    data=body or None,
                    headers=self._headers(replica),
                )
                await self._answer(replica, reply)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                self._legs -= 1
                raise LegLost("died", str(error), reached=False) from None
            except TimeoutError as error:
                raise LegLost(leg.taken or "hung", str(error)) from None
            except aiohttp.ClientError as error:
                raise LegLost(leg.taken or "died", str(error)) from None

    async def _question(self, replica: Replica) -> tuple[str | None, bytes]:
        """Path and body for this leg; no path where all is said, and the end that the client still has to get."""
        progress = self._progress
        if progress is None:
            return self._route, self._body
        if progress.prompt is None:  # nothing came yet
            assert self._request is not None
            progress = self._progress = Progress(self._route, self._request)
            return self._route, msgspec.json.encode(progress.first_request())
        await self._trim(replica, progress)
        rest = progress.next_request(replica.context)
        return (None, progress.close()) if rest is None else (COMPLETIONS, msgspec.json.encode(rest))

    async def _answer(self, replica: Replica, reply: aiohttp.ClientResponse) -> None:
        self._pool.heard(replica)
        if reply.content_type == "text/event-stream":
            await self._start(reply.status, end_to_end(reply.raw_headers))
            return await self._stream(replica, reply)
        body = await reply.read()
        if reply.status >= 500 and self._may_ask_another(replica, busy=reply.status == _BUSY):
            self._refused_by.add(replica)
            raise LegLost("error", f"{reply.status} {body[:200]!r}", reached=reply.status != _BUSY)
        if self._started:  # a stream: its status is out
            await self._break(UpstreamLost(f"the next replica answered {reply.status}: {_message(body)}"))
        await self._start(reply.status, end_to_end(reply.raw_headers))
        return await self._send_body(body, last=True)

    def _may_ask_another(self, replica: Replica, *, busy: bool) -> bool:
        """Whether a replica's own error is not yet the answer: an engine that died says 500, and so does a bug."""
        others = self._pool.up() - self._refused_by - {replica}
        return bool(others) and (busy or self._suspicion + 1 < self._pool.settings.max_losses)

    async def _stream(self, replica: Replica, reply: aiohttp.ClientResponse) -> None:
        progress = self._progress
        buffer = bytearray()
        async for part in reply.content.iter_any():
            self._pool.heard(replica)
            if not buffer and is_one_event(part):
                events: list[bytes] = [part]
            else:
                buffer += part
                events = list(take_events(buffer))
            out = b""
            for event in events:
                if event.startswith((_ERROR, _MESSAGES_ERROR)) and _is_death(event) and (progress or not self._sent):
                    if out:
                        await self._send_body(out)
                    raise LegLost("error", event[:300].decode(errors="replace"))
                out += event if progress is None else progress.feed(event)
            if out:
                await self._send_body(out)
            if self._on_trial and self._progressed():
                self._on_trial = False
                self._pool.acquit(replica)
            if progress is not None and progress.cut_short:
                break
        if progress is not None and not progress.done:
            if not progress.finished:
                raise LegLost("died", "the stream ended before its end")
            return await self._send_body(progress.close(), last=True)
        return await self._send_body(bytes(buffer), last=True)

    async def _judge(self, replica: Replica, loss: LegLost) -> None:
        """Returns if the request may go on elsewhere; answers the client and raises if not."""
        limits = self._pool.settings
        self._last_loss = loss.reason
        if self._progress is not None and self._progress.prompt is not None:
            self._progress.lost()
        if loss.reached and loss.reason != "drained":
            self._suspicion = 0 if self._progressed() else self._suspicion + 1
        _log.warning(
            "replica_lost_under_request",
            replica=replica.name,
            request=self._call.id if self._call else None,
            reason=str(loss),
            tokens=len(self._progress.ids) if self._progress else None,
        )
        if self._suspicion >= limits.max_losses:
            _log.error("request_refused_after_losses", request=self._call.id if self._call else None)
            await self._give_up(
                f"{self._suspicion} replicas were lost when they began to work on this request; it is not tried again",
                "refused",
            )
        if self._legs > limits.max_resumes:
            await self._give_up(f"its replica was lost {self._legs} times", "refused")
        if self._sent and self._progress is None:
            await self._give_up("its replica was lost, and this kind of reply can't go on elsewhere", "broken")

    async def _give_up(self, message: str, result: str) -> NoReturn:
        STREAM_RESUMES.labels(self._last_loss or "", result).inc()
        if self._call is not None:
            self._call.reason = f"replica_{result}"
        kind = UpstreamTimeout if self._last_loss == "hung" else UpstreamLost
        await self._break(kind(message))

    async def _break(self, error: RequestError) -> NoReturn:
        """Raises the error, after telling a client whose stream has begun."""
        if self._started:
            await self._send_body(error_event(error, self._route))
        raise error

    async def _tell_of_wait(self, seconds: float) -> None:
        """A stream's client sees that it waits; a comment is no event (WHATWG, server-sent events)."""
        if self._streams:
            await self._start(200, _STREAM_HEADERS)
            await self._send(_body(b": waiting for a replica, %d s so far\n\n" % seconds))

    async def _trim(self, replica: Replica, progress: Progress) -> None:
        """Drops tokens at the end whose character was not whole yet, where one chunk brought several.

        The engine sent the text up to the last whole character. Which tokens were behind it, its tokenizer tells.
        """
        size, ids = progress.last_tokens()
        for cut in range(min(size, _LONGEST_CHARACTER) if size > 1 else 0):
            body = {"model": (self._request or {}).get("model"), "tokens": ids[: len(ids) - cut]}
            timeout = aiohttp.ClientTimeout(_DETOKENIZE_TIMEOUT_S)
            async with self._pool.session.post(
                f"{replica.url}/detokenize", json=body, headers=self._pool.headers, timeout=timeout
            ) as reply:
                if reply.status != 200:
                    return  # no tokenizer there to ask
                found = await reply.json()
            if not found["prompt"].endswith(_CUT_CHARACTER):
                progress.drop(cut)
                break

    def _position(self) -> int:
        if self._progress is not None:
            return len(self._progress.ids)
        return int(self._sent)

    def _progressed(self) -> bool:
        return self._position() > self._position_before

    def _query(self) -> str:
        given = self._scope.get("query_string")
        return f"?{given.decode('latin-1')}" if given else ""

    def _headers(self, replica: Replica) -> list[tuple[str, str]]:
        found = request_headers(self._scope, self._pool.key, replica.name)
        if self._legs == 1:
            return found
        # An engine knows a request by this id: two legs of one could meet on one engine.
        return [(n, f"{v}-{self._legs}") if n == "x-request-id" else (n, v) for n, v in found]

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, body: bytes, *, last: bool = False) -> None:
        self._sent = True
        await self._send(_body(body, more=not last))


def _body(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None  # the engine's to refuse
    return found if isinstance(found, dict) else None


def _message(body: bytes) -> str:
    found = _object(body) or {}
    error = found.get("error")
    return str(error.get("message")) if isinstance(error, dict) else body[:200].decode(errors="replace")


def _is_death(event: bytes) -> bool:
    """Whether an error event is about the engine, not about the request."""
    found = _object(event[event.find(b"data:") + 5 :]) or {}
    error = found.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return not isinstance(code, int) or code >= 500
