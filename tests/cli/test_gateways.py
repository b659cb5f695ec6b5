"""`synthia-vllm gateway --gateways N`: several processes on one port, as one server to clients and to who runs it."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from synthia_vllm.cli import gateways as gateways_module
from synthia_vllm.cli.gateways import Gateways, Parent, Place
from synthia_vllm.errors import SetupError
from synthia_vllm.gateway.edge.listener import bind_beside
from synthia_vllm.settings import Settings
from tests.cli.test_commands import run
from tests.running import Running, gateway, null_engine, until

BODY = {"model": "synthia", "prompt": "x", "max_tokens": 40, "stream": True}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Running]:
    running = null_engine(tmp_path / "engine.log", "--tokens-per-second", "40").start()
    yield running
    running.kill()


@pytest.fixture
def two(tmp_path: Path, engine: Running, redis_url: str) -> Iterator[Running]:
    running = gateway(
        tmp_path, [engine], "--gateways", "2", "--limits.redis", redis_url, "--log.format", "json"
    ).start()
    until(lambda: "(2 processes)" in running.log.read_text(), "both are ready")
    yield running
    if running.process is not None:
        children = processes(running)
        running.stop()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


def processes(parent: Running) -> list[psutil.Process]:
    assert parent.process is not None
    return psutil.Process(parent.process.pid).children()


def connections(process: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp"))


FINISHED = 'synthia_requests_total{user="anonymous",model="synthia",route="/v1/completions",outcome="finished"} %d'


def tells(server: Running, *lines: str) -> bool:
    return set(lines) <= set(httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines())


@dataclass
class Clients:
    """Each request on a connection of its own."""

    url: str
    done: int = 0
    lost: list[str] = field(default_factory=list)

    async def __aenter__(self) -> "Clients":
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(trust_env=False, timeout=30, limits=limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self) -> None:
        """One stream. A connection that is refused has lost nothing: another server can be asked."""
        try:
            reply = await self._client.post(f"{self.url}/v1/completions", json=BODY)
        except httpx.ConnectError:
            return
        except httpx.HTTPError as error:
            self.lost.append(repr(error))
            return
        if reply.text.endswith("data: [DONE]\n\n"):
            self.done += 1
        else:
            self.lost.append(f"{reply.status_code} {reply.text[-80:]}")


@pytest.fixture
async def clients(two: Running) -> AsyncIterator[Clients]:
    async with Clients(two.url) as found:
        yield found


async def test_both_serve_one_that_is_killed_is_replaced_and_one_page_tells_of_all(
    two: Running, clients: Clients
) -> None:
    one, other = processes(two)
    asked = [asyncio.create_task(clients.ask()) for _ in range(24)]
    await asyncio.sleep(0.8)
    assert min(connections(one), connections(other)) >= 4  # 24 connections in two halves by chance: 1 in 3,000
    await asyncio.gather(*asked)
    assert (clients.done, clients.lost) == (24, [])
    await asyncio.to_thread(until, lambda: tells(two, FINISHED % 24, "synthia_gateways 2"), "one page tells of both", 5)
    one.kill()
    for _ in range(20):  # none waits for long for the one that is to come
        await clients.ask()
        if len(processes(two)) == 2 and one not in processes(two):
            break
    for _ in range(4):
        await clients.ask()
    assert clients.lost == []
    log = two.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["pid"] for line in lines if line["event"] == "gateway_process_died"] == [one.pid]
    assert {line["gateway"] for line in lines if line["event"] == "request"} == {1, 2}


async def test_sigterm_under_load_loses_nothing(two: Running, clients: Clients) -> None:
    asked: list[asyncio.Task[None]] = []
    assert two.process is not None
    for number in range(120):
        asked.append(asyncio.create_task(clients.ask()))
        await asyncio.sleep(0.02)
        if number == 70:
            two.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*asked)
    assert clients.lost == []
    assert 50 <= clients.done < 120
    assert await asyncio.to_thread(two.process.wait, 20) == 0
    two.process = None


def test_they_end_when_their_parent_was_killed(two: Running) -> None:
    children = processes(two)
    two.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gateway", "--gateways", "2", "--upstream", "http://127.0.0.1:1"], "add .*--limits.redis|--limits.redis"),
        (["serve", "--gateways", "2"], "--gateways 2: .* give them a Redis, --limits.redis"),
        (["serve", "--", "--api-server-count", "2"], "--gateways N before the --"),
        (["cluster", "up", "--gateways", "0"], "--cluster.gateways"),
    ],
)
def test_it_is_refused_where_it_can_not_be(words: list[str], told: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert re.search(told, done.stderr)
    assert "Traceback" not in done.stderr


def test_what_stops_one_at_its_start_stops_all_and_is_told_once(tmp_path: Path, redis_url: str) -> None:
    words = ("--gateways", "3", "--limits.redis", redis_url, "--upstream", "http://127.0.0.1:1", "--port", "0")
    done = run("gateway", *words, "--access.database", f"sqlite:///{tmp_path}/none/keys.db")
    assert done.returncode == 2
    assert done.stderr.count("synthia-vllm: ") == 1


def test_the_ports_of_another_server_are_not_shared_with_it() -> None:
    first = bind_beside(Settings(port=0, admin_port=0))
    ports = [sock.getsockname()[1] for sock in first]
    second = bind_beside(Settings(port=0, admin_port=0), ports)
    assert [sock.getsockname()[1] for sock in second] == ports
    for settings in (Settings(port=ports[0]), Settings(port=0, admin_port=ports[1])):
        with pytest.raises(SetupError, match="choose another"):
            bind_beside(settings)
    for sock in (*first, *second):
        sock.close()


# The parent alone: its processes are functions.


def parent(number: int, monkeypatch: pytest.MonkeyPatch, serve: object, **more: Any) -> Gateways:
    monkeypatch.setattr(gateways_module, "_LOOK_S", 0.01)
    return Gateways(number, list, serve, lambda: None, **more)  # type: ignore[arg-type]


def test_one_that_fails_again_and_again_is_begun_later_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    starts = tmp_path / "starts"

    def serve(place: Place, told: Parent) -> int:
        told.ready()
        if place.number == 1:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            while True:
                time.sleep(10)
        with starts.open("a") as file:
            file.write("x")
        time.sleep(0.05)
        if len(starts.read_text()) == 4:
            os.kill(os.getppid(), signal.SIGTERM)
        return 7

    assert parent(2, monkeypatch, serve).run() in (0, 7, 128 + signal.SIGTERM)  # the fourth may be told to stop first
    assert [float(found) for found in re.findall(r"again_in_s=([\d.]+)", capfd.readouterr().out)][:3] == [0.1, 0.2, 0.4]


def test_one_that_hangs_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateways_module, "_HUNG_S", 0.3)
    starts = tmp_path / "starts"

    def serve(place: Place, told: Parent) -> int:
        told.ready()
        with starts.open("a") as file:
            file.write("x")
        if len(starts.read_text()) == 2:
            os.kill(os.getppid(), signal.SIGTERM)
            return 0
        time.sleep(20)
        return 1

    assert parent(1, monkeypatch, serve).run() == 0
    assert starts.read_text() == "xx"


def test_each_process_has_a_number_of_its_own_and_none_is_started_when_they_are_used_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "numbers"

    def serve(place: Place, told: Parent) -> int:
        told.ready()
        with numbers.open("a") as file:
            file.write(f"{place.number}{place.process} ")
        time.sleep(0.2)
        return 7

    assert parent(2, monkeypatch, serve, most=4).run() == 1
    found = numbers.read_text().split()
    assert sorted(word[1] for word in found) == ["1", "2", "3", "4"]
    assert {word[0] for word in found} == {"1", "2"}
    assert "never: restart all" in capfd.readouterr().out


def test_all_end_when_they_have_lost_what_they_are_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = tmp_path / "lost"

    def serve(place: Place, told: Parent) -> int:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        told.ready()
        if place.number == 2:
            lost.touch()
        while True:
            time.sleep(10)

    assert parent(2, monkeypatch, serve, look=lost.exists).run() == 1
