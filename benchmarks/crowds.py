"""Crowds before a pool of replicas that die, hang, are poisoned or have far too much to do.

    python -m benchmarks.crowds                       # all three scenes, about eight minutes
    python -m benchmarks.crowds --scene losses --replies 400 --seconds 30
    python -m benchmarks.crowds --scene poison
    python -m benchmarks.crowds --scene overload --queue engine

`synthia-vllm gateway` before null engines (a stand-in: real processes, vLLM's queue and counters, no model) of
few places, so that requests wait. Half of the replies are streams, each byte of which is checked, half are whole.

losses    16 engines; one is killed with -9 each 5 s, and comes back a second later on its port. Pause: the gap in a
          stream that ran on what was killed, or from the kill to its first token. Whole replies have no gaps: of those
          that ran on what was killed it tells the seconds beyond their own work, beside those that lost nothing.
poison    20 engines and 60 replies under way. One more request kills whatever engine computes it: at once, or after 20
          tokens on each, so that it always gets on. Nothing comes back.
overload  2 gateways before the same 3 engines, 4 times as many requests as there are places, long prompts, whole
          replies. Once as shipped and once without canaries and health; then one engine is stopped (SIGSTOP).

A reply is refused by a 503, lost if no answer came or another error, broken if it ended early, and wrong if it says
anything else. Under overload the gateway may refuse; in the other scenes nothing may go wrong.
"""

import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from synthia_vllm import __version__
from synthia_vllm.bench.chaos import many_files, quantiles, show
from synthia_vllm.bench.checked_crowd import PREFILL, RATE, Told, crowd
from synthia_vllm.bench.gateway_figures import resumes
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.null.tokenizer import write as write_tokenizer
from synthia_vllm.bench.processes import running
from synthia_vllm.bench.replica_set import ReplicaSet

Say = Callable[[str], None]

_PLACES = 4  # requests at once of each engine
_POISON = "arsenic"
_SHOWN = 5  # replies that were not right are quoted
_NEVER_S = 100_000.0
_SLACK_S = 60.0  # that the search for a stopped engine may go on
_PROMISES: dict[str, Callable[[Any], bool]] = {
    "refused, lost, broken or wrong": lambda value: value == 0,
    "lost, broken or wrong": lambda value: value == 0,
    "pause, s, p95": lambda value: value <= 2.0,
    "engines killed by it": lambda value: value <= 3,
    "innocents refused, lost, broken or wrong": lambda value: value == 0,
    "/ready was 503": lambda value: value == 0,
    "a healthy replica was out": lambda value: value == 0,
    "throughput of the same without canaries": lambda value: value >= 0.95,
    "a stopped engine was found, s": lambda value: value is not None and value <= 20.0,
}


def _engines(count: int, queue: str, *options: str, places: int = _PLACES, **set_options: Any) -> ReplicaSet:
    words = ["--tokens-per-second", str(RATE), "--prefill-tokens-per-second", str(PREFILL), "--early-headers"]
    words += ["--max-num-seqs", str(places), *(["--no-tell-max-num-seqs"] if queue == "engine" else [])]
    return ReplicaSet(count, options=[*words, *options], keep_ports=True, **set_options)


@contextmanager
def _gateways(engines: ReplicaSet, logs: Path, names: str, queue: str, *words: str) -> Iterator[list[str]]:
    """URLs of gateways that are ready, one a letter of `names`."""
    command = [sys.executable, "-m", "synthia_vllm", "gateway"]
    command += ["--tokenizer", str(write_tokenizer(logs / "tokenizer")), "--fair.gateways", str(len(names))]
    command += [word for url in engines.listing().values() for word in ("--upstream", url)]
    most = str(10**12)
    room = {"SYNTHIA_FAIR__MAX_IN_FLIGHT_TOKENS": most, "SYNTHIA_FAIR__MAX_IN_FLIGHT_REQUESTS": most}
    with ExitStack() as stack:
        urls = []
        for name in names:
            environment = {"SYNTHIA_DATA": str(logs / name), **(room if queue == "engine" else {})}
            server = stack.enter_context(
                running(f"gateway-{name}", [*command, *words], environment, logs, health="/ready")
            )
            urls.append(server.url)
        yield urls


# Scene: losses


@dataclass
class Loss:
    """One kill, and whose replies were with what was killed."""

    at: float
    name: str
    seeds: set[int]


