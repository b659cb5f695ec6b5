"""The proxies' snippets in front of a gateway: accepted, unbuffered, and clients that go are felt by the engine."""

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx2
import pytest

from synthia_vllm.client import Resuming
from synthia_vllm.free_ports import free_port
from tests.deploy.proxies import caddy_file, nginx_files, running
from tests.running import Running, gateway, null_engine, until
from tests.tools import needed

_TOKENS_PER_SECOND = 20


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    """A gateway and its null engine."""
    folder = tmp_path_factory.mktemp("behind")
    engine = null_engine(folder / "engine.log", "--tokens-per-second", str(_TOKENS_PER_SECOND))
    front = gateway(folder, [engine])
    try:
        engine.start()
        front.start()
        yield front, engine
    finally:
        front.stop()
        engine.stop()


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(
    request: pytest.FixtureRequest, behind: tuple[Running, Running], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    with running(request.param, tmp_path_factory.mktemp(request.param), behind[0].port) as (url, trusting):
        yield from _client(url, trusting)


def _client(url: str, trusting: ssl.SSLContext) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, verify=trusting, timeout=30, trust_env=False) as client:
        yield client


def body(tokens: int) -> dict[str, object]:
    return {
        "model": "null",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": tokens,
        "stream": True,
    }


def test_nginx_accepts_its_snippet(tmp_path: Path) -> None:
    main = nginx_files(tmp_path, 8000, free_port())
    words = [needed("nginx", "nginx-light"), "-t", "-c", str(main), "-p", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def test_caddy_accepts_its_snippet(tmp_path: Path) -> None:
    words = [needed("caddy", "caddy"), "validate", "--adapter", "caddyfile", "--config"]
    done = subprocess.run(
        [*words, str(caddy_file(tmp_path, 8000, free_port()))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_chunks_pass_as_they_come(proxy: httpx.Client) -> None:
    tokens = 20
    arrivals = []
    with proxy.stream("POST", "/v1/chat/completions", json=body(tokens)) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data:"):
                arrivals.append(time.monotonic())
    # A proxy that gathers would bring them all at the end.
    assert arrivals[-1] - arrivals[0] > tokens / _TOKENS_PER_SECOND / 2


@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_a_reply_outlives_the_gateway_behind_it(name: str, tmp_path: Path, redis_url: str) -> None:
    """The gateway is killed and started again on its port; a client that comes back is not told."""
    engine = null_engine(tmp_path / "engine.log", "--tokens-per-second", str(_TOKENS_PER_SECOND))
    front = gateway(tmp_path, [engine], "--limits.redis", redis_url, "--timeouts.redis", "30")
    tokens = 80
    try:
        engine.start()
        front.start()
        with running(name, tmp_path, front.port) as (url, trusting):
            transport = Resuming(httpx2.HTTPTransport(verify=trusting, trust_env=False))
            with httpx2.Client(base_url=url, transport=transport, timeout=30) as client:
                path = "/v1/chat/completions"
                wanted = client.post(path, json=body(tokens) | {"stream": False}).json()["choices"][0]["message"]
                text, restarted = "", None
                with client.stream("POST", path, json=body(tokens)) as reply:
                    for line in reply.iter_lines():
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                        if restarted is None and len(text) > 30:
                            front.kill()
                            restarted = threading.Timer(0.5, front.start)
                            restarted.start()
        assert restarted is not None
        restarted.join()
        assert text == wanted["content"]
    finally:
        front.stop()
        engine.stop()


def test_a_client_that_goes_is_felt_by_the_engine(proxy: httpx.Client, behind: tuple[Running, Running]) -> None:
    engine = behind[1]

    def aborted() -> int:
        return int(httpx.post(f"{engine.url}/fault").json()["aborted"])

    before = aborted()
    with proxy.stream("POST", "/v1/chat/completions", json=body(2000)) as reply:
        for line in reply.iter_lines():
            if line.startswith("data:"):
                break
    until(lambda: aborted() == before + 1, "the engine's request is aborted", 10)


def test_a_body_as_large_as_the_gateway_takes_it_passes(proxy: httpx.Client) -> None:
    large = body(1) | {"unknown": "x" * 3_000_000}  # the body is large, the prompt fits the context
    assert proxy.post("/v1/chat/completions", json=large).status_code == 200
