"""`cluster up` as a user runs it: two real replicas of the demo model behind Ray Serve."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.ray_cluster import ENGINE_OPTIONS, RunningCluster
from tests.running import kill_all

pytestmark = pytest.mark.e2e
_HEAL_TIMEOUT_S = 300


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=120) as http:
        yield http


def chat(client: httpx.Client, **options: Any) -> dict[str, Any]:
    body = {"model": "synthia", "messages": [{"role": "user", "content": "What is an orca?"}], "max_tokens": 16}
    reply = client.post("/v1/chat/completions", json=body | options)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def stream(client: httpx.Client, tokens: int) -> list[str]:
    body = {
        "model": "synthia",
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "min_tokens": tokens,
        "stream": True,
    }
    with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        return [line for line in reply.iter_lines() if line.startswith("data:")]


def replicas(cluster: RunningCluster, application: str = "engine") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.status()["applications"][application]["replicas"]
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _HEAL_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come back"
        time.sleep(1)


def test_two_replicas_run_and_are_healthy(cluster: RunningCluster) -> None:
    status = cluster.status()
    assert status["healthy"]
    assert status["url"] == cluster.url
    assert [replica["state"] for replica in replicas(cluster)] == ["RUNNING", "RUNNING"]
    assert cluster.run("status").returncode == 0


@pytest.mark.parametrize("model", ["synthia", "synthia-tot", "SmolLM2-135M-Instruct"])
def test_the_model_answers_to_all_of_its_names(client: httpx.Client, model: str) -> None:
    assert chat(client, model=model)["usage"]["completion_tokens"] > 0
    assert model in {card["id"] for card in client.get("/v1/models").json()["data"]}
    assert client.get(f"/v1/models/{model}").status_code == 200


def test_the_contract_holds(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    ids = client.post("/tokenize", json={"model": "synthia", "messages": messages}).json()["tokens"]
    text = client.post("/detokenize", json={"model": "synthia", "tokens": ids[1:]}).json()["prompt"]
    assert text == "SYSTEM: S\nUSER: Q\nASSISTANT:"
    stops = [f"stop-{number}" for number in range(16)]
    assert chat(client, stop=stops)["choices"][0]["message"]["role"] == "assistant"


def test_the_engine_is_closed_to_strangers(cluster: RunningCluster, client: httpx.Client) -> None:
    ports = [listener.laddr.port for listener in psutil.net_connections() if 30000 <= _port(listener) < 31000]
    bases = [f"{cluster.url}/engine", *(f"http://127.0.0.1:{port}/engine" for port in set(ports))]
    for base in bases:
        for path in ("/v1/models", "/metrics", "/tokenize", "/invocations", "/openapi.json"):
            assert httpx.get(f"{base}{path}", timeout=30).status_code in (401, 404), f"{base}{path}"
    body = {"model": "synthia", "prompt": "x", "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer x"}):
        reply = client.post("/engine/v1/completions", json=body, headers=headers)
        assert reply.status_code == 401


def test_what_serves_without_keys_is_for_this_machine_only(cluster: RunningCluster) -> None:
    """The port between Serve's replicas, which asks for Ray's token, can't be bound by us."""
    mine, gateway = set(_pids(cluster)), int(cluster.url.rpartition(":")[2])
    listening = [
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in mine
    ]
    assert ("127.0.0.1", gateway) in listening
    known = {gateway, int(cluster.state()["dashboard"].rpartition(":")[2]), *range(30000, 31000)}
    assert {ip for ip, port in listening if port in known} == {"127.0.0.1"}
    proxies = _proxies(cluster)
    assert proxies
    assert {one.laddr.ip for process in proxies for one in _listeners(process)} == {"127.0.0.1"}


