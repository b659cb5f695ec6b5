"""Real gateways, killed with -9 under clients that come back: nothing is lost, repeated, or billed twice."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import httpx2
import pytest
from anthropic import Anthropic
from openai import OpenAI

from synthia_vllm.bench.gateway_loss import Read, billed, read_all
from synthia_vllm.client import Resuming
from tests.redis_service import RedisServer
from tests.running import Running, gateway, new_key, null_engine, until

REPLIES, TOKENS = 24, 60
PROMPTS = [f"Question {number}: what is an orca?" for number in range(REPLIES)]


@dataclass
class House:
    """Two gateways with one Redis and one database before one null engine."""

    folder: Path
    engine: Running
    gateways: list[Running]
    redis: RedisServer
    key: str

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self.gateways]

    def billed(self) -> tuple[int, int]:
        """Tokens of prompts, and generated."""
        return billed(self.folder / "data")


@pytest.fixture
def house(tmp_path: Path, redis_server: RedisServer, redis_url: str) -> Iterator[House]:
    engine = null_engine(tmp_path / "engine.log", "--tokens-per-second", "20").start()
    options = ["--limits.redis", redis_url, "--access.mode", "keys", "--timeouts.redis", "30"]
    gateways = [gateway(tmp_path, [engine], *options).start() for _ in range(2)]
    key = new_key(tmp_path, "alice")
    found = House(tmp_path, engine, gateways, redis_server, key)
    try:
        for one in gateways:
            until(lambda url=one.url: httpx.get(f"{url}/v1/models", headers=bearer(key)).is_success, "models")
        yield found
    finally:
        for one in (*gateways, engine):
            one.stop()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def wanted(house: House) -> list[str]:
    """The texts, undisturbed."""
    return [one.text for one in asyncio.run(read_all(house.urls, PROMPTS, TOKENS, key=house.key))]


async def generating(replies: Sequence[Read]) -> None:
    """Until all streams have begun, and none has ended."""
    async with asyncio.timeout(60):
        while not all(len(one.at) > 3 for one in replies if one.streamed):
            await asyncio.sleep(0.02)


def test_the_death_of_a_gateway_is_not_seen(house: House) -> None:
    texts = wanted(house)
    until(lambda: house.billed()[1] == REPLIES * TOKENS, "the undisturbed ones are billed")
    prompt = house.billed()[0]

    async def kill(replies: Sequence[Read]) -> None:
        await generating(replies)
        await asyncio.to_thread(house.gateways[0].kill)

    found = asyncio.run(read_all(house.urls, PROMPTS, TOKENS, key=house.key, whole_every=4, meanwhile=kill))
    assert [one.error for one in found if one.error] == []
    assert [one.text for one in found] == texts
    assert {(one.finish, one.tokens) for one in found} == {("length", TOKENS)}
    until(lambda: house.billed()[1] >= 2 * REPLIES * TOKENS, "all is billed")
    time.sleep(1)  # what is there twice would have come by now
    assert house.billed() == (2 * prompt, 2 * REPLIES * TOKENS)


def test_a_redis_that_restarts_empty_is_not_seen_either(house: House) -> None:
    """And then a gateway dies: what Redis had lost it has been told again."""
    texts = wanted(house)

    async def restart(replies: Sequence[Read]) -> None:
        await generating(replies)
        await asyncio.to_thread(house.redis.stop)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(house.redis.start)
        await asyncio.sleep(0.7)
        await asyncio.to_thread(house.gateways[1].kill)

    found = asyncio.run(read_all(house.urls, PROMPTS, TOKENS, key=house.key, meanwhile=restart))
    assert [one.error for one in found if one.error] == []
    assert [one.text for one in found] == texts


def test_a_redis_that_stands_still_holds_no_stream_up(house: House) -> None:
    texts = wanted(house)

    async def pause(replies: Sequence[Read]) -> None:
        await generating(replies)
        with house.redis.paused():
            before = [len(one.at) for one in replies]
            async with asyncio.timeout(20):
                while any(len(one.at) < count + 10 for one, count in zip(replies, before, strict=True)):
                    await asyncio.sleep(0.02)

    found = asyncio.run(read_all(house.urls, PROMPTS, TOKENS, key=house.key, meanwhile=pause))
    assert [one.error for one in found if one.error] == []
    assert [one.text for one in found] == texts


class InTurn(httpx2.BaseTransport):
    """Asks two gateways alternately; both are there at first."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.asked = 0
        self._transport = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        to = httpx2.URL(self.urls[self.asked % 2])
        self.asked += 1
        request.url = request.url.copy_with(host=to.host, port=to.port)
        return self._transport.handle_request(request)


@pytest.fixture
def in_turn(house: House) -> InTurn:
    return InTurn(house.urls)


@pytest.fixture
def resuming(in_turn: InTurn) -> httpx2.Client:
    return httpx2.Client(transport=Resuming(in_turn, patience_s=30))


def test_openais_client_goes_on(house: House, in_turn: InTurn, resuming: httpx2.Client) -> None:
    client = OpenAI(base_url="http://gateway/v1", api_key=house.key, http_client=resuming, max_retries=0)
    asked = {"model": "synthia", "messages": [{"role": "user", "content": "hi"}], "max_tokens": TOKENS}
    whole = client.chat.completions.create(**asked).choices[0].message.content  # type: ignore[call-overload]
    in_turn.asked = 0
    text = ""
    for number, chunk in enumerate(client.chat.completions.create(**asked, stream=True)):  # type: ignore[call-overload]
        text += chunk.choices[0].delta.content or ""
        if number == 10:
            house.gateways[0].kill()
    assert text == whole
    assert in_turn.asked >= 2


def test_anthropics_client_goes_on(house: House, in_turn: InTurn, resuming: httpx2.Client) -> None:
    client = Anthropic(base_url="http://gateway", api_key=house.key, http_client=resuming, max_retries=0)
    asked = {"model": "synthia", "messages": [{"role": "user", "content": "hi"}], "max_tokens": TOKENS}
    whole = client.messages.create(**asked).content[0].text  # type: ignore[call-overload]
    in_turn.asked = 0
    text = ""
    with client.messages.stream(**asked) as stream:  # type: ignore[arg-type]
        for number, part in enumerate(stream.text_stream):
            text += part
            if number == 10:
                house.gateways[0].kill()
    assert text == whole
    assert in_turn.asked >= 2


def test_a_rest_that_nobody_gives_is_an_error_of_the_connection(house: House) -> None:
    http = httpx2.Client(transport=Resuming(InTurn(house.urls), patience_s=1), timeout=10)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "stream": True}
    with http.stream("POST", "http://gateway/v1/chat/completions", json=body, headers=bearer(house.key)) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("id: 0")
        for one in house.gateways:
            one.kill()
        with pytest.raises(httpx2.TransportError):
            list(lines)
