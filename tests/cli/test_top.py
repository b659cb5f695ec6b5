from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from benchmarks.null_port import NullEnginePort
from synthia_vllm.cli.top import TopError, command, spark
from synthia_vllm.gateway.app import Gateway
from synthia_vllm.settings import Settings
from tests.gateway.live import serving


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    access = {"mode": "keys", "database": f"sqlite:///{tmp_path}/keys.db", "secret": "x" * 32}
    return Gateway(NullEnginePort(), Settings(access=access, log={"requests": False}))  # type: ignore[arg-type]


def top(port: int, *words: str) -> str:
    done = CliRunner().invoke(command, ["--url", f"http://127.0.0.1:{port}", "--once", *words])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_it_shows_replicas_and_users_once_without_a_terminal(gateway: Gateway) -> None:
    key, admin = gateway.keys.create("alice")[1], gateway.keys.create("ops", admin=True)[1]
    body = {"model": "synthia", "prompt": "x", "max_tokens": 1234, "stream": True}
    with serving(gateway.app, beside=gateway) as port:
        httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers={"x-api-key": key})
        shown = top(port, "--key", admin)
    for word in ("local", "up", "alice", "1,234", "tokens/s", "100.0%"):
        assert word in shown


def test_it_says_what_it_needs(gateway: Gateway) -> None:
    with serving(gateway.app, beside=gateway) as port:
        with pytest.raises(TopError, match="admin key"):
            top(port)
        with pytest.raises(TopError, match="admin key"):
            top(port, "--key", gateway.keys.create("alice")[1])
    with pytest.raises(TopError, match="does not answer"):
        top(port)


def test_a_chart_is_as_high_as_its_greatest_value() -> None:
    assert spark([0.0, 1.0, None, 8.0, 4.0]) == " ▁ █▄"
    assert spark([]) == spark([None, 0.0]).strip() == ""
