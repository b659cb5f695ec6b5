"""What a limit will refuse costs no work: it is looked at before bodies are read, and before they are tokenized."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.gateway.accounts import UserLimits
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.gateway.limits.base import Limiter
from synthia_vllm.gateway.limits.memory import MemoryLimiter
from synthia_vllm.gateway.limits.shared import SharedLimiter
from synthia_vllm.gateway.request import Exchange, Observer
from tests.gateway.live import exchange, serving
from tests.gateway.whole import COMPLETIONS, House, house, house_settings
from tests.running import until

LONG = json.dumps({"model": "synthia", "prompt": "word " * 220_000, "max_tokens": 5}).encode()
SHORT = json.dumps({"model": "synthia", "prompt": "word", "max_tokens": 5}).encode()
assert len(LONG) > 1_100_000


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that were tokenized."""
    found: list[int] = []
    for name in ("encode", "encode_with_bos"):
        real = getattr(Tokenizer, name)

        def noted(self: Tokenizer, text: str, real: Any = real) -> Any:
            found.append(len(text))
            return real(self, text)

        monkeypatch.setattr(Tokenizer, name, noted)
    return found


class Bodies(Observer):
    """Counts those whose body was read, and is needed no longer, and those that still have it."""

    def __init__(self) -> None:
        self.prepared = self.kept = 0

    def ended(self, exchange: Exchange) -> None:
        self.prepared += exchange.request is not None
        self.kept += exchange.body is not None


@contextmanager
def at(gateway: Gateway) -> Iterator[int]:
    with serving(gateway.app, beside=gateway) as port:
        yield port


def post(port: int, key: str, body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"host: localhost", b"x-api-key: " + key.encode(), *headers]
    lines += [b"content-length: %d" % len(body), b"connection: close", b"", b""]
    return exchange(port, b"\r\n".join(lines) + body, wait=20)


def test_a_megabyte_that_a_limit_refuses_is_neither_read_nor_tokenized(tmp_path: Path, tokenized: list[int]) -> None:
    bodies = Bodies()
    gateway = Gateway(NullEnginePort(context=None), house_settings(tmp_path))
    gateway.access.observers = [bodies]
    _, key = gateway.keys.create("mallory", limits=UserLimits(requests_per_minute=1))
    with at(gateway) as port:
        assert post(port, key, SHORT).startswith(b"HTTP/1.1 200")
        tokenized.clear()
        for _ in range(10):
            told = post(port, key, LONG)
            assert told.startswith(b"HTTP/1.1 429")
            assert b"\r\nretry-after: " in told
            assert b"requests per minute" in told
        chunked = b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: " + key.encode() + b"\r\n"
        assert exchange(port, head + chunked, wait=5).startswith(b"HTTP/1.1 429")
    assert tokenized == []
    assert (bodies.prepared, bodies.kept) == (1, 0)


def test_a_body_that_waits_to_be_asked_for_is_not_asked_for(tmp_path: Path) -> None:
    gateway = Gateway(NullEnginePort(), house_settings(tmp_path))
    _, key = gateway.keys.create("mallory", limits=UserLimits(requests_per_minute=1))
    with at(gateway) as port:
        post(port, key, SHORT)
        told = post(port, key, LONG, b"expect: 100-continue")
        assert told.startswith(b"HTTP/1.1 429")


async def test_megabytes_that_come_at_once_are_worked_on_one_after_the_other(
    tmp_path: Path, tokenized: list[int]
) -> None:
    async with a_house(tmp_path, requests_per_minute=2) as found:
        answers = await asyncio.gather(*(found.post("mallory", COMPLETIONS, LONG) for _ in range(12)))
    assert sorted(answer.status for answer in answers) == [200] * 2 + [429] * 10
    assert len([length for length in tokenized if length > 1_000_000]) == 2


async def test_others_wait_for_nobodys_megabytes(tmp_path: Path) -> None:
    async with a_house(tmp_path, requests_per_minute=2) as found:
        answers = await asyncio.gather(
            *(found.post(user, COMPLETIONS, LONG) for user in ("mallory", "alice", "bob")),
            found.post("alice", COMPLETIONS),
        )
    assert [answer.status for answer in answers] == [200] * 4


@pytest.mark.parametrize(
    "broken", [b'{"model": "synthia", "prompt": 5, "x": "' + b"x" * 20_000 + b'"}', b"x" * 20_000, LONG[:-1]]
)
async def test_one_that_is_refused_for_what_it_is_lets_the_next_pass_and_costs_nothing(
    tmp_path: Path, broken: bytes
) -> None:
    async with a_house(tmp_path, requests_per_minute=1) as found:
        assert [(await found.post("mallory", COMPLETIONS, broken)).status for _ in range(3)] == [400] * 3
        assert (await found.post("mallory", COMPLETIONS, LONG)).status == 200
        assert (await found.post("mallory", COMPLETIONS, LONG)).status == 429


