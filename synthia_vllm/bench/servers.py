"""The servers that a command measures: those that run already, or ours, started for it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.peers import CONTEXT, Plan, Say, Up, machine_group
from synthia_vllm.bench.probe import target_of
from synthia_vllm.bench.profiles import USERS
from synthia_vllm.bench.run_file import Server


@contextmanager
def running_already(options: Mapping[str, Any]) -> Iterator[list[Up]]:
    """The servers that `--server` names. Raises ClickException for one that does not answer."""
    found = []
    for given in options["servers"]:
        name, _, url = given.rpartition("=")
        target = target_of(url, options)
        found.append(Up(Server(name=name or "server", title=target.url), target))
    taken = [up.server.name for up in found]
    if len(set(taken)) < len(taken):
        raise click.ClickException("--server: give each a name of its own, as in --server old=http://127.0.0.1:8000")
    yield found


@contextmanager
def one_server(options: Mapping[str, Any], say: Say) -> Iterator[tuple[str, Target]]:
    """The server that `--server` names, or ours, started for it. Raises ClickException."""
    if options["server"]:
        yield "server", target_of(options["server"], options)
        return
    plan = plan_of({"kv_cache_gib": 1.0, "replicas": 1, **options})
    with (
        tempfile.TemporaryDirectory(prefix="synthia-bench-") as folder,
        machine_group(plan, ["ours"], Path(folder), say) as (up,),
    ):
        if up.target is None:
            raise click.ClickException(f"{up.server.name}: {up.server.missing}")
        yield up.server.name, up.target


def plan_of(options: Mapping[str, Any]) -> Plan:
    """What this machine's servers will serve; makes the demo model if need be."""
    from synthia_vllm.engine.arguments import default_model, plan_engine
    from synthia_vllm.engine.hardware import inspect_machine
    from synthia_vllm.settings import EngineSettings, Settings

    machine = inspect_machine()
    model = options["model"] or default_model(machine)
    engine = EngineSettings(max_model_len=CONTEXT, kv_cache_gib=options["kv_cache_gib"])
    plan = plan_engine(Settings(model=model, engine=engine), machine)
    return Plan(model, plan, options["kv_cache_gib"], options["replicas"], USERS)
