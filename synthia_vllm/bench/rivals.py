"""Gateways that others make, from PyPI: how each is found on this machine and started before an engine.

A rival has an environment of its own, since their packages clash with ours and with each other's, and is never
installed from here. To add one, add it to `RIVALS`.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from synthia_vllm.free_ports import free_port

# Of the group, beside the rivals: the engine without a gateway, and our gateway.
DIRECT, GATEWAY = "direct", "gateway"
# More than any load reaches: limits are to be counted, not hit.
REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE = 1_000_000, 1_000_000_000
_MASTER_KEY = "sk-bench-master"


@dataclass(frozen=True)
class Engine:
    """What a gateway is put before. `folder`: for its files."""

    url: str
    model: str
    folder: Path


@dataclass(frozen=True)
class Rival:
    """A gateway of others.

    command     its program's name on PATH
    arguments   of the program; `--host` and `--port` are added
    package     the distribution that it is of; `requirement` is what pip is told, where that is more
    ready       the path that answers 200 when it serves
    """

    name: str
    title: str
    command: str
    arguments: Callable[[Engine], list[str]]
    package: str
    requirement: str = ""
    ready: str = "/readiness"
    key: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def cure(self) -> str:
        """How to get it."""
        folder = f"rivals/{self.name}"
        install = f"python3 -m venv {folder} && {folder}/bin/pip install '{self.requirement or self.package}'"
        return f"{install}, then --rival {self.name}={folder}/bin/{self.command}"

    def find(self, given: Mapping[str, str]) -> tuple[str | None, str]:
        """Its program, by what was `given` or on PATH, and its version; without one, None and why."""
        named = given.get(self.name)
        program = shutil.which(named or self.command)
        if program is None:
            return None, f"not found{f': {named}' if named else ' on PATH'}; {self.cure}"
        version = version_beside(Path(program).resolve(), self.package)
        if version is None:  # sglang-router brings a program called smg, too
            return None, f"the program {self.command} found is not of the package {self.package}; {self.cure}"
        return program, version


def version_beside(program: Path, package: str) -> str | None:
    """The package's version in the program's environment: None if it isn't there, empty if there is no telling."""
    python = program.with_name("python")
    if not python.exists():
        return ""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    # -I: what PYTHONPATH has is not of that environment.
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _own_metrics() -> list[str]:
    """The Rust routers' metrics have a port of their own, 29000 on all addresses if nothing is said."""
    return ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]


def _smg(engine: Engine) -> list[str]:
    return ["launch", "--backend", "openai", "--worker-urls", engine.url, *_own_metrics()]


def _vllm_router(engine: Engine) -> list[str]:
    return ["--worker-urls", engine.url, *_own_metrics()]


def _sglang_router(engine: Engine) -> list[str]:
    return ["launch", "--worker-urls", engine.url, *_own_metrics()]


def _litellm(engine: Engine) -> list[str]:
    """A master key, and requests and tokens a minute counted; its virtual keys need a PostgreSQL and are not used."""
    file = engine.folder / "litellm.yaml"
    upstream = {"model": f"hosted_vllm/{engine.model}", "api_base": f"{engine.url}/v1", "api_key": "none"}
    limits = {"rpm": REQUESTS_PER_MINUTE, "tpm": TOKENS_PER_MINUTE}
    config = {
        "model_list": [{"model_name": engine.model, "litellm_params": upstream | limits}],
        "router_settings": {"optional_pre_call_checks": ["enforce_model_rate_limits"]},
        "general_settings": {"master_key": _MASTER_KEY},
    }
    file.write_text(json.dumps(config))  # which is YAML, too
    return ["--config", str(file)]


RIVALS: tuple[Rival, ...] = (
    Rival("smg", "smg (Rust; no keys, no limits)", "smg", _smg, "smg"),
    Rival("vllm-router", "vllm-router (Rust; no keys, no limits)", "vllm-router", _vllm_router, "vllm-router"),
    Rival(
        "sglang-router", "sglang-router (Rust; no keys, no limits)", "sglang-router", _sglang_router, "sglang-router"
    ),
    Rival(
        "litellm",
        "LiteLLM's proxy (master key, rpm and tpm limits)",
        "litellm",
        _litellm,
        "litellm",
        requirement="litellm[proxy]",
        ready="/health/readiness",
        key=_MASTER_KEY,
        # It fetches a list of prices when it starts, and tries again where there is no network.
        environment={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
)