async def test_one_that_leaves_in_its_turn_lets_the_next_pass(tmp_path: Path) -> None:
    async with a_house(tmp_path, concurrent_requests=1) as found:
        found.engine.tokens_per_second = 1
        leave = asyncio.Event()
        first = asyncio.create_task(found.post("mallory", COMPLETIONS, LONG, leave=leave))
        while not found.engine.running:
            await asyncio.sleep(0.01)
        assert (await found.post("mallory", COMPLETIONS, LONG)).status == 429
        leave.set()
        await first
        found.engine.tokens_per_second = None
        assert (await found.post("mallory", COMPLETIONS, LONG)).status == 200


COUNTED = {
    "/tokenize": {"prompt": "word"},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/messages/count_tokens": {"model": "synthia", "messages": [{"role": "user", "content": "word"}]},
}


@pytest.mark.parametrize("store", ["memory", "redis"])
@pytest.mark.parametrize("path", COUNTED)
async def test_what_the_gateway_answers_itself_has_the_rate_of_requests_and_takes_none_of_them(
    tmp_path: Path, path: str, store: str, request: pytest.FixtureRequest, tokenized: list[int]
) -> None:
    shared = {"limits": {"redis": request.getfixturevalue("redis_url")}} if store == "redis" else {}
    async with house(tmp_path, NullEnginePort(context=None), **shared) as found:
        found.let_in("mallory", requests_per_minute=2, tokens_per_minute=50)
        body = json.dumps(COUNTED[path]).encode()
        assert [(await found.post("mallory", path, body)).status for _ in range(4)] == [200, 200, 429, 429]
        tokenized.clear()
        assert (await found.post("mallory", path, LONG)).status == 429
        assert tokenized == []
        assert (await found.standing("mallory")).requests_last_minute == 0
        assert [(await found.post("mallory", COMPLETIONS, SHORT)).status for _ in range(3)] == [200, 200, 429]
        assert (await found.post("alice", path, body)).status == 200


def test_bodies_that_trickle_leave_room_for_others_and_give_it_back(tmp_path: Path) -> None:
    """A quarter of all bodies' bound, held by one user's half-sent requests, over real sockets."""
    largest = 20_000
    gateway = Gateway(NullEnginePort(), house_settings(tmp_path, max_body_bytes=largest))
    _, mallory = gateway.keys.create("mallory")
    _, alice = gateway.keys.create("alice")
    bodies = gateway.access.bodies
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: %b\r\ncontent-length: %d\r\n\r\n"
    half = head % (mallory.encode(), largest) + b"x" * (largest - 1)
    with at(gateway) as port:
        with ExitStack() as connections:
            for number in range(16):
                one = connections.enter_context(socket.create_connection(("127.0.0.1", port), 5))
                one.sendall(half)
                held = (number + 1) * (largest - 1)
                until(lambda held=held: bodies.held == held, "they are read", 10, 0.01)  # type: ignore[misc]
            told = post(port, mallory, b"x" * largest)
            assert told.startswith(b"HTTP/1.1 503")
            assert b"too many long bodies of yours" in told
            assert b"\r\nretry-after: " in told
            assert post(port, alice, SHORT).startswith(b"HTTP/1.1 200")
        until(lambda: not bodies.held, "they are given back", 10, 0.01)
        assert post(port, mallory, SHORT).startswith(b"HTTP/1.1 200")
    assert not bodies.held


@asynccontextmanager
async def a_house(folder: Path, **limits: int) -> AsyncIterator[House]:
    async with house(folder, NullEnginePort(context=None)) as found:
        found.let_in("mallory", **limits)
        yield found


# The look itself, at both counters


@pytest.fixture(params=["memory", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[Limiter]:
    if request.param == "memory":
        yield MemoryLimiter(spent=lambda user, since: 0)
        return
    url = request.getfixturevalue("redis_url")
    redis.Redis.from_url(url).flushall()
    shared = SharedLimiter(url, spent=lambda user, since: 0, timeout=30.0)
    yield shared
    assert shared._down_since is None
    await shared.close()


@pytest.mark.parametrize(
    "limits",
    [
        UserLimits(requests_per_minute=2),
        UserLimits(tokens_per_minute=20),
        UserLimits(concurrent_requests=2),
        UserLimits(tokens_per_month=20),
        UserLimits(requests_per_minute=2, tokens_per_minute=100, concurrent_requests=9, tokens_per_month=100),
    ],
)
async def test_a_look_refuses_what_any_request_would_be_refused_for_and_books_nothing(
    limiter: Limiter, limits: UserLimits
) -> None:
    assert await limiter.look("a", limits) is None
    for number in "12":
        assert await limiter.look("a", limits) is None
        assert await limiter.reserve("a", limits, number, 10) is None
    before = await limiter.standing("a")
    seen, refused = await limiter.look("a", limits), await limiter.reserve("a", limits, "3", 1)
    assert seen is not None
    assert refused is not None
    assert (seen.reason, seen.limit) == (refused.reason, refused.limit)
    assert seen.retry_after == pytest.approx(refused.retry_after, abs=1.0)
    assert await limiter.standing("a") == before
    assert await limiter.look("b", limits) is None
