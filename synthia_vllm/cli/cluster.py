"""`synthia-vllm cluster up|status|down|config`."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from synthia_vllm.cli.reads import CLUSTER_CONFIG, CLUSTER_UP, settings_for
from synthia_vllm.errors import SetupError
from synthia_vllm.settings import LOOPBACK, Settings, refuse_gateways_options

if TYPE_CHECKING:
    from synthia_vllm.cluster.local import LocalRay
    from synthia_vllm.cluster.rest import ServeApi

PROG = "synthia-vllm cluster"
_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.group("cluster", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Serve with several replicas on Ray Serve, on this machine or many."""


@command.command("up", add_help_option=False, context_settings=_SETTINGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def up_command(vllm_options: list[str] | None, words: tuple[str, ...]) -> None:
    """Start the cluster, or roll the one that runs to other options: --replicas N, --port, --model, --help for all."""
    settings = settings_for(CLUSTER_UP, words)
    refuse_gateways_options(settings, f"{PROG} up")
    sys.exit(up(settings, vllm_options or [], Console(stderr=True, soft_wrap=True)))


@command.command("config", add_help_option=False, context_settings=_SETTINGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def config_command(vllm_options: list[str] | None, words: tuple[str, ...]) -> None:
    """Print what `up` would deploy, as a Serve config for `serve deploy` and KubeRay."""
    settings = settings_for(CLUSTER_CONFIG, words)
    refuse_gateways_options(settings, f"{PROG} config")
    click.echo(config_text(_with_model(settings), vllm_options or []))


@command.command("status")
@click.option("--address", help="dashboard of the Ray cluster, HOST:PORT (default: the local one)")
@click.option("--json", "as_json", is_flag=True, help="for machines")
def status_command(address: str | None, as_json: bool) -> None:
    """Show applications and replicas; exit code 1 where something is missing, 2 where nothing runs."""
    sys.exit(status(address, as_json=as_json))


@command.command("down")
@click.option("--address", help="dashboard of the Ray cluster, HOST:PORT (default: the local one)")
@click.option("--now", is_flag=True, help="cut running requests")
def down_command(address: str | None, now: bool) -> None:
    """Remove the applications, and stop the Ray that `up` started here."""
    down(address, now=now)


def up(settings: Settings, vllm_options: list[str], console: Console) -> int:
    """Brings the cluster to these settings and returns the exit code."""
    from synthia_vllm.cluster.config import serve_config
    from synthia_vllm.cluster.progress import wait_until_settled
    from synthia_vllm.cluster.rest import ServeApi, token_from_environment
    from synthia_vllm.gateway.edge.listener import check_exposure

    began = time.monotonic()
    check_exposure(settings)
    settings = _with_model(settings)
    try:
        if settings.cluster.address is None:
            settings, address, local = _local_ray(settings, vllm_options, console)
        else:
            address, local = settings.cluster.address, None
        api = ServeApi(address, local.token if local else token_from_environment())
        _check_running(api, settings)
        api.deploy(serve_config(settings, vllm_options))
        url = wait_until_settled(api, settings, local, console)
    except KeyboardInterrupt:
        console.print(
            f"The cluster goes on starting. Look: {PROG} status{_address(settings)}\n"
            f"Stop it: {PROG} down{_address(settings)}",
            highlight=False,
        )
        return 130
    console.print(ready_text(settings, url, time.monotonic() - began), highlight=False, markup=False)
    return 0


def config_text(settings: Settings, vllm_options: Sequence[str]) -> str:
    """The Serve config as YAML, the environment that Ray's nodes need in its first lines."""
    import yaml

    from synthia_vllm.cluster.config import SECRETS, ray_environment, serve_config

    environment = yaml.safe_dump(ray_environment(settings), sort_keys=False).strip().splitlines()
    secrets = [f"{variable}: (from --{'.'.join(path)})" for variable, path in SECRETS.items()]
    lines = [
        "The environment that every node of Ray needs when it starts:",
        *(f"  {line}" for line in environment),
        "Secrets, given to every node in the same way and never in this file. access.secret is the same everywhere:",
        *(f"  {line}" for line in secrets),
    ]
    comment = "\n".join(f"# {line}".rstrip() for line in lines)
    return f"{comment}\n{yaml.safe_dump(serve_config(settings, vllm_options), sort_keys=False)}".rstrip()


def status(address: str | None, *, as_json: bool) -> int:
    from synthia_vllm.cluster import local
    from synthia_vllm.cluster.rest import applications, healthy

    ray = local.find() if address is None else None
    if address is None and ray is None:
        click.echo("{}" if as_json else f"No cluster runs here. Start one: {PROG} up", err=not as_json)
        return 2
    details = _api(address, ray).details()
    found = applications(details)
    whole = healthy(found)
    if as_json:
        told = {
            "healthy": whole,
            "url": _url(details),
            "applications": {name: dataclasses.asdict(application) for name, application in found.items()},
        }
        click.echo(json.dumps(told, indent=2))
        return 0 if whole else 1
    table = Table("application", "replica", "state", "node", "pid", "since", box=None)
    for application in found.values():
        table.add_row(application.name, f"{application.running()} of {application.target}", application.state)
        for replica in application.replicas:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(replica.since))
            table.add_row("", replica.name, replica.state, replica.node, str(replica.pid or ""), since)
    console = Console(soft_wrap=True)
    console.print(table)
    for application in found.values():
        if application.message:
            console.print(f"{application.name}: {application.message}", highlight=False, markup=False)
    console.print(f"{'healthy' if whole else 'not healthy'}: {_url(details)}", highlight=False)
    return 0 if whole else 1


def down(address: str | None, *, now: bool) -> None:
    from synthia_vllm.cluster import local

    ray = local.find() if address is None else None
    if address is None and ray is None:
        click.echo("No cluster runs here.", err=True)
        return
    console = Console(stderr=True, soft_wrap=True)
    try:
        if not now or ray is None:
            with console.status("running requests finish"):
                _api(address, ray).delete()
    except SetupError as error:
        if ray is None:
            raise
        console.print(f"{error}; stopping its processes", highlight=False, markup=False)
    finally:
        if ray is not None:
            with console.status("stopping Ray"):
                local.stop(ray)
    console.print("The cluster is down.", highlight=False)


def ready_text(settings: Settings, url: str, seconds: float) -> str:
    """What is printed when the cluster answers: a command that works as printed, and how to go on."""
    from synthia_vllm.cli.serve import request_text
    from synthia_vllm.engine.arguments import DEMO
    from synthia_vllm.engine.demo import NAME

    model = NAME if settings.model == DEMO else settings.model
    lines = [
        f"Ready after {seconds:.0f} s: {model} at {url} (also as synthia and synthia-tot)",
        *request_text(settings, url),
        f"Look: {PROG} status{_address(settings)}",
        f"Change it: run `{PROG} up` again with other options. Stop it: {PROG} down{_address(settings)}",
    ]
    return "\n".join(lines)


def _local_ray(settings: Settings, vllm_options: list[str], console: Console) -> "tuple[Settings, str, LocalRay]":
    """The Ray on this machine, started now if none of ours runs; and the settings with the port that it has."""
    from synthia_vllm.cluster import local
    from synthia_vllm.cluster.config import check_agreement, ray_environment, secrets_of
    from synthia_vllm.cluster.planning import check_room, plan_replica
    from synthia_vllm.engine.hardware import inspect_machine
    from synthia_vllm.gateway.app import check_stores
    from synthia_vllm.gateway.edge.listener import bind

    if settings.host in LOOPBACK:
        settings.host = "127.0.0.1"
    elif settings.host != "0.0.0.0":
        raise SetupError(
            f"--host {settings.host}: a Ray on this machine alone serves at 127.0.0.1 or at all addresses, 0.0.0.0; to "
            "bind one address start Ray on it and give --cluster.address"
        )
    check_agreement(settings)
    check_stores(settings)
    ray = local.find()
    machine = inspect_machine()
    if ray is not None:  # what it holds is free for what takes its place
        machine = dataclasses.replace(machine, memory_available=machine.memory_total)
    check_room(settings, machine, plan_replica(settings, machine, vllm_options))
    environment, secrets = ray_environment(settings), secrets_of(settings)
    digest = hashlib.sha256(json.dumps(secrets, sort_keys=True).encode()).hexdigest()
    if ray is None:
        sock = bind(settings)
        settings.port = sock.getsockname()[1]
        sock.close()
        with console.status("starting Ray"):
            ray = local.start(environment, secrets, digest, settings.port)
    else:
        _check_same(settings, ray, environment, digest)
        settings.port = ray.port
    return settings, ray.dashboard, ray


def _check_same(settings: Settings, ray: "LocalRay", environment: dict[str, str], digest: str) -> None:
    """Raises SetupError for what a running Ray can't change any more."""
    cure = f"run `{PROG} down` first"
    if settings.port not in (0, ray.port, type(settings).model_fields["port"].default):
        raise SetupError(f"--port {settings.port}: the cluster that runs answers at port {ray.port}; {cure}")
    if digest != ray.secrets:
        raise SetupError(
            f"--access.secret, --access.database or --limits.redis is not what the running cluster has; {cure}"
        )
    changed = sorted(name for name, value in environment.items() if ray.environment.get(name) != value)
    if changed:
        raise SetupError(
            "--timeouts.headers, --timeouts.body, --cluster.drain-s or --replicas.max-generation-s asks for another "
            f"{', '.join(changed)} than the running Ray was started with; {cure}"
        )


def _check_running(api: "ServeApi", settings: Settings) -> None:
    """Raises SetupError where Serve already listens elsewhere: it can't be moved."""
    options = api.details().get("http_options") or {}
    for name in ("host", "port"):
        if options and options.get(name) != getattr(settings, name):
            raise SetupError(
                f"--{name} {getattr(settings, name)}: Ray Serve already listens at {options.get('host')}:"
                f"{options.get('port')} there and can't be moved; give that, or first "
                f"run `{PROG} down{_address(settings)}`"
            )


def _api(address: str | None, ray: "LocalRay | None") -> "ServeApi":
    from synthia_vllm.cluster.rest import ServeApi, token_from_environment

    if address is None:
        assert ray is not None
        return ServeApi(ray.dashboard, ray.token)
    return ServeApi(address, token_from_environment())


def _with_model(settings: Settings) -> Settings:
    """The settings with the model's name in them: a gateway far away can't see what hardware the engine has."""
    from synthia_vllm.cluster.planning import as_asked
    from synthia_vllm.engine.arguments import SYNTHIA, default_model
    from synthia_vllm.engine.hardware import inspect_machine

    if settings.model is None:
        here = as_asked(inspect_machine(), settings)
        settings.model = SYNTHIA if settings.cluster.address else default_model(here)
    return settings


def _address(settings: Settings) -> str:
    return f" --address {settings.cluster.address}" if settings.cluster.address else ""


def _url(details: dict[str, object]) -> str:
    options = details.get("http_options")
    if not isinstance(options, dict):
        return ""
    host = "127.0.0.1" if options["host"] == "0.0.0.0" else options["host"]
    return f"http://{host}:{options['port']}"
