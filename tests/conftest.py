"""One real server for the whole run: `serve` with the demo model, started when the first test needs it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import hypothesis
import pytest

from tests import under_unit

if TYPE_CHECKING:
    from tests.otlp_collector import Collector

# Tests never check time: a machine that is busy makes no test fail.
hypothesis.settings.register_profile("synthia", deadline=None)
hypothesis.settings.load_profile("synthia")

pytest_plugins = [
    "tests.chromium_service",
    "tests.clock_service",
    "tests.otlp_collector",
    "tests.redis_service",
    "tests.services",
]

START_TIMEOUT_S = 300


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Takes back what a test leaves in it: vLLM's configuration writes LD_PRELOAD and more for its children."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@dataclass(frozen=True)
class RunningServer:
    url: str
    pid: int
    announcement: str  # what `serve` printed when it was ready
    log: Path
    data: Path  # where its keys and its ledger are
    vllm: str  # URL of vLLM's own routes over the same engine


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, collector: "Collector") -> Iterator[RunningServer]:
    """`synthia-vllm serve --port 0` with a small context, and vLLM's own routes beside it."""
    folder = tmp_path_factory.mktemp("serve")
    log, out = folder / "engine.log", folder / "out.txt"
    beside = folder / "vllm.txt"
    # As systemd would run it, where that can be tried.
    under = [sys.executable, "-m", "tests.under_unit", str(under_unit.UNIT)] if under_unit.can() else []
    command = [*under, sys.executable, "-m", "tests.vllm_beside", str(beside), "--port", "0", "--log-file", str(log)]
    # In float32 a reply does not depend on what else is computed in its steps.
    command += ["--engine.max-model-len", "4096", "--engine.kv-cache-gib", "1", "--engine.dtype", "float32"]
    # Only requests that bring a trace of their own are traced.
    command += ["--tracing.otlp-endpoint", collector.endpoint, "--tracing.protocol", "http/protobuf"]
    command += ["--tracing.sample-ratio", "0"]
    environment = {**os.environ, "SYNTHIA_DATA": str(folder / "data")}
    with out.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"at (http://\S+)", out.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"serve did not start:\n{out.read_text()}\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield RunningServer(found.group(1), process.pid, out.read_text(), log, folder / "data", beside.read_text())
    finally:
        if process.returncode is None and process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http
