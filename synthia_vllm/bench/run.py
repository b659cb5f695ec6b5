"""`synthia-vllm bench run`: this machine's servers, or one that runs already, under every load of a profile."""

import asyncio
import dataclasses
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from synthia_vllm.bench.client import GREEDY
from synthia_vllm.bench.gateway_group import NULL_MODEL, gateways_group
from synthia_vllm.bench.groups import GROUPS, Group
from synthia_vllm.bench.interleaving import WARM_UP, run_rounds, warm_up
from synthia_vllm.bench.measuring import Terms, whole
from synthia_vllm.bench.peers import Plan, Say, Up, cluster_group, machine_group
from synthia_vllm.bench.profiles import NEAREST, PROFILES, Part, Profile, chats_at_once
from synthia_vllm.bench.records import Recorder, default_path, new_run
from synthia_vllm.bench.rivals import RIVALS
from synthia_vllm.bench.run_file import Measurement, report_beside
from synthia_vllm.bench.servers import plan_of, running_already
from synthia_vllm.bench.trace import read_trace
from synthia_vllm.bench.users import read_users
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.prompt import SAMPLING_DEFAULTS

SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "greedy": GREEDY,
    "card": {name: value for name, value in SAMPLING_DEFAULTS.items() if name != "max_tokens"},
}
# Of the report and of the sizing's check: rather missed now than after an hour.
_NEEDED_AT_THE_END = ("matplotlib", "numba")
# Where neither groups nor peers are named. The gateways are a measurement of their own.
_BY_DEFAULT: tuple[Group, ...] = ("machine", "cluster")
_START: Mapping[Group, Callable[[Plan, Sequence[str], Path, Say], AbstractContextManager[list[Up]]]] = {
    "machine": machine_group,
    "cluster": cluster_group,
    "gateways": gateways_group,
}
# What each group after the first may take of the time; and to stop everything.
_LATER_SHARE, _STOPPING_S = 0.25, 45.0


