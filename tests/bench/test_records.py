"""What is kept of a run, and three tools held against each other."""

from pathlib import Path

import httpx
import pytest
from rich.console import Console

from synthia_vllm.bench.agreement import Figures, generated, show
from synthia_vllm.bench.client import Target
from synthia_vllm.bench.null.engine import NullEngine
from synthia_vllm.bench.records import Recorder, attach, new_run
from synthia_vllm.bench.run_file import Measurement, Server, read
from tests.gateway.live import serving


def test_a_result_is_added_to_the_run_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    recorder = Recorder(new_run("quick", {"seed": 1}, {"name": "m"}), path)
    recorder.take(Measurement(server="s", workload="w", round=0, kind="open", started_at=0, duration_s=1, requests=[]))
    attach(path, "slo", {"rate": 4}, {})
    attach(path, "chaos", {"scenarios": {}}, {})
    run = read(path)
    assert (run.slo, run.chaos, run.ceiling) == ({"rate": 4}, {"scenarios": {}}, None)
    assert len(run.measurements) == 1


def test_what_is_known_of_a_server_later_replaces_what_was(tmp_path: Path) -> None:
    recorder = Recorder(new_run("quick", {}, {}), tmp_path / "run.json")
    recorder.take_servers([Server(name="a", title="A"), Server(name="b", title="B")])
    recorder.take_servers([Server(name="a", title="A", memory_bytes=5)])
    assert {server.name: server.memory_bytes for server in read(recorder.path).servers} == {"a": 5, "b": None}


@pytest.mark.parametrize(
    ("other", "fine"),
    [
        (Figures(102, 9.8, 101, 64), True),
        (Figures(104, 10, 100, 64), False),
        (Figures(100, 9, 100, 64), False),
        (Figures(100, 10, 100, 63), False),
    ],
)
def test_tools_agree_within_three_percent_and_to_the_token(other: Figures, fine: bool) -> None:
    results = {"ours": [Figures(100, 10, 100, 64)], "other": [other]}
    assert show(results, [], Console(quiet=True)) is fine
    assert not show(results, ["other: 63 tokens, the server counted 64"], Console(quiet=True))


def test_the_servers_own_counter_is_read() -> None:
    with serving(NullEngine()) as port:
        httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": "null", "prompt": "hi", "max_tokens": 77})
        assert generated(Target(f"http://127.0.0.1:{port}", "null")) == 77
    assert generated(Target(f"http://127.0.0.1:{port}", "null")) is None