def losses(
    say: Say, logs: Path, *, replies: int, engines: int, seconds: float, every: float, queue: str
) -> dict[str, Any]:
    with _engines(engines, queue) as replicas:
        replicas.wait()
        with _gateways(replicas, logs, "a", queue) as urls:
            found = uvloop.run(_under_losses(say, replicas, urls, replies, seconds, every))
            told = resumes(urls[0])
    options = {"engines": engines, "replies": replies, "seconds": seconds, "every": every, "queue": queue}
    return {"options": options, **found, "resumed": told}


async def _under_losses(
    say: Say, replicas: ReplicaSet, urls: list[str], replies: int, seconds: float, every: float
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    kills: list[Loss] = []
    at_once = len(replicas.up()) * _PLACES * 3 // 2
    async with crowd(urls, tokens=(60, 100), prompts=(40, 2000)) as asked:
        load = asyncio.create_task(asked.run(at_once, replies))
        await asyncio.wait((load,), timeout=every)
        began = loop.time()
        while loop.time() - began < seconds and not load.done():
            await asyncio.wait((load,), timeout=max(0.0, began + every * (len(kills) + 1) - loop.time()))
            if load.done():
                break
            kills.append(await asyncio.to_thread(_kill_one, replicas, loop.time))
            await asyncio.to_thread(replicas.wait)
            say(f"{len(kills)} kills: {asked.open} under way, {len(asked.done)} ended, {_failed(asked.done)} not right")
        await load
        return loss_figures(asked.done, kills, loop.time() - began)


def _kill_one(replicas: ReplicaSet, clock: Callable[[], float]) -> Loss:
    victim = random.choice(replicas.up())
    seeds = set(replicas.fault(victim.name)["seeds"])
    at = clock()
    replicas.kill(victim.name)
    return Loss(at, victim.name, seeds)


def loss_figures(replies: list[Told], kills: list[Loss], took: float) -> dict[str, Any]:
    pauses, held, struck = [], 0, set()
    for kill in kills:
        for told in replies:
            if told.wanted.seed not in kill.seeds or not told.began <= kill.at < told.ended:
                continue
            held += 1
            struck.add(id(told))
            if told.first is not None and told.first > kill.at:
                pauses.append(told.first - kill.at)
            elif (pause := told.gaps(kill.at)) is not None:
                pauses.append(pause)
    whole = [told for told in replies if told.whole and told.outcome == "right"]
    summary = {
        "replies": len(replies),
        "seconds": round(took, 1),
        "kills": len(kills),
        "replies whose engine was killed": held,
        "refused, lost, broken or wrong": _failed(replies),
        **_outcomes(replies),
        **_spread("pause, s", pauses),
        **_spread("whole, engine killed: s beyond its work", [told.beyond for told in whole if id(told) in struck]),
        **_spread("whole, nothing lost: s beyond its work", [told.beyond for told in whole if id(told) not in struck]),
    }
    return _report(summary, replies)


# Scene: poison


def poison(say: Say, logs: Path, *, engines: int, innocents: int, queue: str) -> dict[str, Any]:
    ways = {"at once": [], "after 20 tokens": ["--poison-after", "20"]}
    found: dict[str, Any] = {"options": {"engines": engines, "innocents": innocents, "queue": queue}}
    summary: dict[str, Any] = {}
    broken = []
    for way, words in ways.items():
        for kind in ("stream", "whole"):
            with _engines(engines, queue, "--poison", _POISON, *words, restart_s=None) as replicas:
                replicas.wait()
                with _gateways(replicas, logs, "a", queue) as urls:
                    told = uvloop.run(_poisoned(replicas, urls, innocents, kind == "whole"))
            say(f"{way}, {kind}: {told['summary']}")
            summary |= {f"{way}, {kind}: {name}": value for name, value in told["summary"].items()}
            broken += told["broken"]
    return {**found, "summary": summary, "broken": broken}


async def _poisoned(replicas: ReplicaSet, urls: list[str], innocents: int, whole: bool) -> dict[str, Any]:
    async with crowd(urls, tokens=(180, 220), prompts=(40, 400)) as asked:
        load = asyncio.create_task(asked.run(innocents, innocents))
        while asked.open < innocents and not load.done():
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)
        async with crowd(urls, tokens=(180, 220), prompts=(40, 400)) as other:
            killer = await other.ask(0 if whole else 1, _POISON)
        await load
        replicas.tend()
        dead = sum(replica.died is not None for replica in replicas.replicas)
        failed = _failed(asked.done)
        answer = killer.reason or "a reply"
        summary = {"engines killed by it": dead, "its answer": answer, "innocents": len(asked.done)}
        summary |= {
            "innocents refused, lost, broken or wrong": failed,
            **_spread("innocents, s", _latencies(asked.done)),
        }
        return _report(summary, asked.done)


