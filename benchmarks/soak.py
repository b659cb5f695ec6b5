"""A soak: all kinds of users at once for an hour, while the stores come and go. Nothing may grow, stick, or be lost.

    python -m benchmarks.soak
    python -m benchmarks.soak --minutes 4 --every 20 --kind "leaves a stream" --kind "chat, whole"

`synthia-vllm serve` with the demo model, and before it `synthia-vllm gateway` with its keys and its bill in
PostgreSQL and its limits in Redis. Each store is stopped, started, and stands still, in turn. What is promised:

memory    that the engine, its server and the gateway have allocated grows by less than 1 MB an hour, after a warm-up of
          a quarter of the time (judged in runs of half an hour and more: the slope of a short one says nothing)
files     at rest, at most 4 file descriptors more are open than before the load
counters  when all users have gone everything is back to zero: queue, room, running, the limits' running requests
bill      the ledger is the engine's own counters, to the token, and no row is missing
answers   nobody gets an answer that his kind of request may not get

Ctrl-C ends the load early, and what there is by then is written. Exit code 1 where a promise is missed.
"""

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console

from benchmarks.soak_bill import Tokens, compare, gaps, rows
from benchmarks.soak_house import House, Say, engine, house, stores
from benchmarks.soak_users import AT_ONCE, KINDS, Users, kind_of
from benchmarks.soak_watch import GENERATED, PROMPT, Server, Watch, fds_at_rest, until_at_rest
from synthia_vllm import __version__
from synthia_vllm.bench.chaos import many_files
from synthia_vllm.bench.machine import machine

_WARM_S = 20.0  # of load before file descriptors at rest are counted for the first time
_REST_S = 120.0  # for a lease of the limits to end, and a store's time-outs
_CLOSED_S = 35.0  # after which connections that were kept are closed
_SETTLE_S = 2.0  # for what the gateway's end cut short
_TELLS_MIN = 30.0  # a shorter run says nothing of memory
_MOST_MB_AN_HOUR = 1.0
_FDS_SLACK = 4
_ALL_PLACES = f"{AT_ONCE} times 200"
_HELP = "\n\n".join(f"\b\n{part}" for part in (__doc__ or "").split("\n\n"))  # its lines stay as they are


