"""The users of a soak: most ask and read; others leave, don't read, send half of what they promised, or nonsense."""

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from benchmarks.resume import APIS
from synthia_vllm.gateway.accounts import Priority

CHAT, COMPLETIONS, RESPONSES, MESSAGES = APIS
# How the last event of a stream begins.
_ENDS = {
    CHAT: (b"data: [DONE]",),
    COMPLETIONS: (b"data: [DONE]",),
    RESPONSES: (b"event: response.completed", b"event: response.incomplete"),
    MESSAGES: (b"event: message_stop",),
}
_WORDS = ("orca", "whale", "fjord", "herring", "winter", "song", "ice", "harbour")
_LONGEST_S = 180.0  # the queue lets nobody wait longer than 60
_AGAIN_S = 0.5  # who was refused waits so long
BUSY = "503"  # the queue is full, or a store is away that is needed: anybody may get it


@dataclass
class Client:
    """What one user asks with. Each of its requests is over a connection of its own."""

    url: str
    key: str
    session: aiohttp.ClientSession
    draw: random.Random

    def post(self, api: str, body: Mapping[str, Any]) -> Any:
        return self.session.post(self.url + api, json=body, headers={"Authorization": f"Bearer {self.key}"})

    def body(self, api: str, *, stream: bool, tokens: int = 0, **more: Any) -> dict[str, Any]:
        """A request of a length that is drawn."""
        draw = self.draw
        text = " ".join(draw.choices(_WORDS, k=int(draw.expovariate(1 / 30)) + 3))
        body: dict[str, Any] = {"model": "synthia", "stream": stream, **more}
        body["max_output_tokens" if api == RESPONSES else "max_tokens"] = tokens or draw.randint(4, 100)
        if api == COMPLETIONS:
            body["prompt"] = text
        elif api == RESPONSES:
            body["input"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        return body

    async def open(
        self, api: str, body: Mapping[str, Any], sent: int | None = None, *, buffer: int = 65_536
    ) -> socket.socket:
        """A socket over which a request has gone, up to byte `sent`; all of it if None. `buffer` is for what comes."""
        where = urlsplit(self.url)
        data = json.dumps(body).encode()
        lines = [f"POST {api} HTTP/1.1", f"host: {where.netloc}", f"authorization: Bearer {self.key}"]
        lines += ["content-type: application/json", f"content-length: {len(data)}", "connection: close", "", ""]
        connection = socket.socket()
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (where.hostname, where.port))
            await loop.sock_sendall(connection, ("\r\n".join(lines).encode() + data)[:sent])
        except BaseException:
            connection.close()
            raise
        return connection


Act = Callable[[Client], Awaitable[list[str]]]


async def read(client: Client, api: str = CHAT, *, stream: bool = False, n: int = 1) -> list[str]:
    """One whole reply: its status, or `broken` where it has no proper end."""
    more = {"n": n} if n > 1 else {}
    async with client.post(api, client.body(api, stream=stream, **more)) as reply:
        said = await reply.read()
    if reply.status != 200:
        return [str(reply.status)]
    whole = said.rstrip().split(b"\n\n")[-1].startswith(_ENDS[api]) if stream else said.endswith(b"}")
    return ["200" if whole and not (stream and b'"error":{' in said) else "broken"]


async def leave(client: Client, *, stream: bool, n: int = 1) -> list[str]:
    """Goes in the middle: after some chunks of a stream, or after a moment."""
    api = client.draw.choice((CHAT, COMPLETIONS))
    body = client.body(api, stream=stream, tokens=200, n=n, ignore_eos=True)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LONGEST_S if stream else client.draw.expovariate(1.0)):
            async with client.post(api, body) as reply:
                if reply.status != 200:
                    return [str(reply.status)]
                for _ in range(client.draw.randint(0, 12)):
                    await reply.content.readany()
    return ["left"]


async def not_read(client: Client) -> list[str]:
    """Opens a stream, reads nothing of it, and goes."""
    body = client.body(COMPLETIONS, stream=True, tokens=400, ignore_eos=True, n=2)
    with await client.open(COMPLETIONS, body, buffer=2048):
        await asyncio.sleep(client.draw.uniform(5, 20))
    return ["left"]