# Scene: overload


@dataclass
class Watch:
    """What two gateways say of themselves, again and again."""

    ready: Counter[int] = field(default_factory=Counter)
    states: int = 0  # samples
    out: Counter[str] = field(default_factory=Counter)  # by gateway: samples in which a replica was out or doubted
    found: dict[str, float] = field(default_factory=dict)  # by gateway: when it said so first

    async def run(self, urls: list[str], session: aiohttp.ClientSession) -> None:
        async with asyncio.TaskGroup() as group:
            for url in urls:
                group.create_task(self._look_at(url, session))

    async def _look_at(self, url: str, session: aiohttp.ClientSession) -> None:
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{url}/ready", timeout=aiohttp.ClientTimeout(10)) as reply:
                    self.ready[reply.status] += 1
                states = await _states(url, session)
                self.states += 1
                if states.get("out"):
                    self.out[url] += 1
                    self.found.setdefault(url, asyncio.get_running_loop().time())
            await asyncio.sleep(0.5)


async def _states(url: str, session: aiohttp.ClientSession) -> dict[str, int]:
    """Replicas by state, as a gateway's `/metrics` tells."""
    async with session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(10)) as reply:
        lines = [line for line in (await reply.text()).splitlines() if line.startswith("synthia_replicas{")]
    families = text_string_to_metric_families("\n".join(lines) + "\n")
    return {one.labels["state"]: int(one.value) for family in families for one in family.samples}


def overload(
    say: Say, logs: Path, *, engines: int, seconds: float, times: float, prefill: float, queue: str
) -> dict[str, Any]:
    shipped: dict[str, Any] = {}
    rates: dict[str, float] = {}
    more: dict[str, Any] = {}
    for name, words in (("without canaries", ["--replicas.canary-period-s", str(_NEVER_S)]), ("as shipped", [])):
        with _engines(engines, queue, "--prefill-tokens-per-second", str(prefill), places=8) as replicas:
            replicas.wait()
            with _gateways(replicas, logs, "ab", queue, *words) as urls:
                at_once = int(times * 8 * engines)
                found = uvloop.run(_overloaded(say, replicas, urls, at_once, seconds, stop=name == "as shipped"))
        rates[name] = found.pop("rate")
        say(f"{name}: {rates[name]:.2f} replies a second")
        shipped, more = found.pop("summary"), found  # the last one's
    summary = {
        "replies a second, as shipped": round(rates["as shipped"], 2),
        "replies a second, without canaries": round(rates["without canaries"], 2),
        "throughput of the same without canaries": round(rates["as shipped"] / max(rates["without canaries"], 1e-9), 3),
        **shipped,
    }
    options = {"engines": engines, "seconds": seconds, "times": times, "prefill": prefill, "queue": queue}
    return {"options": options, "summary": summary, **more}