async def soak(here: House, kinds: tuple[str, ...], minutes: float, every: float) -> dict[str, Any]:
    """The load, and what is to be seen while the gateway runs. Ctrl-C ends the load."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    here.say("warming up")
    warm = Users(here.gateway.url, here.keys, kinds)
    await here.load(warm, _WARM_S, None, asyncio.Event())
    before = await _files(here, _REST_S)
    here.say(f"{minutes:g} minutes of {len(kinds)} kinds of users, a fault each {every:g} s")
    users = Users(here.gateway.url, here.keys, kinds)
    watch = await here.load(users, minutes * 60, every, stop)
    loop.remove_signal_handler(signal.SIGINT)
    here.say("no more requests")
    left = await asyncio.to_thread(until_at_rest, here.engine, here.gateway, here.redis.url, _REST_S)
    places = await here.places()
    after = await _files(here, _REST_S)
    lost = await asyncio.to_thread(here.gateway.sums)
    return {
        "minutes": round(watch.times[-1] / 60, 1),
        "faults": dict(here.happened),
        "answers": {kind: dict(sorted(told.items())) for kind, told in users.answers.items()},
        "unexpected answers": _merged(warm.unexpected(), users.unexpected()),
        "processes": _with_files(watch, before, after),
        "not at rest": left,
        "places of a user that may have some at once": places,
        "rows given up": lost.get("synthia_ledger_lost_rows_total", 0.0),
    }


async def _files(here: House, seconds: float) -> dict[str, int]:
    """File descriptors of each process when all is at rest and the connections are closed."""
    await asyncio.to_thread(until_at_rest, here.engine, here.gateway, here.redis.url, seconds)
    await asyncio.sleep(_CLOSED_S)
    stores = here.postgres.port, here.redis.port
    return {name: await asyncio.to_thread(fds_at_rest, pid, stores) for name, pid in here.pids.items()}


def _with_files(watch: Watch, before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    figures = watch.figures()
    return {name: one | {"fds at rest": [before[name], after[name]]} for name, one in figures.items()}


def _merged(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *other)}


def _counted(server: Server) -> Tokens:
    sums = server.sums()
    return Tokens(int(sums[PROMPT]), int(sums[GENERATED]))


def missed(found: Mapping[str, Any]) -> list[str]:
    """The promises that were not kept."""
    told = []
    for name, one in found["processes"].items():
        slope, margin = one["anonymous, an hour"], one["anonymous, an hour, 95 %"]
        if found["minutes"] >= _TELLS_MIN and not (slope is not None and slope < _MOST_MB_AN_HOUR):
            told.append(f"memory: {name} grows by {slope} MB an hour (± {margin})")
        before, after = one["fds at rest"]
        if after > before + _FDS_SLACK:
            told.append(f"files: {name} has {after} file descriptors at rest, before the load {before}")
    told += [f"counters: {where}: {what}" for where, what in found["not at rest"].items()]
    for where, answers in found["places of a user that may have some at once"].items():
        if answers != _ALL_PLACES:
            told.append(f"counters: {where}, a user that may have {AT_ONCE} at once got {answers}")
    told += [f"answers: {count} times {what}" for what, count in found["unexpected answers"].items()]
    bill = found["bill"]
    for what in ("generated", "prompt"):
        if difference := bill[f"{what}: counted, not accounted for"]:
            told.append(f"bill: {difference} {what} tokens were counted and are not accounted for")
    for kind, one in bill["differences by kind"].items():
        told.append(
            f"bill: {one['requests']} requests of {kind!r} are billed otherwise than the engine's ledger has them"
        )
    for what in ("requests that only the engine's ledger has", "writers without an end"):
        if bill[what]:
            told.append(f"bill: {bill[what]} {what}")
    if found["rows given up"]:
        told.append(f"bill: {found['rows given up']:g} rows given up")
    return told


def show(found: Mapping[str, Any], say: Say) -> None:
    for name, one in found["processes"].items():
        slope, margin = one["anonymous, an hour"], one["anonymous, an hour, 95 %"]
        say(f"{name}: {slope} ± {margin} MB an hour, file descriptors at rest {one['fds at rest']}")
    for name, value in found["bill"].items():
        say(f"bill: {name}: {value}")
    for one in found["missed"]:
        say(f"missed: {one}")


@click.command(help=_HELP, context_settings={"max_content_width": 120})
@click.option("--minutes", default=60.0, show_default=True, help="Of load.")
@click.option("--every", default=120.0, show_default=True, help="Seconds from one fault's end to the next.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Again for more (default: all).")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Keep logs and databases here.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "soak.json",
    show_default="benchmarks/results/soak.json",
)
def main(minutes: float, every: float, kinds: tuple[str, ...], logs: Path | None, output: Path) -> None:
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    many_files()

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True)

    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)  # PostgreSQL runs as another user
        postgres, redis = stack.enter_context(stores(folder))
        say("starting the engine")
        with engine(folder) as (server, pid, ledger):
            before = _counted(server)
            with house(folder, postgres, redis, server, pid, say) as here:
                found = uvloop.run(soak(here, kinds or tuple(KINDS), minutes, every))
            time.sleep(_SETTLE_S)
            after = _counted(server)
        counted = Tokens(after.prompt - before.prompt, after.generated - before.generated)
        bill = compare(rows(postgres.url), rows(ledger), counted, kind_of)
        found["bill"] = bill.figures() | {"writers without an end": gaps(postgres.url) + gaps(ledger)}
    found["missed"] = missed(found)
    options = {"minutes": minutes, "every": every, "kinds": list(kinds or KINDS)}
    report = {"machine": machine(), "version": __version__, "options": options, **found}
    output.write_text(json.dumps(report, indent=1) + "\n")
    show(found, say)
    say(f"written to {output}")
    sys.exit(1 if found["missed"] else 0)


if __name__ == "__main__":
    main()
