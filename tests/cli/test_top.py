import io
import re
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from rich.console import Console

from synthia_vllm.bench.null.port import NullEnginePort
from synthia_vllm.cli.top import TopError, _percent, _replicas, _users, command, show, spark
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
    for word in ("local", "up", "alice", "1,234", "tokens/s", "100%"):
        assert word in shown


LONG = "http://engine-7.synthia.example.com:8001#replica-3f9c2a"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_names_are_whole_on_a_narrow_terminal(width: int) -> None:
    replica = {"name": LONG, "state": "unproven", "fresh": True, "in_flight": 1000, "running": 256, "waiting": 1000}
    rates = {"kv_use": 0.5, "prompt_per_s": 123456.7, "generation_per_s": 12345.6}
    user = {"user": "u" * 60, "prompt_tokens": 1e9, "generation_tokens": 1e9, "share": 1.0, "in_flight": 1000}
    user |= {"queued": 1000, "refused": 1e6, "slo_met": 1, "slo_missed": 1}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(_replicas([replica | rates]))
    console.print(_users([user]))
    shown = console.export_text()
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    for whole in ("in flight", "123,456.7", "12,345.6", "1G", "SLO met"):
        assert whole in shown
    first_cells = "".join(line.split()[0] for line in shown.splitlines() if line.strip())
    assert LONG in first_cells
    assert "u" * 60 in first_cells


def test_it_says_what_it_needs(gateway: Gateway) -> None:
    with serving(gateway.app, beside=gateway) as port:
        with pytest.raises(TopError, match="admin key"):
            top(port)
        with pytest.raises(TopError, match="admin key"):
            top(port, "--key", gateway.keys.create("alice")[1])
    with pytest.raises(TopError, match="does not answer"):
        top(port)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *((0, "0%"), (1e-6, "<0.01%"), (0.0004, "0.04%"), (0.5, "50%"), (0.996, "99.6%"), (0.9996, "99.96%")),
        *((0.999996, ">99.99%"), (1, "100%")),
    ],
)
def test_only_all_is_a_hundred_percent(share: float, text: str) -> None:
    assert _percent(share) == text


def test_nothing_of_engines_is_told_while_no_replica_is_up(gateway: Gateway) -> None:
    history = gateway.exporter.history
    for name, sketch in gateway.exporter.recorder.latencies.items():
        sketch.observe({"ttft": 0.1234, "itl": 0.0567}.get(name, 0.01))
    history.step(running=0, queued=3)
    view = gateway.exporter.live()
    console = Console(width=200, record=True, file=io.StringIO())
    for serving_now in (1, 0):
        view["now"]["serving"] = serving_now
        console.print(show(view))
    first, second = console.export_text().split("up for")[1:]
    assert re.search(r"TTFT p50.* 12\d\.\d ms", first)
    assert "no replica is up" not in first
    assert "no replica is up" in second
    assert re.search(r"TTFT p50.* – ms", second)


def test_a_chart_is_as_high_as_its_greatest_value() -> None:
    assert spark([0.0, 1.0, None, 8.0, 4.0]) == " ▁ █▄"
    assert spark([]) == spark([None, 0.0]).strip() == ""
