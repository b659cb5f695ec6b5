"""Servers as processes: started on a free port, waited for, weighed, stopped."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
import psutil

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_LOG_TAIL = 3000  # characters


@dataclass(frozen=True)
class RunningServer:
    url: str
    pid: int
    startup_s: float  # until it answered

    def memory_bytes(self) -> int:
        """Of the process and its children; what they share is counted once (PSS)."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.pid)
            for process in (whole, *whole.children(recursive=True)):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
        return total


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    *,
    tail: Sequence[str] = (),
    health: str = "/health",
) -> Iterator[RunningServer]:
    """A server while it is needed. `tail` goes to the end of its command line; `health` answers 200 when it serves.

    Raises ClickException with the end of its log where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = logs / f"{name}.log"
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *tail],
            env={
                **os.environ,
                "VLLM_LOGGING_LEVEL": "INFO",
                "VLLM_NO_USAGE_STATS": "1",
                "SYNTHIA_DATA": str(logs),
                **environment,
            },
            stdout=stream,
            stderr=stream,
            # A group, so that Ctrl-C is for the one who asked; no session: Linux' autogroups would make this process,
            # the client, wait up to a second for a core on which a worker of another session waits busily.
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url + health):
            if process.poll() is not None or time.monotonic() - began > _START_TIMEOUT_S:
                raise click.ClickException(f"{name} did not start:\n{log.read_text()[-_LOG_TAIL:]}")
            time.sleep(0.5)
        yield RunningServer(url, process.pid, round(time.monotonic() - began, 1))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