def numbers(context: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    """`1,8,32`."""
    if value is None:
        return None
    try:
        found = [float(word) for word in value.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise click.BadParameter(f"{value!r}: numbers above 0 with commas between them are wanted, as in 1,8,32")
    return found


def names(context: click.Context, option: click.Parameter, value: str | None) -> list[str] | None:
    """Of peers."""
    known = [name for group in GROUPS.values() for name in group]
    found = value.split(",") if value else None
    for name in found or ():
        if name not in known:
            raise click.BadParameter(f"no peer {name!r}; there are {', '.join(known)}")
    return found


def programs(context: click.Context, option: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """`smg=rivals/smg/bin/smg`, several times."""
    known = [rival.name for rival in RIVALS]
    found = {name: program for name, _, program in (word.partition("=") for word in value)}
    for name, program in found.items():
        if name not in known or not program:
            raise click.BadParameter(f"{name!r}: NAME=PROGRAM is wanted, with a NAME of {', '.join(known)}")
    return found


@click.command("run")
@click.option("--profile", type=click.Choice(list(PROFILES)), default="quick", show_default=True)
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="[NAME=]URL",
    help="One that runs; then none is started. May be given again.",
)
@click.option("--key", help="--server: its key.")
@click.option("--served-model", help="--server: the model's name there (default: the first that it lists).")
@click.option("--chat", is_flag=True, help="--server: its chat route speaks the Synthia format.")
@click.option(
    "--keep-alive/--no-keep-alive",
    default=True,
    help="--server: use a connection again, or not, for one that closes them without saying so (llama.cpp).",
)
@click.option("--model", help="Folder, hub id or 'demo' (default: Synthia where there is a GPU, else demo).")
@click.option(
    "--group",
    "groups",
    type=click.Choice(list(GROUPS)),
    multiple=True,
    help="Servers that are held against each other; may be given again (default: machine and cluster).",
)
@click.option("--peers", callback=names, metavar="A,B", help="Only these servers (default: all of the groups).")
@click.option(
    "--rival",
    "rivals",
    callback=programs,
    multiple=True,
    metavar="NAME=PROGRAM",
    help=f"Gateways: where {', '.join(rival.name for rival in RIVALS)} is, if not on PATH; may be given again.",
)
@click.option("--null", is_flag=True, help="Gateways: a stand-in engine behind them, for what a gateway alone costs.")
@click.option("--rounds", type=click.IntRange(1), help="Interleaved repeats (default: each load's).")
@click.option(
    "--minutes", type=click.FloatRange(0.1), help="What it may take; no round that would take longer is begun."
)
@click.option("--streams", callback=numbers, metavar="N,N", help="Of the closed loops (default: 1,8,32,64).")
@click.option("--rates", callback=numbers, metavar="R,R", help="Of the open loops, requests a second.")
@click.option("--kinds", help="Only these: closed, open, conversations, trace, users; with commas between them.")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A .csv or .jsonl: arrival, prompt_tokens, output_tokens, user.",
)
@click.option("--users", type=click.Path(path_type=Path), help="A YAML file with populations of users.")
@click.option("--seconds", default=30.0, show_default=True, help="--users: how long they send.")
@click.option("--sampling", type=click.Choice(list(SAMPLING)), default="greedy", show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of lengths and moments.")
@click.option(
    "--seed-prompts",
    is_flag=True,
    help="Of prompts too: another run of this seed finds them in the server's prefix cache.",
)
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True, help="Of the cluster.")
@click.option("--kv-cache-gib", default=1.0, show_default=True, help="Of each engine.")
@click.option(
    "--ttft-ms",
    type=click.FloatRange(0, min_open=True),
    default=1000,
    show_default=True,
    help="SLO that the report counts by.",
)
@click.option("--itl-ms", type=click.FloatRange(0, min_open=True), default=250, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), show_default="bench/TIME-PROFILE.json")
def command(output: Path | None, **options: Any) -> None:
    """Load servers in turn and write what each request saw, with a report beside it.

    Without --server it starts this machine's own: the card's script, vLLM as it is and tuned as we do, llama.cpp, ours,
    and the ways into a cluster; with --group gateways our gateway and others' before one vLLM. What is not installed is
    left out, and named.
    """
    console = Console(stderr=True, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    for package in _NEEDED_AT_THE_END:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    profile = profile_of(options)
    output = output or default_path(profile.name)
    said = {name: value for name, value in options.items() if name != "key"}
    said |= {"traces": [path.name for path in options["traces"]], "users": options["users"] and options["users"].name}
    began = time.monotonic()
    code = 0
    plan = plan_for(options)
    recorder = Recorder(new_run(profile.name, said, model_of(plan)), output)
    try:
        run_all(recorder, profile, options, plan, began, console)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far is kept", highlight=False)
        code = 130
    finally:
        finish(recorder, console)
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes", highlight=False)
    measurements = recorder.run.measurements
    sys.exit(code or (1 if measurements and not any(map(whole, measurements)) else 0))


def groups_of(options: Mapping[str, Any]) -> Sequence[Group]:
    """Those that the options name, themselves or by their members. Raises ClickException."""
    if options["servers"]:
        return ("machine",)  # its loads
    named: Sequence[Group] = options["groups"]
    if not named and options["peers"]:
        named = [group for group, members in GROUPS.items() if set(members) & set(options["peers"])]
    if not options["null"]:
        return named or _BY_DEFAULT
    if set(named) - {"gateways"}:
        raise click.ClickException("--null: of the group gateways alone; leave it out, or the other groups")
    return ("gateways",)


def plan_for(options: Mapping[str, Any]) -> Plan | None:
    """None where servers run already."""
    if options["servers"]:
        return None
    if options["null"]:
        engine = EnginePlan(NULL_MODEL, NULL_MODEL, [])
        return Plan(NULL_MODEL, engine, options["kv_cache_gib"], 1, rivals=options["rivals"], null=True)
    return dataclasses.replace(plan_of(options), rivals=options["rivals"])


def profile_of(options: Mapping[str, Any]) -> Profile:
    """The profile with what the options change. Raises ClickException for a file that can't be read."""
    given = {}
    if options["streams"]:
        given["asked"] = tuple(int(count) for count in options["streams"])
    if options["rates"]:
        given["rates"] = tuple(options["rates"])
    profile = PROFILES[options["profile"]](**given)
    # With files of one's own these are what is wanted, not the profile's.
    own = [Part(read_trace(path), NEAREST) for path in options["traces"]]
    own += [Part(read_users(options["users"], options["seconds"]), NEAREST)] if options["users"] else []
    parts: dict[Group, Sequence[Part]] = {"machine": own} if own else dict(profile.parts)
    groups = groups_of(options)
    parts = {group: every for group, every in parts.items() if group in groups}
    if options["kinds"]:
        kinds = options["kinds"].split(",")
        parts = {group: [part for part in every if part.workload.kind in kinds] for group, every in parts.items()}
    if options["rounds"]:  # then all of them are wanted
        parts = {group: [dataclasses.replace(part, rounds=None) for part in every] for group, every in parts.items()}
    if not any(parts.values()):
        kinds = f"--kinds {options['kinds']}: " if options["kinds"] else ""
        raise click.ClickException(f"{kinds}the profile has no such workload for {', '.join(groups)}")
    return dataclasses.replace(
        profile,
        parts=parts,
        rounds=options["rounds"] or profile.rounds,
        minutes=options["minutes"] or profile.minutes,
    )


def model_of(plan: Plan | None) -> dict[str, Any]:
    if plan is None:
        return {"name": ""}  # each server's own
    if plan.null:
        return {"name": "none: a null engine"}
    from synthia_vllm.engine.memory import read_geometry

    geometry = read_geometry(plan.engine.model, "auto")
    return {"name": plan.engine.name} | (dataclasses.asdict(geometry) if geometry else {})


def run_all(
    recorder: Recorder, profile: Profile, options: Mapping[str, Any], plan: Plan | None, began: float, console: Console
) -> None:
    """Each group of servers in turn, within the profile's time."""
    terms = Terms(options["seed"], SAMPLING[options["sampling"]], limit_s=profile.limit_s)
    if options["seed_prompts"]:
        terms = dataclasses.replace(terms, salt="")
    end = began + 60 * profile.minutes - _STOPPING_S
    wanted = options["peers"] or [name for group in GROUPS.values() for name in group]
    with tempfile.TemporaryDirectory(prefix="synthia-bench-") as folder:
        logs = Path(folder)

        def say(text: str) -> None:
            console.print(f"{time.monotonic() - began:6.0f} s  {text}", highlight=False, markup=False)

        if plan is None:
            parts = [dataclasses.replace(part, servers=None) for part in profile.parts["machine"]]
            measure_group(recorder, "machine", running_already(options), parts, profile, terms, end, say)
            return
        if not plan.null:
            say("measuring what this machine can do")
            take_roofline(recorder, plan, say)
        todo = [group for group in profile.parts if profile.parts[group] and set(GROUPS[group]) & set(wanted)]
        for left, group in zip(reversed(range(len(todo))), todo, strict=True):
            until = end - (end - began) * _LATER_SHARE * left
            servers = _START[group](plan, wanted, logs, say)
            measure_group(recorder, group, servers, profile.parts[group], profile, terms, until, say)


def take_roofline(recorder: Recorder, plan: Plan, say: Say) -> None:
    """In a process of its own: torch would stay in this one, beside the clients."""
    from synthia_vllm.bench import roofline

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            recorder.take_roofline(pool.submit(roofline.measure, Path(plan.engine.model)).result())
        except (ValueError, RuntimeError) as error:  # a GPU without room is no reason to measure nothing
            say(f"no roofline: {error}")


def measure_group(
    recorder: Recorder,
    group: Group,
    starting: AbstractContextManager[list[Up]],
    parts: Sequence[Part],
    profile: Profile,
    terms: Terms,
    until: float,
    say: Say,
) -> None:
    from synthia_vllm.bench.summary import slo_of
    from synthia_vllm.bench.terminal import line

    slo = slo_of(recorder.run)

    def done(measurement: Measurement) -> None:
        recorder.take(measurement)
        say(line(measurement, slo))

    async def run() -> None:
        await warm_up(servers, terms, say, chats_at_once(parts) if group == "gateways" else WARM_UP)
        recorder.take_servers([up.server for up in servers])
        await run_rounds(servers, parts, profile.rounds, terms, until=until, done=done, say=say)

    with starting as servers:
        recorder.take_servers([up.server for up in servers])
        if any(up.target for up in servers):
            asyncio.run(run())


def finish(recorder: Recorder, console: Console) -> None:
    """The report beside the file, and the summary."""
    from synthia_vllm.bench.report import write_report
    from synthia_vllm.bench.run_file import write
    from synthia_vllm.bench.sizing.check import check
    from synthia_vllm.bench.terminal import show

    run = recorder.run
    if not run.measurements:
        console.print("nothing was measured", highlight=False)
        return
    show(run, Console())
    try:
        run = check(run)
    except ValueError as error:
        console.print(f"the simulator is not checked: {error}", highlight=False, markup=False)
    else:
        write(run, recorder.path)
    page = report_beside(recorder.path)
    write_report(run, page)
    console.print(f"written: {recorder.path} and {page}", highlight=False)
