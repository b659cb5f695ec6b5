"""`synthia-vllm bench chaos`, small: the command, its report, and that it ends what it started."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from synthia_vllm.bench.run_file import read

pytestmark = pytest.mark.chaos

SMALL = ["--streams", "30", "--replicas", "3", "--seconds", "3", "--every", "1", "--tokens-per-second", "40"]


def start(output: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "synthia_vllm", "bench", "chaos", *SMALL, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_no_stream_breaks(tmp_path: Path) -> None:
    process = start(tmp_path / "chaos.json")
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    report = read(tmp_path / "chaos.json").chaos
    assert report is not None
    found = report["scenarios"]["null"]
    assert found["summary"]["broken streams"] == 0
    assert found["summary"]["kills"] >= 1
    assert found["summary"]["streams"] >= 30
    assert sum(found["resumed"].values()) > 0
    assert found["refused_seams"] == 0


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path / "chaos.json")
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(children) < 4:  # three engines and the gateway
        assert time.monotonic() < deadline
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1.0)
    process.send_signal(2)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not (tmp_path / "chaos.json").exists()
