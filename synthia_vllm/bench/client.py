"""Sends one streamed request and tells what came of it.

TTFT and ITL are as `vllm bench serve` takes them (`vllm.benchmarks.lib.endpoint_request_func`): from just before the
request is sent to the first chunk with a token, and from one such chunk to the next. What that client takes for a
success is looked into here: a stream that is cut or stalls, an error inside it, usage that is not what was sent.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from synthia_vllm.bench.run_file import Request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY: Mapping[str, Any] = {"temperature": 0}
# Fields of vLLM's own, and one of OpenAI's that not all servers know: the fewest know the first ones.
OPTIONAL = ("return_token_ids", "min_tokens", "ignore_eos", "stream_options")
_EXCERPT = 300  # characters of a server's own words
# Less than the servers' own (uvicorn: 5 s): a connection that they are about to close is not used again.
_KEEP_ALIVE_S = 2.0


@dataclass(frozen=True)
class Target:
    """Where requests go. `chat`: its chat route speaks the Synthia format; others are sent the same text as a prompt.

    keys   of users who have one of their own
    salt   for servers that share an engine: their prompts are as long as the others' and not the same
    keep_alive   False for a server that promises to keep a connection and closes it, under the next request
    omit         fields of `OPTIONAL` that the server does not take: what they would tell or bring about is not judged
    """

    url: str
    model: str
    key: str | None = None
    chat: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    salt: str = ""
    keep_alive: bool = True
    omit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """A request to send: `prompt` (token ids or text) for completions, or the `messages` of a chat."""

    output_tokens: int
    prompt: Sequence[int] | str = ()
    messages: Sequence[Mapping[str, str]] = ()
    user: str = ""
    key: str | None = None

    def size(self) -> int:
        """Of the prompt: characters, or token ids."""
        return len(self.prompt) + sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Patience:
    """After how many seconds of silence a stream counts as stalled: before its first token, and after."""

    first_s: float = 300.0
    between_s: float = 30.0


@dataclass(eq=False)
class Reply:
    """What came back, while it comes. Times are `time.perf_counter`'s."""

    chunks: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seen_tokens: int | None = None
    finish_reason: str | None = None
    status: int | None = None
    done: bool = False
    error: str | None = None
    detail: str = ""

    def fail(self, error: str, detail: object = "") -> None:
        """Notes what was wrong first."""
        if self.error is None:
            self.error, self.detail = error, str(detail)[:_EXCERPT]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Client:
    """Sends to one server, over connections that are kept where it keeps them. Used as an async context manager."""

    def __init__(
        self, target: Target, *, sampling: Mapping[str, Any] = GREEDY, patience: Patience | None = None
    ) -> None:
        self.target = target
        self.patience = patience or Patience()
        self._sampling = sampling

    async def __aenter__(self) -> "Client":
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            if self.target.keep_alive
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        # What is too long is for `Patience` to say.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, call: Call, *, start: float, due_s: float, into: Reply | None = None) -> Request:
        """One request from beginning to end; never raises for what the server does.

        `start` is the measurement's, by `time.perf_counter`. `into` lets the caller look at a reply that is on its way.
        """
        reply = into or Reply()
        path, body = self._body(call)
        key = call.key or self.target.keys.get(call.user, self.target.key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(self.patience.first_s) as silence:
                async with self._session.post(self.target.url + path, json=body, headers=headers) as response:
                    reply.status = response.status
                    if response.status != 200:
                        reply.fail(f"http {response.status}", await response.text())
                    else:
                        await self._read(response, reply, silence)
        except TimeoutError:
            reply.fail("stalled", f"silent for {self.patience.between_s if reply.chunks else self.patience.first_s} s")
        except aiohttp.ClientPayloadError as error:
            reply.fail("cut", error)
        except (aiohttp.ClientError, OSError) as error:
            reply.fail("cut" if reply.status == 200 else "connection", error)
        done = time.perf_counter()
        _judge(call, reply, self.target.omit)
        return _record(call, reply, start=start, due_s=due_s, sent=sent, done=done)

    def _body(self, call: Call) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self.target.model, "max_tokens": call.output_tokens, **self._sampling}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        body["return_token_ids"] = True  # vLLM's: what is seen can be counted
        if call.messages:
            # Stop strings are the contract's own; until so many tokens vLLM looks for none.
            path, body = CHAT, body | {"messages": list(call.messages), "min_tokens": call.output_tokens}
        else:
            prompt = call.prompt if isinstance(call.prompt, str) else list(call.prompt)
            path, body = COMPLETIONS, body | {"prompt": prompt}
        return path, {name: value for name, value in body.items() if name not in self.target.omit}

    async def _read(self, response: aiohttp.ClientResponse, reply: Reply, silence: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        buffer = b""
        async for data in response.content.iter_any():
            now = time.perf_counter()
            events = (buffer + data).replace(b"\r\n", b"\n").split(b"\n\n")
            buffer = events.pop()
            for event in events:
                if event.startswith(b"data:") and not _take(event[5:].strip(), now, reply):
                    return
            if reply.chunks:
                silence.reschedule(loop.time() + self.patience.between_s)


def _take(data: bytes, now: float, reply: Reply) -> bool:
    """One event; False if nothing can be made of the rest."""
    if data == b"[DONE]":
        reply.done = True
        return True
    try:
        chunk = _decode(data)
    except msgspec.DecodeError as error:
        reply.fail("malformed", f"{error}: {data[:100]!r}")
        return False
    if chunk.error is not None:
        reply.fail("error event", chunk.error)
        return False
    if chunk.usage is not None:
        reply.prompt_tokens, reply.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    for choice in chunk.choices[:1]:
        text = (choice.delta.content if choice.delta is not None else choice.text) or ""
        reply.text.append(text)
        if choice.token_ids is not None:
            reply.seen_tokens = (reply.seen_tokens or 0) + len(choice.token_ids)
        # Without ids, a chunk has a token if it has text; vLLM's completions have one even where the text is empty.
        if choice.token_ids or text or (choice.delta is None and choice.finish_reason is None):
            reply.chunks.append(now)
        reply.finish_reason = choice.finish_reason or reply.finish_reason
    return True


def _judge(call: Call, reply: Reply, omit: frozenset[str]) -> None:
    """Finds what is wrong with a reply that looked well."""
    told, seen = reply.output_tokens, reply.seen_tokens
    if reply.error is not None:
        return
    if not reply.done or reply.finish_reason is None:
        reply.fail("cut", "no [DONE]" if not reply.done else "no finish_reason")
    elif told is None:
        if "stream_options" not in omit:
            reply.fail("usage", "the server told none")
    elif seen is not None and told != seen:
        reply.fail("usage", f"{told} tokens told, {seen} sent")
    elif told < len(reply.chunks) or told > call.output_tokens:
        reply.fail("usage", f"{told} tokens told, {len(reply.chunks)} chunks sent, {call.output_tokens} asked for")
    elif not call.messages and not isinstance(call.prompt, str) and reply.prompt_tokens != len(call.prompt):
        reply.fail("usage", f"{reply.prompt_tokens} prompt tokens told, {len(call.prompt)} sent")
    elif told < call.output_tokens and "ignore_eos" not in omit:
        reply.fail("short", f"{told} of {call.output_tokens} tokens, finish_reason {reply.finish_reason}")


def _record(call: Call, reply: Reply, *, start: float, due_s: float, sent: float, done: float) -> Request:
    length = 0 if isinstance(call.prompt, str) else len(call.prompt)
    counted = reply.seen_tokens if reply.seen_tokens is not None else len(reply.chunks)
    return Request(
        user=call.user,
        due_s=round(due_s, 6),
        sent_s=round(sent - start, 6),
        chunk_s=[round(moment - start, 5) for moment in reply.chunks],
        done_s=round(done - start, 6),
        prompt_tokens=reply.prompt_tokens or length,
        wanted_tokens=call.output_tokens,
        output_tokens=counted if reply.output_tokens is None else reply.output_tokens,
        seen_tokens=reply.seen_tokens,
        finish_reason=reply.finish_reason,
        status=reply.status,
        error=reply.error,
        detail=reply.detail,
    )
