"""Sends streams to a server as cheaply as Python can, and counts their tokens exactly: what the speed scripts share.

The client looks for the ends of streams only, and takes the number of tokens from each stream's own usage. So it costs
a fraction of what a gateway does, and a server that sends several tokens at once is counted right.
"""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import click
import psutil

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
QUESTION = "What is an orca, and what does it eat?"
_TAIL = 1024  # bytes at the end of a stream, in which its usage is
_END = b"data: [DONE]"
_USAGE = re.compile(rb'"completion_tokens":\s?(\d+)')
# Text that is more than white space, or, where engines speak tokens, any token: our contract leaves out white space at
# the start of a reply, others send it.
_FIRST = re.compile(rb'"(?:content|text)":\s?"(?:\\[nrt]|\s)*(?:[^"\\\s]|\\[^nrt])|"token_ids":\s?\[\d')
_TIMEOUT_S = 600.0
_FIRST_S = 90.0


class StreamBroken(Exception):
    """A stream was refused, or ended without its end."""


@dataclass
class Load:
    """What came of many streams. `first` are the seconds to each one's first token."""

    seconds: float = 0.0
    tokens: int = 0
    chunks: int = 0
    first: list[float] = field(default_factory=list)


def chat(model: str, tokens: int, *, salt: str = "", headers: Mapping[str, str] | None = None, **fields: Any) -> bytes:
    """A streamed chat as it goes over the wire. `salt` makes its prompt one that no cache knows."""
    messages = [{"role": "user", "content": f"{salt} {QUESTION}".strip()}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True, **fields}
    return post(CHAT, body | {"stream_options": {"include_usage": True}}, headers or {})


def post(path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    content = json.dumps(body).encode()
    given = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(content)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Stream(asyncio.Protocol):
    """One request on a connection of its own.

    first   seconds to the first text that is more than white space
    done    tokens, by its usage, once it has ended; StreamBroken where it breaks
    """

    def __init__(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.chunks = 0
        self.first: asyncio.Future[float] = loop.create_future()
        self.done: asyncio.Future[int] = loop.create_future()
        self._request = request
        self._sent = 0.0
        self._tail = b""

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self.transport = transport
        self._sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.chunks += data.count(b"\ndata: ")
        if not self.first.done() and _FIRST.search(self._tail + data):
            self.first.set_result(time.perf_counter() - self._sent)
        tail = self._tail = (self._tail + data)[-_TAIL:]
        if _END in tail and not self.done.done():
            found = _USAGE.findall(tail)
            if found:
                self.done.set_result(int(found[-1]))
                if not self.first.done():  # it was white space throughout
                    self.first.set_result(time.perf_counter() - self._sent)
            else:
                self._break("it told no usage")

    def connection_lost(self, exc: Exception | None) -> None:
        self._break(f"its connection was closed: {exc}")

    def close(self) -> None:
        self.done.cancel()
        self.first.cancel()
        self.transport.abort()

    def _break(self, why: str) -> None:
        error = StreamBroken(f"a stream broke, {why}; it ended with {self._tail[-300:]!r}")
        for future in (self.first, self.done):
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits for the other one does not ask


async def open_stream(port: int, request: bytes) -> Stream:
    _, stream = await asyncio.get_running_loop().create_connection(lambda: Stream(request), "127.0.0.1", port)
    return stream


async def load(port: int, clients: Sequence[Iterable[bytes]], *, spread: float = 0.0) -> Load:
    """Several clients at once, each sending its requests one after another; they begin over `spread` seconds.

    Raises ClickException for the first stream that breaks: such a run tells nothing.
    """
    total = Load()

    async def client(number: int, requests: Iterable[bytes]) -> None:
        await asyncio.sleep(spread * number / len(clients))
        for request in requests:
            stream = await open_stream(port, request)
            try:
                first, tokens = await stream.first, await stream.done
                total.first.append(first)
                total.tokens += tokens
                total.chunks += stream.chunks
            finally:
                stream.close()

    broken: BaseException | None = None
    began = time.perf_counter()
    try:
        async with asyncio.timeout(_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            for number, requests in enumerate(clients):
                tasks.create_task(client(number, requests))
    except* (StreamBroken, OSError, TimeoutError) as group:
        broken = group.exceptions[0]  # not raised here: Python 3.11.2 would make a group of it
    if broken is not None:
        raise click.ClickException(f"port {port}: {broken!r}")
    total.seconds = time.perf_counter() - began
    return total


async def first_tokens(ports: Mapping[str, int], request: Callable[[], bytes], count: int) -> dict[str, list[float]]:
    """Seconds to the first token of one stream at a time, the servers taking turns."""
    found: dict[str, list[float]] = {name: [] for name in ports}
    for _ in range(count):
        for name, port in ports.items():
            found[name] += (await load(port, [[request()]])).first
    return found


async def memory_a_stream(pid: int, port: int, request: bytes, count: int) -> float:
    """KB of a server's memory for each of so many streams that have their first token and do not end."""
    process = psutil.Process(pid)
    streams: list[Stream] = []
    before = 0
    try:
        for opened in (50, count):  # the first few pay for what all share
            before = process.memory_info().rss
            streams += [await open_stream(port, request) for _ in range(opened)]
            await asyncio.wait_for(asyncio.gather(*(stream.first for stream in streams)), _FIRST_S)
        return (process.memory_info().rss - before) / 1024 / count
    finally:
        for stream in streams:
            stream.close()


def for_seconds(seconds: float, request: bytes) -> Iterator[bytes]:
    """A client's requests, for so long; what is under way then is not cut off."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield request


def processor_seconds(pid: int, *, family: bool = False) -> float:
    """What a process has used of processors, its threads included; of a `family` also its children."""
    whole = psutil.Process(pid)
    total = 0.0
    for process in [whole, *(whole.children(recursive=True) if family else ())]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def wait_for(port: int, timeout: float = 60.0) -> None:
    """Until something listens. Raises ClickException after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise click.ClickException(f"nothing listens on port {port}")
