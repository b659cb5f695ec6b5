"""Processes that tests talk to over loopback: null engines, and gateways in front of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.null.tokenizer import write
from synthia_vllm.free_ports import free_port

ROOT = Path(__file__).parents[1]


def until(holds: Callable[[], Any], what: str, timeout: float = 60.0, pause: float = 0.1) -> Any:
    """Waits for a true value and returns it; connections that are refused are a no."""
    deadline = time.monotonic() + timeout
    while True:
        with suppress(httpx.TransportError):
            if found := holds():
                return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what}")
        time.sleep(pause)


def kill_all(processes: list[psutil.Process]) -> None:
    """Kills them, those that end meanwhile because another has gone included, and waits until they have."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@dataclass
class Running:
    """A module run as a process that answers `path` when it is up. `start` can be called again after `kill`."""

    words: list[str]
    port: int
    path: str
    environment: dict[str, str] = field(default_factory=dict)
    log: Path = Path(os.devnull)
    start_timeout: float = 60.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Running":
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self.words, env={**os.environ, **self.environment}, stdout=stream, stderr=stream
            )
        until(self._up, f"{self.words[1:]} answers", self.start_timeout)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def _up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.words[1:]} ended with {self.process.returncode}: see {self.log}")
        return httpx.get(self.url + self.path, timeout=5).is_success


def null_engine(log: Path, *options: str) -> Running:
    """Not started yet."""
    port = free_port()
    words = [sys.executable, "-m", "synthia_vllm.bench.null.engine", "--port", str(port), *options]
    return Running(words, port, "/health", log=log)


def gateway(folder: Path, upstreams: list[Running], *options: str) -> Running:
    """`synthia-vllm gateway` before null engines; tokenizer, keys and usage are in the folder. Not started yet."""
    port = free_port()
    words = [sys.executable, "-m", "synthia_vllm", "gateway", "--port", str(port), *options]
    words += ["--tokenizer", str(write(folder / "tokenizer"))]
    words += [word for engine in upstreams for word in ("--upstream", engine.url)]
    return Running(words, port, "/health", {"SYNTHIA_DATA": str(folder / "data")}, folder / "gateway.log")


def new_key(folder: Path, user: str, *options: str) -> str:
    """A key in the folder of a gateway."""
    return make_key(user, *options, data=folder / "data")
