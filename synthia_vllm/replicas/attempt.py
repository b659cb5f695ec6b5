"""One request to one engine, whose reply is read as it comes."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Literal

import aiohttp
import msgspec

from synthia_vllm.api import abort
from synthia_vllm.replicas.detect import Endpoint
from synthia_vllm.replicas.http import EngineRefused, refusal
from synthia_vllm.replicas.sse import EventReader, EventTooLong

# died: the connection broke; hung: its engine stands still; drained: it is to stop; error: it said so itself;
# overlong: the reply took longer than any may.
LossReason = Literal["died", "hung", "drained", "error", "overlong"]

DONE = b"[DONE]"
_END_S = 1.0  # that a connection's end may take once all is said
_MAX_ERROR_BYTES = 65_536


class AttemptLost(Exception):
    """An engine was lost under a request, or could not answer it; `reached`: the request may have caused it."""

    def __init__(self, reason: LossReason, detail: str = "", *, reached: bool = True, refused: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.reached = reached
        self.refused = refused  # the connection was not accepted


class Attempt:
    """A POST that can be taken away from outside, wherever it waits for the engine.

    As a context manager it ends the connection, unless that was read to its end, and turns aiohttp's errors into
    AttemptLost. Taking it away never interrupts whoever it gives deltas to. Hence no cancellation but a deadline until
    the reply's headers are there, and the connection's end from then on.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        headers: Mapping[str, str],
        *,
        heard: Callable[[], None] = lambda: None,
        movable: bool = False,
        prompt_tokens: int = 0,
        ends_at: float = math.inf,
        silence_s: float | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.movable = movable  # can go on elsewhere at no cost
        self.prompt_tokens = prompt_tokens  # that the engine has to compute before it can answer
        self.begun = False  # a byte of the reply has come
        self.ends_at = ends_at  # loop time
        self._silence_s = silence_s  # nothing for so long is a hang; None: somebody else judges that
        self.taken: LossReason | None = None
        self._session = session
        self._headers = headers
        self._heard = heard
        self._deadline: asyncio.Timeout | None = None
        self._reply: aiohttp.ClientResponse | None = None
        self._reader = EventReader()

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reply is not None:
            self._reply.close()  # of a reply that was read to its end, a no-op: the connection went back then
        match error:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                raise AttemptLost("died", str(error), reached=False, refused=True) from None
            case TimeoutError():
                raise AttemptLost(self.taken or "hung", str(error)) from None
            case aiohttp.ClientError():
                raise AttemptLost(self.taken or "died", str(error)) from None
            case EventTooLong() | msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
                raise EngineRefused(502, f"what it sent can't be read: {error}") from None

    def take_away(self, reason: LossReason) -> None:
        self.taken = self.taken or reason
        if self._reply is not None:
            self._reply.close()
        elif self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def events(self, path: str, body: bytes) -> AsyncGenerator[list[bytes], None]:
        """The data of the reply's events, as many as each read brings. A whole reply in JSON is one event.

        Ends with `[DONE]`, which is not given, or with the connection. Raises EngineRefused and aiohttp's errors.
        """
        reply = await self._post(path, body)
        if reply.content_type == "application/json":
            whole = await reply.read()
            self.begun = True
            yield [whole]
            return
        if reply.content_type != "text/event-stream":
            raise EngineRefused(502, f"it sent {reply.content_type} where a stream was due")
        feed, readany, heard = self._reader.feed, reply.content.readany, self._heard
        while part := await readany():
            heard()
            self.begun = True
            events = feed(part)
            if DONE in events:
                yield events[: events.index(DONE)]
                await self._end(reply)
                return
            yield events

    async def _post(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        """The reply, as soon as its headers are there. Raises AttemptLost if taken away."""
        connect = self._session.timeout.sock_connect
        timeouts = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=self._silence_s)
        try:
            async with asyncio.timeout(None) as self._deadline:
                if self.taken:
                    raise AttemptLost(self.taken)
                reply = await self._session.post(
                    self.endpoint.url + path,
                    data=body,
                    headers=self._headers,
                    allow_redirects=False,
                    timeout=timeouts,
                )
        except TimeoutError:
            if self.taken:
                raise AttemptLost(self.taken) from None
            raise
        self._reply = reply
        if reply.status != 200:
            said = await reply.content.read(_MAX_ERROR_BYTES)
            raise refusal(reply.status, said, reply.headers.get("Retry-After"))
        return reply

    async def abort(self) -> tuple[int | None, list[bytes]]:
        """Ends the request at the engine before anybody has its end.

        The number of tokens that it came to, or else the events that its reply ends with, where they can be had: of an
        engine that can only be left, nothing.
        """
        events: list[bytes] = []
        if not self.endpoint.aborts:
            return None, events
        asked = msgspec.json.encode(abort.AbortRequest(self._headers["X-Request-Id"]))
        headers = {name: value for name, value in self._headers.items() if name != "X-Request-Id"}
        url = self.endpoint.url + abort.PATH
        with suppress(TimeoutError, aiohttp.ClientError, msgspec.MsgspecError, EventTooLong):
            async with asyncio.timeout(_END_S):
                async with self._session.post(url, data=asked, headers=headers) as answer:
                    if answer.status == 200:
                        told = msgspec.json.decode(await answer.read(), type=abort.Aborted)
                        if told.completion_tokens is not None:
                            return told.completion_tokens, events
                if self._reply is not None:  # what it was about to say; of one that had ended, its end
                    while DONE not in events and (part := await self._reply.content.readany()):
                        events += self._reader.feed(part)
        return None, [data for data in events if data != DONE]

    async def _end(self, reply: aiohttp.ClientResponse) -> None:
        """Reads on to the connection's end, so that it can be used again."""
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_END_S):
                while await reply.content.readany():
                    pass


async def all_of(events: AsyncIterator[list[bytes]]) -> list[bytes]:
    """What comes after a sequence's end, such as its usage. Whatever goes wrong with it, the sequence is whole."""
    found: list[bytes] = []
    with suppress(TimeoutError, aiohttp.ClientError, EventTooLong, AttemptLost, EngineRefused):
        async with asyncio.timeout(_END_S):
            async for more in events:
                found += more
    return found
