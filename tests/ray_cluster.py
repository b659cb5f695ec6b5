"""A real cluster as a user starts it: `cluster up` with two replicas of the demo model."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UP_TIMEOUT_S = 420  # two engines on a machine that does other things as well
DOWN_TIMEOUT_S = 120
# Small, so that it fits beside the other servers of a test run; prefixes of a conversation still fill many blocks.
ENGINE_OPTIONS = ("--model", "demo", "--engine.max-model-len", "2048", "--engine.kv-cache-gib", "0.5")


@dataclass(frozen=True)
class RunningCluster:
    """What `cluster up` made, and the means to change it: each call is a command of its own, as a user would run it."""

    url: str
    data: Path
    announcement: str

    def run(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return run_command(self.data, *words, environment=environment)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return found

    def healthy(self) -> bool:
        return self.run("status", "--json").returncode == 0

    def state(self) -> dict[str, Any]:
        """What `up` wrote down about its Ray."""
        found: dict[str, Any] = json.loads((self.data / "cluster.json").read_text())
        return found


def run_command(
    data: Path, *words: str, timeout: float = _UP_TIMEOUT_S, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "synthia_vllm", "cluster", *words],
        env={**os.environ, "SYNTHIA_DATA": str(data), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
