"""Gateways before the same engine know how many they are: real processes, and a real Redis."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio

from synthia_vllm.engine.port import Capacity
from synthia_vllm.errors import SetupError
from synthia_vllm.free_ports import free_port
from synthia_vllm.gateway.fair.peers import FRESH_S, Peers, claim, identity, share
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore
from tests.redis_service import RedisServer

ENGINE = "http://127.0.0.1:1"


def peers(url: str, told: list[int], *engines: str, **given: Any) -> Peers:
    return Peers(url, engines or [ENGINE], told.append, **given)


def test_a_part_is_whole_tokens_and_never_nothing() -> None:
    assert share(Capacity(1000, 256, block=16), 3) == Capacity(333, 85, block=16)
    assert share(Capacity(3, 1), 4) == Capacity(1, 1)


async def test_gateways_count_each_other_and_one_that_leaves_is_not_waited_for(redis_url: str) -> None:
    first: list[int] = []
    second: list[int] = []
    one, other = peers(redis_url, first), peers(redis_url, second)
    await one.count()
    await other.count()
    await one.count()
    assert (first, second) == ([1, 2], [2])
    await other.close()
    await one.count()
    assert first == [1, 2, 1]
    await one.close()


async def test_one_that_is_killed_counts_until_its_beat_is_old_by_the_readers_own_clock(redis_url: str) -> None:
    now, told = 0.0, list[int]()
    one, killed = peers(redis_url, told, clock=lambda: now), peers(redis_url, [])
    await killed.count()
    await one.count()
    now += FRESH_S
    await one.count()
    assert told == [2]
    now += 0.1
    await one.count()
    assert told == [2, 1]
    await killed.count()  # it only stood still
    await one.count()
    assert told == [2, 1, 2]
    for each in (one, killed):
        await each.close()


async def test_gateways_before_other_engines_are_no_peers_and_those_before_some_of_them_are(redis_url: str) -> None:
    told: list[int] = []
    others = [peers(redis_url, [], "http://b:1"), peers(redis_url, [], "http://c:1", "http://d:1")]
    for each in others:
        await each.count()
    one = peers(redis_url, told, "http://a:1", "http://d:1/")
    await one.count()
    assert told == [2]
    for each in (one, *others):
        await each.close()


async def test_a_number_that_is_set_is_the_least(redis_url: str) -> None:
    told: list[int] = []
    one = peers(redis_url, told, least=3)
    await one.count()
    assert told == [3]
    await one.close()


async def test_the_last_number_holds_while_redis_is_gone(redis_server: RedisServer, redis_url: str) -> None:
    told: list[int] = []
    one, other = peers(redis_url, told), peers(redis_url, [])
    await other.count()
    await one.count()
    redis_server.stop()
    try:
        await one.count()
        assert told == [2]
    finally:
        redis_server.start()
    for _ in range(2):  # the first one meets a connection that is broken
        await one.count()
    assert told == [2]  # empty as it is
    for each in (one, other):
        await each.close()


async def test_who_is_long_gone_is_taken_out_of_redis(redis_url: str) -> None:
    now, told = 0.0, list[int]()
    one, gone = peers(redis_url, told, clock=lambda: now), peers(redis_url, [])
    await gone.count()
    await one.count()
    now += 61
    for _ in range(2):
        await one.count()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert await client.hlen(f"synthia:gateways:{identity(ENGINE)}") == 1
    for each in (one, gone):
        await each.close()


def test_the_engine_of_a_machine_is_the_same_for_its_gateways_only(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity("http://127.0.0.1:8001"), identity("http://engine:80/")
    assert identity("http://engine/v2") != here[1] == identity("http://engine")
    monkeypatch.setattr("platform.node", lambda: "another")
    assert identity("http://127.0.0.1:8001") != here[0]
    assert identity("http://engine:80") == here[1]


@pytest.mark.skipif(sys.platform != "linux", reason="there are no names without files elsewhere")
def test_an_engine_that_is_taken_is_refused_until_it_is_free_again() -> None:
    held = claim(["http://taken:1"])
    with pytest.raises(SetupError, match=r"http://taken:1: another gateway .*--fair.gateways"):
        claim(["http://free:1", "http://taken:1"])
    for name in (*held, *claim(["http://free:1"])):
        name.close()
    for name in claim(["http://taken:1"]):
        name.close()


# Two `gateway` processes


@dataclass
class Gateway:
    process: "subprocess.Popen[str]"
    url: str
    key: str

    async def room(self, wanted: int) -> int:
        """What it may fill, once it is what is wanted; or what it is after a while."""
        found, deadline = 0, time.monotonic() + 60
        async with httpx.AsyncClient(base_url=self.url, headers={"x-api-key": self.key}) as client:
            while found != wanted and time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    found = (await client.get("/admin/state")).json().get("capacity_tokens", 0)
                await asyncio.sleep(0.2)
        return found


Start = Callable[..., Gateway]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `gateway` before one engine, which tells nothing: its room is set."""
    started: list[subprocess.Popen[str]] = []
    database = f"sqlite:///{tmp_path / 'keys.db'}"
    engine = open_database(database)
    key = KeyStore(engine, b"x" * 32).create("ops", admin=True)[1]
    engine.dispose()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        upstream = f"http://127.0.0.1:{silent.getsockname()[1]}"

        def start(*options: str) -> Gateway:
            words = ["gateway", "--upstream", upstream, "--port", str(free_port()), *options]
            words += ["--access.database", database, "--access.secret", "x" * 32]
            words += ["--fair.max-in-flight-tokens", "1000", "--no-log.requests"]
            process = subprocess.Popen(
                [sys.executable, "-m", "synthia_vllm", *words], stderr=subprocess.PIPE, text=True
            )
            started.append(process)
            return Gateway(process, f"http://127.0.0.1:{words[words.index('--port') + 1]}", key)

        yield start
        for process in started:
            process.kill()
            process.communicate()


async def test_two_gateways_before_one_engine_divide_its_room_through_redis(start: Start, redis_url: str) -> None:
    one = start("--limits.redis", redis_url)
    assert await one.room(1000) == 1000
    other = start("--limits.redis", redis_url)
    assert [await one.room(500), await other.room(500)] == [500, 500]
    other.process.send_signal(signal.SIGKILL)
    assert await one.room(1000) == 1000


async def test_two_gateways_before_one_engine_divide_its_room_by_a_number_that_is_set(start: Start) -> None:
    assert [await start("--fair.gateways", "2").room(500) for _ in range(2)] == [500, 500]


async def test_a_second_gateway_that_would_have_to_guess_does_not_start(start: Start) -> None:
    one = start()
    assert await one.room(1000) == 1000
    other = start().process
    _, told = await asyncio.to_thread(other.communicate, timeout=60)
    assert other.returncode == 2
    assert "another gateway of this machine is before it" in told
    assert "Traceback" not in told
    one.process.send_signal(signal.SIGKILL)
    one.process.wait()
    assert await start().room(1000) == 1000