async def _overloaded(
    say: Say, replicas: ReplicaSet, urls: list[str], at_once: int, seconds: float, *, stop: bool
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    watch = Watch()
    async with crowd(urls, tokens=(30, 50), prompts=(3000, 5000), only_whole=True) as asked:
        load = asyncio.create_task(asked.run(at_once))
        watching = asyncio.create_task(watch.run(urls, asked.session))
        try:
            await asyncio.sleep(seconds / 4)  # until all places are taken
            began, before = loop.time(), len(asked.done)
            await asyncio.sleep(seconds)
            rate = sum(told.outcome == "right" for told in asked.done[before:]) / (loop.time() - began)
            summary = {
                "/ready, samples": watch.ready.total(),
                "/ready was 503": watch.ready[503],
                "states, samples": watch.states,
                "a healthy replica was out": watch.out.total(),
                "replies": len(asked.done),
                "lost, broken or wrong": sum(told.outcome not in ("right", "refused") for told in asked.done),
                **_outcomes(asked.done),
                **_spread("reply, s", _latencies(asked.done)),
            }
            found = {"rate": rate, **_report(summary, asked.done)}
            if stop:
                found["summary"] |= await _stopped(say, replicas, watch, len(urls))
            return found
        finally:
            for task in (load, watching):
                task.cancel()
            await asyncio.gather(load, watching, return_exceptions=True)


async def _stopped(say: Say, replicas: ReplicaSet, watch: Watch, gateways: int) -> dict[str, Any]:
    """How long until all gateways have found a stopped engine."""
    loop = asyncio.get_running_loop()
    victim = replicas.up()[0].name
    watch.found.clear()
    replicas.stop(victim)
    stopped = loop.time()
    try:
        while len(watch.found) < gateways and loop.time() - stopped < _SLACK_S:
            await asyncio.sleep(0.1)
    finally:
        replicas.go_on(victim)
    say(f"stopped engine: found by {len(watch.found)} of {gateways} gateways")
    all_found = len(watch.found) == gateways
    return {"a stopped engine was found, s": round(max(watch.found.values()) - stopped, 1) if all_found else None}


# Figures


def _failed(replies: list[Told]) -> int:
    return sum(told.outcome != "right" for told in replies)


def _latencies(replies: list[Told]) -> list[float]:
    return [told.ended - told.began for told in replies if told.outcome == "right"]


def _outcomes(replies: list[Told]) -> dict[str, int]:
    counts = Counter(told.outcome for told in replies)
    return {name: counts[name] for name in ("refused", "lost", "broken", "wrong")}


def _spread(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}, {which}": round(value, 2) for which, value in quantiles(values).items()}


def _report(summary: dict[str, Any], replies: list[Told]) -> dict[str, Any]:
    wrong = [told for told in replies if told.outcome != "right"]
    kinds = Counter((told.outcome, "whole" if told.whole else "stream", told.reason) for told in wrong)
    return {
        "summary": summary,
        "reasons": [[*kind, count] for kind, count in kinds.most_common()],
        "broken": [{"reason": f"{told.outcome}: {told.reason}", "bytes": told.offending} for told in wrong[:_SHOWN]],
    }


def missed(summary: dict[str, Any]) -> list[str]:
    """The figures that are not what is promised."""
    return [
        f"{name}: {value}"
        for name, value in summary.items()
        if (promise := _PROMISES.get(name.rpartition(": ")[2])) is not None and not promise(value)
    ]


# The command

SCENES: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "losses": (losses, ("replies", "seconds", "every")),
    "poison": (poison, ("innocents",)),
    "overload": (overload, ("times", "prefill")),
}
_HELP = "\n\n".join(f"\b\n{part}" for part in (__doc__ or "").split("\n\n"))  # its lines stay as they are
_ENGINES = {"losses": 16, "poison": 20, "overload": 3}


@click.command(help=_HELP, context_settings={"max_content_width": 120})
@click.option(
    "--scene", "scenes", multiple=True, type=click.Choice(list(SCENES)), help="Again for more (default: all)."
)
@click.option("--engines", type=int, help="In place of 16 (losses), 20 (poison), 3 (overload).")
@click.option("--replies", default=2000, show_default=True, help="losses: in all; 3 for 2 places at once.")
@click.option("--seconds", default=120.0, show_default=True, help="losses: how long engines are killed.")
@click.option("--every", default=5.0, show_default=True, help="losses: seconds between two kills.")
@click.option("--innocents", default=60, show_default=True, help="poison: replies under way.")
@click.option("--overload-seconds", default=60.0, show_default=True, help="overload: of each measurement.")
@click.option("--times", default=4.0, show_default=True, help="overload: requests at once, over the places there are.")
@click.option("--prefill", default=PREFILL, show_default=True, help="overload: prompt tokens a second of each engine.")
@click.option(
    "--queue",
    type=click.Choice(["gateway", "engine"]),
    default="gateway",
    show_default=True,
    help="Where requests wait: as shipped, or in the engines alone, as where nobody knows how many they run at once.",
)
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Keep the gateways' logs here.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "crowds.json",
    show_default="benchmarks/results/crowds.json",
)
def main(
    scenes: tuple[str, ...],
    engines: int | None,
    overload_seconds: float,
    queue: str,
    logs: Path | None,
    output: Path,
    **options: Any,
) -> None:
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    many_files()

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False)

    report = json.loads(output.read_text()) if output.exists() else {}
    report |= {"machine": machine(), "version": __version__}
    failed = []
    for name in scenes or SCENES:
        scene, own = SCENES[name]
        given = {option: options[option] for option in own} | {"engines": engines or _ENGINES[name], "queue": queue}
        if name == "overload":
            given["seconds"] = overload_seconds
        with tempfile.TemporaryDirectory() as folder:
            place = (logs or Path(folder)) / name
            place.mkdir(parents=True, exist_ok=True)
            found = scene(say, place, **given)
        found["missed"] = missed(found["summary"])
        failed += found["missed"]
        report["scenarios"] = report.get("scenarios", {}) | {name: found}
        output.write_text(json.dumps(report, indent=1) + "\n")
        show(name, found, console)
    for one in failed:
        console.print(f"missed: {one}", highlight=False, markup=False)
    console.print(f"written to {output}", highlight=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