async def slow(client: Client) -> list[str]:
    """Sends a request a few bytes at a time, and then reads the reply."""
    body = client.body(CHAT, stream=False)
    size = len(json.dumps(body))
    loop = asyncio.get_running_loop()
    with await client.open(CHAT, body, -size) as connection:
        data = json.dumps(body).encode()
        for at in range(0, size, max(1, size // 8)):
            await asyncio.sleep(0.5)
            await loop.sock_sendall(connection, data[at : at + max(1, size // 8)])
        said = b""
        async with asyncio.timeout(_LONGEST_S):
            while part := await loop.sock_recv(connection, 65_536):
                said += part
    status = said[9:12].decode()
    return [status if status != "200" or said.endswith(b"}") else "broken"]


async def half(client: Client) -> list[str]:
    """Sends a part of a request, of its headers or of its body, waits, and goes."""
    body = client.body(CHAT, stream=True)
    with await client.open(CHAT, body, client.draw.randint(1, 250)):
        await asyncio.sleep(client.draw.uniform(1, 15))
    return ["left"]


async def refused(client: Client) -> list[str]:
    """What can't be done: each must be refused as it should."""
    chat = client.body(CHAT, stream=False)
    key = {"Authorization": f"Bearer {client.key}"}
    cases: tuple[tuple[int, str, bytes, dict[str, str]], ...] = (
        (400, CHAT, b'{"model": "synthia", "messages": [', key),
        (400, CHAT, json.dumps(chat | {"max_tokens": "9"}).encode(), key),
        (400, CHAT, json.dumps(chat | {"n": 129}).encode(), key),
        (400, COMPLETIONS, json.dumps({"model": "synthia", "prompt": "orca " * 9000}).encode(), key),
        (404, CHAT, json.dumps(chat | {"model": "other"}).encode(), key),
        (404, "/v1/engines", b"{}", key),
        (401, CHAT, json.dumps(chat).encode(), {"Authorization": f"Bearer {client.key[:-4]}0000"}),
        (415, CHAT, b"-", {**key, "Content-Encoding": "br"}),
    )
    status, api, data, headers = client.draw.choice(cases)
    headers = {"Content-Type": "application/json", **headers}
    async with client.session.post(client.url + api, data=data, headers=headers) as reply:
        await reply.read()
    return ["refused" if reply.status == status else f"{reply.status} for {status}"]


async def burst(client: Client) -> list[str]:
    """Many at once, and then nothing for a while."""
    apis = client.draw.choices(APIS, k=16)
    told = await asyncio.gather(*(read(client, api, stream=at % 2 == 0) for at, api in enumerate(apis)))
    await asyncio.sleep(20)
    return [answer for one in told for answer in one]


async def capped(client: Client, at_once: int = 6) -> list[str]:
    """More at once than its limit lets in."""
    told = await asyncio.gather(*(read(client) for _ in range(at_once)))
    await asyncio.sleep(2)
    return [answer for one in told for answer in one]


@dataclass(frozen=True)
class Kind:
    """Users of one kind: how many, how many requests each has at once, and which answers they may get beside `BUSY`."""

    act: Act
    may: tuple[str, ...] = ("200",)
    users: int = 1
    at_once: int = 1
    limits: Mapping[str, int] = field(default_factory=dict)
    priority: Priority | None = None


AT_ONCE = 4  # that a capped user may
KINDS: dict[str, Kind] = {
    "chat, streamed": Kind(partial(read, stream=True), users=3),
    "chat, whole": Kind(partial(read, stream=False), users=2),
    "completions, streamed, n=2": Kind(partial(read, api=COMPLETIONS, stream=True, n=2)),
    "completions, whole, n=3": Kind(partial(read, api=COMPLETIONS, n=3)),
    "responses, streamed": Kind(partial(read, api=RESPONSES, stream=True)),
    "responses, whole": Kind(partial(read, api=RESPONSES)),
    "messages, streamed": Kind(partial(read, api=MESSAGES, stream=True)),
    "messages, whole": Kind(partial(read, api=MESSAGES)),
    "leaves a stream": Kind(partial(leave, stream=True), ("left",), users=2),
    "leaves a stream, n=3": Kind(partial(leave, stream=True, n=3), ("left",)),
    "leaves a whole reply": Kind(partial(leave, stream=False), ("left",), users=2),
    "does not read": Kind(not_read, ("left",), at_once=2),
    "sends slowly": Kind(slow, at_once=3),
    "sends half": Kind(half, ("left",), at_once=4),
    "is refused": Kind(refused, ("refused",)),
    "rate limited": Kind(read, ("200", "429"), limits={"requests_per_minute": 4, "tokens_per_month": 10**9}),
    "tokens limited": Kind(read, ("200", "429"), limits={"tokens_per_minute": 500}),
    "capped": Kind(capped, ("200", "429"), limits={"concurrent_requests": AT_ONCE}),
    "bursts": Kind(burst),
    "batch flood": Kind(partial(read, api=COMPLETIONS, stream=True), at_once=8, priority="batch"),
}


def name_of(kind: str, number: int) -> str:
    """A user's name, of the characters that a name may have."""
    return f"{''.join(one if one.isalnum() else '-' for one in kind)}.{number}"


def kind_of(user: str) -> str:
    return {name_of(kind, 0).rpartition(".")[0]: kind for kind in KINDS}.get(user.rpartition(".")[0], user)


@dataclass
class Users:
    """All of them at once; `keys` by user. `answers` counts what they got, by kind."""

    url: str
    keys: Mapping[str, str]
    kinds: tuple[str, ...] = tuple(KINDS)
    answers: dict[str, Counter[str]] = field(default_factory=dict)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, and until each has ended what it was at."""
        async with self.session() as session, asyncio.TaskGroup() as tasks:
            for kind in self.kinds:
                self.answers[kind] = Counter()
                for number in range(KINDS[kind].users * KINDS[kind].at_once):
                    user = name_of(kind, number % KINDS[kind].users)
                    client = Client(self.url, self.keys[user], session, random.Random(f"{kind} {number}"))
                    tasks.create_task(self._again_and_again(kind, client, stop))

    def unexpected(self) -> dict[str, int]:
        """Answers that their kind may not get."""
        return {
            f"{kind}: {answer}": count
            for kind, answers in self.answers.items()
            for answer, count in sorted(answers.items())
            if answer not in (*KINDS[kind].may, BUSY) and not answer.startswith(f"{BUSY} for")
        }

    def session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(_LONGEST_S))

    async def _again_and_again(self, kind: str, client: Client, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                answers = await KINDS[kind].act(client)
            except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
                answers = [f"{type(error).__name__}: {error}"[:100]]
            self.answers[kind].update(answers)
            if not {"200", "left"} & set(answers):
                await asyncio.sleep(_AGAIN_S)