def test_the_dashboard_asks_for_rays_token(cluster: RunningCluster) -> None:
    state = cluster.state()
    token = str(Path(state["folder"], "token"))
    known = {"RAY_AUTH_TOKEN_PATH": token}
    assert cluster.run("status", "--address", state["dashboard"], environment=known).returncode == 0
    refused = cluster.run("status", "--address", state["dashboard"], environment={"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    assert refused.returncode == 2
    assert "RAY_AUTH_TOKEN" in refused.stderr
    assert Path(token).stat().st_mode & 0o077 == 0
    assert Path(state["folder"]).stat().st_mode & 0o077 == 0


def test_headers_that_trickle_are_cut(cluster: RunningCluster) -> None:
    host, _, port = cluster.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.settimeout(1)
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        deadline = time.monotonic() + 60
        answer = b""
        while time.monotonic() < deadline and not answer:
            try:
                sock.sendall(b"X-Slow: 1\r\n")
                answer = sock.recv(100)
            except TimeoutError:
                continue
            except OSError:
                answer = b"closed"
        assert answer == b"closed" or b" 408 " in answer


def test_up_again_changes_nothing(cluster: RunningCluster) -> None:
    before = {replica["name"] for replica in replicas(cluster)}
    done = cluster.run("up", "--port", "0", "--replicas", "2", *ENGINE_OPTIONS)
    assert done.returncode == 0, done.stderr
    assert {replica["name"] for replica in replicas(cluster)} == before


def test_what_the_running_cluster_can_not_take_is_refused_by_name(cluster: RunningCluster) -> None:
    for words, named in (
        (("--port", "1"), "--port 1"),
        (("--access.secret", "other"), "--access.secret"),
        (("--replicas.max-generation-s", "900", "--cluster.drain-s", "900"), "--replicas.max-generation-s"),
    ):
        done = cluster.run("up", *words, "--replicas", "2", *ENGINE_OPTIONS)
        assert done.returncode == 2
        assert named in done.stderr
        assert "cluster down" in done.stderr


def test_who_leaves_is_billed_for_what_his_replica_had_generated(cluster: RunningCluster, client: httpx.Client) -> None:
    def totals() -> tuple[float, float, float]:
        page = client.get("/metrics").text

        def total(name: str) -> float:
            return sum(map(float, re.findall(rf"^{name}(?:\{{[^\n]*\}})? (\S+)$", page, re.MULTILINE)))

        # Canaries are of one token, and come to their end; who leaves does not.
        generated = total("vllm:generation_tokens_total") - total("vllm:request_success_total")
        return total("synthia_generation_tokens_total"), generated, total("vllm:num_requests_running")

    def at_rest() -> tuple[float, float, float]:
        found = totals()
        while (again := totals()) != found or again[2]:
            found = again
            time.sleep(1.5)
        return found

    def leave(number: int) -> None:
        body = {"model": "synthia", "prompt": f"{number} orcas", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            for _, seen in zip(reply.iter_lines(), range(3 * number), strict=False):
                assert seen >= 0

    before = at_rest()
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(leave, range(1, 13)))
    after = at_rest()
    assert after[0] > before[0]
    assert after[0] - before[0] == after[1] - before[1]


def test_a_killed_replica_is_replaced_and_no_stream_breaks(cluster: RunningCluster, client: httpx.Client) -> None:
    victim = replicas(cluster)[0]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, client, 120) for _ in range(8)]
        time.sleep(2)
        os.kill(victim["pid"], signal.SIGKILL)
        for future in streams:
            assert future.result()[-1] == "data: [DONE]"
    # The streams may have ended before Serve's controller has noticed.
    wait_until(lambda: victim["name"] not in {replica["name"] for replica in replicas(cluster)})
    wait_until(cluster.healthy)


def test_a_dead_engine_core_makes_its_replica_be_replaced(cluster: RunningCluster, client: httpx.Client) -> None:
    victim = replicas(cluster)[0]
    core = next(
        child for child in psutil.Process(victim["pid"]).children() if "EngineCore" in " ".join(child.cmdline())
    )
    core.kill()
    wait_until(lambda: victim["name"] not in {replica["name"] for replica in replicas(cluster)})
    wait_until(cluster.healthy)
    chat(client)


def test_the_gateway_serves_while_the_controller_is_gone(cluster: RunningCluster, client: httpx.Client) -> None:
    controllers = _those(cluster, lambda process: "ServeController" in " ".join(process.cmdline()))
    assert controllers
    kill_all(controllers)
    for _ in range(10):
        chat(client)
        time.sleep(0.5)
    wait_until(cluster.healthy)


def test_clients_are_let_in_again_when_haproxy_was_killed(cluster: RunningCluster, client: httpx.Client) -> None:
    proxies = _proxies(cluster)
    assert proxies
    kill_all(proxies)
    wait_until(lambda: _answers(client))
    chat(client)
    wait_until(cluster.healthy)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def _listeners(process: psutil.Process) -> list[Any]:
    return [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]


def _port(connection: Any) -> int:
    return connection.laddr.port if connection.status == psutil.CONN_LISTEN else 0


def _those(cluster: RunningCluster, wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Processes of the cluster, whose workers come and go meanwhile."""
    found = []
    for pid in _pids(cluster):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process] if wanted(process) else []
    return found


def _proxies(cluster: RunningCluster) -> list[psutil.Process]:
    return _those(cluster, lambda process: process.name() == "haproxy")


def _pids(cluster: RunningCluster) -> list[int]:
    found = []
    for pid in cluster.state()["processes"]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            found += [process.pid, *(child.pid for child in process.children(recursive=True))]
    return found
