"""A client that believes nothing: one stream over a socket of its own, each byte checked against what it should be."""

import asyncio
import json
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from synthia_vllm.bench.null.tokens import difference, ids_of, seed_of, token_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_EXCERPT = 400  # bytes of what was wrong


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    id: str = ""
    object: str = ""
    model: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


class _Wrong(Exception):
    """An event that can't be right."""


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True)
class Wanted:
    """A request and what its reply must be. `text` None: any, it is looked at afterwards."""

    path: str
    body: dict[str, Any]
    tokens: int
    text: str | None = None
    key: str | None = None
    session: str | None = None  # X-Session-Id
    seed: int | None = None  # of the reply, where it is a null engine's


def numbered(path: str, prompt: str, tokens: int, **options: Any) -> Wanted:
    """A request to null engines, whose reply is known (`null_tokens`)."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    seed = seed_of(ids_of(asked))
    text = "".join(token_text(seed, position) for position in range(tokens))
    key = options.pop("key", None)
    body = {"model": "null", **asked, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    # The prompt's contract strips the replies of chats.
    return Wanted(path, body | options, tokens, text.strip() if path == CHAT else text, key, seed=seed)


class CheckedStream(asyncio.Protocol):
    """Sends one request and reads its stream to the end; `ended` is set then. It never raises for what it gets.

    Whole is: status 200, one id in all chunks, the wanted text with nothing missing, doubled or added, one
    finish_reason (`length`) after it, usage with the right count, `[DONE]` once and last, and the reply's proper end.
    """

    def __init__(self, wanted: Wanted, host: str) -> None:
        self.wanted = wanted
        self.times = array("d")  # of each chunk with text, loop time
        self.text: list[str] = []
        self.broken: str | None = None  # what was wrong first
        self.offending = b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: Any = None  # uvloop's is no asyncio.Transport
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""
        self._at = 0  # of the wanted text
        self._id = self._finish = ""
        self._usage: _Usage | None = None
        self._done = self._complete = False

    @property
    def tokens(self) -> int:
        """As the engine counted, at the end."""
        return self._usage.completion_tokens if self._usage else 0

    def pause_at(self, moment: float) -> float | None:
        """The longer of the gap between chunks that spans a moment and the next one; None if it was not running."""
        after = bisect_right(self.times, moment)
        if after == 0 or after >= len(self.times):
            return None
        gaps = [self.times[at] - self.times[at - 1] for at in (after, after + 1) if at < len(self.times)]
        return max(gaps)

    def fail(self, reason: str, offending: bytes = b"") -> None:
        """Notes the first thing that is wrong, and ends."""
        if self.broken is None:
            self.broken, self.offending = reason, offending[:_EXCERPT]
        self._end()
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        body = json.dumps(self.wanted.body).encode()
        head = f"POST {self.wanted.path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        if self.wanted.key is not None:
            head += f"authorization: Bearer {self.wanted.key}\r\n"
        if self.wanted.session is not None:
            head += f"x-session-id: {self.wanted.session}\r\n"
        transport.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}", data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._complete:
            self.fail(f"the connection ended before the reply: {error or 'closed'}", self._buffer)
        self._end()

    # httptools

    def on_body(self, data: bytes) -> None:
        if self._parser.get_status_code() != 200:
            return self.fail(f"status {self._parser.get_status_code()}", data)
        events = (self._buffer + data).split(b"\n\n")
        self._buffer = events.pop()
        for event in events:
            if self.broken is not None:
                break
            try:
                self._take(event)
            except _Wrong as wrong:
                self.fail(str(wrong), event)
        return None

    def on_message_complete(self) -> None:
        self._complete = True
        if self.broken is None:
            self._judge()
        self._end()
        self.transport.close()

    def _take(self, event: bytes) -> None:
        if event.startswith(b":"):
            return  # a comment, as SSE allows
        if self._done:
            raise _Wrong("something after [DONE]")
        if event == b"data: [DONE]":
            self._done = True
            return
        try:
            chunk = _decode(event[6:])
        except msgspec.DecodeError:
            raise _Wrong("not an event") from None
        if chunk.error is not None:
            raise _Wrong("an error in the stream")
        if self._id and chunk.id != self._id:
            raise _Wrong(f"another id than {self._id}")
        self._id = chunk.id
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            self._take_choice(choice)

    def _take_choice(self, choice: _Choice) -> None:
        text = (choice.delta.content if choice.delta is not None else choice.text) or ""
        if text:
            if self._finish:
                raise _Wrong("text after the finish_reason")
            self.times.append(self._loop.time())
            whole = self.wanted.text
            if whole is None:
                self.text.append(text)
            elif whole.startswith(text, self._at):
                self._at += len(text)
            else:
                raise _Wrong(self._difference(whole, text))
        if choice.finish_reason is not None:
            if self._finish:
                raise _Wrong("a second finish_reason")
            self._finish = choice.finish_reason

    def _difference(self, whole: str, text: str) -> str:
        told = f"{whole[self._at : self._at + len(text)]!r} belongs here"
        if self.wanted.seed is None:
            return told
        stripped = whole[:1] != " "  # as the prompt's contract does with the replies of chats
        return f"{told}: {difference(self.wanted.seed, self._at + stripped, text)}"

    def _judge(self) -> None:
        wanted = self.wanted
        if self._parser.get_status_code() != 200:
            return self.fail(f"status {self._parser.get_status_code()}")
        if not self._done or self._buffer:
            return self.fail("no [DONE] at the end", self._buffer)
        if self._finish != "length":
            return self.fail(f"finish_reason {self._finish or 'missing'}")
        if wanted.text is not None and self._at != len(wanted.text):
            return self.fail(f"text ends at character {self._at} of {len(wanted.text)}")
        if self._usage is None or self._usage.completion_tokens != wanted.tokens:
            return self.fail(f"usage {self._usage}, where {wanted.tokens} tokens were generated")
        return None

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def open_stream(url: str, wanted: Wanted) -> CheckedStream:
    """Connects and sends; a connection that is refused is a broken stream too."""
    where = urlsplit(url)
    stream = CheckedStream(wanted, where.netloc)
    try:
        host, port = where.hostname or "127.0.0.1", where.port or 80
        await asyncio.get_running_loop().create_connection(lambda: stream, host, port)
    except OSError as error:
        stream.fail(f"no connection: {error}")
    return stream


async def run_stream(url: str, wanted: Wanted) -> CheckedStream:
    """One stream from beginning to end. Cancelled, it hangs up."""
    stream = await open_stream(url, wanted)
    try:
        await stream.ended
    except asyncio.CancelledError:
        if stream.transport is not None:
            stream.transport.abort()
        raise
    return stream
