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

import httpx
import pytest

from synthia_vllm.engine.port import Capacity
from synthia_vllm.errors import SetupError
from synthia_vllm.free_ports import free_port
from synthia_vllm.gateway.fair.peers import claim, identity, share
from synthia_vllm.gateway.store.database import open_database
from synthia_vllm.gateway.store.keys import KeyStore
from tests.redis_service import RedisServer


def test_a_part_is_whole_tokens_and_never_nothing() -> None:
    assert share(Capacity(1000, 256, block=16), 3) == Capacity(333, 85, block=16)
    assert share(Capacity(3, 1), 4) == Capacity(1, 1)


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

    async def room(self, wanted: int | None, kind: str = "capacity") -> int | None:
        """Tokens that it may fill, once they are what is wanted; or what they are after a while."""
        found: int | None = -1
        deadline = time.monotonic() + 60
        async with httpx.AsyncClient(base_url=self.url, headers={"x-api-key": self.key}) as client:
            while found != wanted and time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    found = (await client.get("/admin/state")).json().get(f"{kind}_tokens")
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


async def test_two_gateways_before_one_engine_share_its_room_through_redis_and_divide_it_without(
    start: Start, redis_server: RedisServer, redis_url: str
) -> None:
    one = start("--limits.redis", redis_url)
    assert [await one.room(1000), await one.room(None, "lease")] == [1000, None]
    other = start("--limits.redis", redis_url)
    assert await other.room(1000) == 1000
    assert [await gateway.room(937 // 32, "lease") for gateway in (one, other)] == [937 // 32] * 2
    redis_server.stop()
    try:
        assert [await gateway.room(500) for gateway in (one, other)] == [500, 500]
    finally:
        redis_server.start()
    assert [await gateway.room(1000) for gateway in (one, other)] == [1000, 1000]
    other.process.send_signal(signal.SIGKILL)
    assert await one.room(None, "lease") is None


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
