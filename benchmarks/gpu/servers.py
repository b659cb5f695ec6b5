"""The servers that are held against each other on one GPU, and how much of its memory each gets."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import psutil

from benchmarks.load.client import Target
from benchmarks.load.peers import Say, Up, version_of, vllm_distribution
from benchmarks.load.processes import RunningServer, running
from benchmarks.load.run_file import Server
from synthia_vllm.engine.arguments import plan_engine
from synthia_vllm.engine.hardware import GIB, Machine
from synthia_vllm.engine.memory import OVERHEAD_BYTES
from synthia_vllm.engine.profiles import Profile
from synthia_vllm.engine.vllm_seams import server_module
from synthia_vllm.errors import SynthiaError
from synthia_vllm.settings import EngineSettings, Settings

Kind = Literal["ours", "vllm", "vllm-default", "card"]
FP8: Mapping[str, Any] = {"quantization": "fp8"}
DUMMY: Mapping[str, Any] = {"load_format": "dummy"}
NAME = "random"  # what the model is served as
CONTEXT = 4096
_GPU_SHARE = 0.9  # of its memory, vLLM's own default


@dataclass(frozen=True)
class Variant:
    """A server with options of vLLM. `path`: where the card's script answers in its own server."""

    name: str
    title: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Bench:
    """What all servers share."""

    model: Path
    machine: Machine
    context: int = CONTEXT


def kv_gib(bench: Bench, variants: Sequence[Variant], cpu_gib: float = 0.25) -> float:
    """KV cache of each server where these share one GPU: the same for all, so that none can hold more."""
    if not bench.machine.gpus:
        return cpu_gib
    weights = sum(file.stat().st_size for file in bench.model.glob("*.safetensors"))
    processes = {(variant.kind, variant.name if variant.kind != "card" else "") for variant in variants}
    quantized = sum(variant.options.get("quantization") is not None for variant in variants)
    taken = (len(processes) - quantized / 2) * weights + len(processes) * OVERHEAD_BYTES
    engines = sum(kind != "card" for kind, _ in processes)
    left = _GPU_SHARE * bench.machine.gpus[0].memory_total - taken
    if left <= 0:
        raise click.ClickException(
            f"{len(processes)} servers don't fit: their weights take {taken / GIB:.0f} GiB of "
            f"{bench.machine.gpus[0].memory_total / GIB:.0f}"
        )
    return round(left / max(1, engines) / GIB, 2)


def command_of(variant: Variant, bench: Bench, gib: float) -> tuple[list[str], dict[str, str]]:
    """Command line and environment, without the port."""
    python, model = sys.executable, str(bench.model)
    extra = Profile(name="", hardware="", geometry={}, options=dict(variant.options)).arguments([])
    if variant.kind == "card":
        return [python, "-m", "benchmarks.load.card_server", "--model", model], {}
    if variant.kind == "ours":
        own = ["--engine.max-model-len", str(bench.context), "--engine.kv-cache-gib", str(gib)]
        serve = [python, "-m", "synthia_vllm", "serve", "--model", model, "--log-file", "-", "--no-page"]
        return [*serve, "--engine.profile", "none", *own], {}
    if variant.kind == "vllm":  # our arguments and environment, without our layers
        engine = EngineSettings(max_model_len=bench.context, kv_cache_gib=gib, profile="none")
        plan = plan_engine(Settings(model=model, engine=engine), bench.machine, extra)
        return [python, "-m", server_module(), *plan.arguments], plan.environment
    plain = [python, "-m", server_module(), "--model", model, "--max-model-len", str(bench.context)]
    plain += ["--kv-cache-memory-bytes", str(int(gib * GIB)), *extra]
    return [*plain, *([] if bench.machine.gpus else ["--enforce-eager"])], {}


@contextmanager
def serving(bench: Bench, variants: Sequence[Variant], logs: Path, say: Say) -> Iterator[list[Up]]:
    """All of them at once, started one after the other. One that does not start is left out by name."""
    gib = kv_gib(bench, variants)
    with ExitStack() as stack:
        processes: dict[tuple[str, ...], RunningServer | str] = {}
        found = []
        for variant in variants:
            command, environment = command_of(variant, bench, gib)
            key = (*command, str(variant.options))
            if variant.options.get("quantization") and not bench.machine.gpus:
                processes[key] = "vLLM quantizes to FP8 on GPUs only"
            if key not in processes:
                say(f"starting {variant.name}: {variant.title}, {gib:g} GiB of KV cache")
                tail = tail_of(variant)
                try:
                    server = running(variant.name, command, environment, logs, tail=tail)
                    processes[key] = stack.enter_context(server)
                except (click.ClickException, SynthiaError) as error:
                    processes[key] = str(error)
            found.append(_up(variant, command, processes[key], bench))
            if found[-1].server.missing:
                say(f"left out: {variant.name}: {found[-1].server.missing}")
        yield found


def tail_of(variant: Variant) -> list[str]:
    """vLLM's options of ours come after the port: they follow two dashes."""
    if variant.kind != "ours" or not variant.options:
        return []
    return ["--", *Profile(name="", hardware="", geometry={}, options=dict(variant.options)).arguments([])]


def _up(variant: Variant, command: Sequence[str], process: RunningServer | str, bench: Bench) -> Up:
    package = {"ours": "synthia-vllm", "card": "transformers"}.get(variant.kind, vllm_distribution())
    words = [*command, *tail_of(variant)]
    server = Server(
        name=variant.name,
        title=variant.title,
        command=[_portable(word, bench) for word in words],
        version=version_of(package),
        missing=process if isinstance(process, str) else None,
    )
    if isinstance(process, str):
        return Up(server)
    server = server.model_copy(update={"startup_s": process.startup_s})
    model = str(bench.model)  # without --served-model-name vLLM takes the folder
    memory = (lambda: gpu_memory(process.pid)) if bench.machine.gpus else process.memory_bytes
    return Up(server, Target(process.url + variant.path, model), memory)


def gpu_memory(pid: int) -> int:
    """Bytes of GPU memory of a process and its children, by nvidia-smi."""
    whole = psutil.Process(pid)
    pids = {pid, *(child.pid for child in whole.children(recursive=True))}
    command = shutil.which("nvidia-smi") or "nvidia-smi"
    query = [command, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    found = [(int(cells[0]), cells[1].strip()) for row in rows if len(cells := row.split(",")) == 2]
    return sum(int(used) * 2**20 for owner, used in found if owner in pids and used.isdigit())


def _portable(word: str, bench: Bench) -> str:
    """Without this machine's folders."""
    if word == sys.executable:
        return "python"
    return word.replace(str(bench.model), NAME).rpartition("/")[2] if word.startswith("/") else word
