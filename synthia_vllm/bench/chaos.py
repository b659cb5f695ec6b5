"""`synthia-vllm bench chaos`: replicas are killed under load, and every byte of every stream is checked.

null   `synthia-vllm gateway` in front of null engines (a stand-in: real processes, no model). So many streams are
       always open; every 5 s one of the engines is killed with -9 and comes back a second later.
demo   a gateway or cluster that runs already, on real engines (--url): 16 greedy streams of 150 tokens, one engine
       process killed at a random moment, so many rounds; texts are compared with those of a run without a kill.

A stream is broken if any token is missing, doubled or wrong, or its id, finish_reason, usage or end is. The pause is
the gap between two chunks that spans the kill, of as many streams, the longest, as the killed engine had.
"""

import asyncio
import os
import random
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from synthia_vllm.bench.chaos_demo import run_demo
from synthia_vllm.bench.checked_stream import CHAT, COMPLETIONS, CheckedStream, numbered, open_stream
from synthia_vllm.bench.gateway_figures import resumes
from synthia_vllm.bench.null.tokenizer import write as write_tokenizer
from synthia_vllm.bench.records import attach, default_path
from synthia_vllm.bench.replica_set import ReplicaSet
from synthia_vllm.bench.streams import wait_for
from synthia_vllm.free_ports import free_port

TOKENS = (40, 120)  # of a stream, drawn
_OPENED_PER_S = 200
_LAST_S = 60.0  # beyond three times its length, for what should end
_SHOWN = 20  # broken streams that the report quotes
_PROGRESS_S = 5.0
_STATUS = f"{shlex.quote(sys.executable)} -m synthia_vllm cluster status --json"


@dataclass
class Kill:
    """One `kill -9`. `held` streams ran on what was killed, by its own count."""

    at: float
    name: str
    held: int


@dataclass
class Load:
    """So many streams, always: one that ends is followed by another until `stop`."""

    url: str
    streams: int
    finished: list[CheckedStream] = field(default_factory=list)
    open: set[CheckedStream] = field(default_factory=set)
    stopped: bool = False

    async def run(self) -> None:
        """Until all have ended after `stop`."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.streams):
                group.create_task(self._keep_open(number))

    async def _keep_open(self, number: int) -> None:
        await asyncio.sleep(number / _OPENED_PER_S)
        turn = 0
        while not self.stopped:
            path = CHAT if (number + turn) % 2 else COMPLETIONS
            tokens = random.randint(*TOKENS)
            ids = (number + turn) % 4 == 0
            prompt = f"Stream {number}, turn {turn}: what is an orca?"
            wanted = numbered(path, prompt, tokens, ignore_eos=True, return_token_ids=ids)
            stream = await open_stream(self.url, wanted)
            self.open.add(stream)
            try:
                await stream.ended
            finally:
                self.open.discard(stream)
                if stream.transport is not None:
                    stream.transport.abort()
            self.finished.append(stream)
            turn += 1


@click.command("chaos")
@click.option("--url", help="A gateway or cluster that runs, on real engines (default: null engines of our own).")
@click.option("--key", help="--url: a key for it.")
@click.option("--pids", help="--url: a command that prints the engines' pids (default: asks `cluster status`).")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="--url: kills.")
@click.option("--tokens", type=click.IntRange(1), default=150, show_default=True, help="--url: of each stream.")
@click.option("--streams", type=click.IntRange(1), help="Open at once (default: 500, --url 16).")
@click.option("--replicas", type=click.IntRange(1), default=8, show_default=True, help="Null engines.")
@click.option("--seconds", default=30.0, show_default=True, help="How long null engines are killed.")
@click.option("--every", default=5.0, show_default=True, help="Seconds between two kills of null engines.")
@click.option("--tokens-per-second", default=5.0, show_default=True, help="Of each null stream.")
@click.option("--resume/--no-resume", default=True, help="What the gateway before the null engines does about it.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A run's file to add it to (default: a new one)."
)
def command(output: Path | None, **options: Any) -> None:
    """Kill replicas with `kill -9` under load and check every token that clients get. Exit code 1 if a stream broke.

    Null engines are stand-ins without a model whose every token is known. With --url the engines are real: greedy
    streams, whose texts are compared with those of a run without a kill.
    """
    console = Console(stderr=True, soft_wrap=True)
    name, found = measured(options, lambda text: console.print(text, highlight=False))
    show(name, found, Console())
    path = output or default_path("chaos")
    told = {name: value for name, value in options.items() if name != "key"}
    attach(path, "chaos", {"scenarios": {name: found}}, told)
    console.print(f"written: {path}", highlight=False)
    sys.exit(1 if found["summary"]["broken streams"] else 0)


def measured(options: Mapping[str, Any], say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """The scenario that the command's options ask for: its name, and what it came to."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    many_files()
    if options["url"]:
        return "demo", demo(options["streams"] or 16, say, **{name: options[name] for name in _DEMO_OPTIONS})
    found = null(options["streams"] or 500, say, **{name: options[name] for name in _NULL_OPTIONS})
    return ("null" if options["resume"] else "null, without resume"), found


def many_files() -> None:
    """As many open files as this process may have: each stream is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def show(name: str, found: dict[str, Any], console: Console) -> None:
    shown = Table("figure", name)
    for figure, value in found["summary"].items():
        shown.add_row(figure, str(value))
    console.print(shown)
    for broken in found["broken"]:
        console.print(f"broken: {broken['reason']}: {broken['bytes']}", highlight=False, markup=False)


_NULL_OPTIONS = ("replicas", "seconds", "every", "tokens_per_second", "resume")
_DEMO_OPTIONS = ("url", "key", "pids", "rounds", "tokens")


def demo(streams: int, say: Callable[[str], None], *, pids: str | None, **options: Any) -> dict[str, Any]:
    """The whole scenario on engines that run; without `pids` the cluster tells which they are."""
    found: dict[str, Any] = uvloop.run(run_demo(streams, say, pids=pids or _STATUS, **options))
    return found


def null(
    streams: int,
    say: Callable[[str], None],
    *,
    replicas: int,
    seconds: float,
    every: float,
    tokens_per_second: float,
    resume: bool,
) -> dict[str, Any]:
    """The whole scenario, with its processes."""
    with ExitStack() as stack:
        paced = ["--tokens-per-second", str(tokens_per_second)]
        # The gateway is told of its upstreams once: they come back where they were.
        engines = stack.enter_context(ReplicaSet(replicas, options=paced, keep_ports=True))
        engines.wait()
        data = stack.enter_context(tempfile.TemporaryDirectory())
        port = free_port()
        words = ["--port", str(port), "--tokenizer", str(write_tokenizer(Path(data, "tokenizer")))]
        words += [word for url in engines.listing().values() for word in ("--upstream", url)]
        words += [] if resume else ["--no-resume"]
        gateway = stack.enter_context(_gateway(words, data))
        wait_for(port)
        say(f"{replicas} engines of {statistics.mean(engines.memory_mib()):.0f} MiB each, {streams} streams")
        url = f"http://127.0.0.1:{port}"
        load = Load(url, streams)
        before, began = _cpu_s(gateway), time.monotonic()
        kills = uvloop.run(_kill_under(load, engines, seconds, every, tokens_per_second, say))
        share = round((_cpu_s(gateway) - before) / (time.monotonic() - began), 2)
        wrong = sum(len(engines.fault(name)["wrong_resumes"]) for name in engines.listing())
        told = resumes(url)
    options = {"replicas": replicas, "streams": streams, "seconds": seconds, "every": every, "resume": resume}
    options["tokens_per_second"] = tokens_per_second
    return figures(load.finished, kills, options, resumed=told, refused_seams=wrong, gateway_cores=share)


async def _kill_under(
    load: Load, engines: ReplicaSet, seconds: float, every: float, tokens_per_second: float, say: Callable[[str], None]
) -> list[Kill]:
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(load.run())
    kills: list[Kill] = []
    try:
        while len(load.open) < load.streams * 0.99 and not running.done():
            await asyncio.sleep(0.2)
        await asyncio.sleep(2 * every)
        began = loop.time()
        said = began
        while loop.time() - began < seconds and not running.done():
            await asyncio.sleep(max(0.0, began + every * (len(kills) + 1) - loop.time()))
            kills.append(await asyncio.to_thread(_kill_one, engines, loop))
            if loop.time() - said >= _PROGRESS_S:
                said = loop.time()
                say(_progress(load, kills))
            await asyncio.to_thread(_restarted, engines)
        load.stopped = True
        say(f"no more kills: {len(load.open)} streams go to their ends")
        await asyncio.wait((running,), timeout=_LAST_S + 3 * TOKENS[1] / tokens_per_second)
        for stream in list(load.open):
            stream.fail("it did not end")
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return kills


def _kill_one(engines: ReplicaSet, loop: asyncio.AbstractEventLoop) -> Kill:
    victim = random.choice(engines.up())
    held = engines.fault(victim.name)["running"]
    at = loop.time()
    engines.kill(victim.name)
    return Kill(at, victim.name, held)


def _restarted(engines: ReplicaSet) -> None:
    """Until what was killed listens again, or is on its way: at most a few seconds."""
    with suppress(TimeoutError):
        engines.wait()


def _progress(load: Load, kills: list[Kill]) -> str:
    broken = sum(stream.broken is not None for stream in load.finished)
    return f"{len(kills)} kills: {len(load.open)} streams open, {len(load.finished)} ended, {broken} of them broken"


def _cpu_s(process: "subprocess.Popen[bytes]") -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


class _gateway:
    """`synthia-vllm gateway`, with a database of its own; ended at the end."""

    def __init__(self, words: list[str], data: str) -> None:
        # Nothing is to queue: what is tried is not the room.
        room = {"SYNTHIA_FAIR__MAX_IN_FLIGHT_TOKENS": str(10**12), "SYNTHIA_LOG__REQUESTS": "false"}
        self._words, self._environment = words, {**os.environ, "SYNTHIA_DATA": data, **room}
        self._log = Path(data, "gateway.log")

    def __enter__(self) -> "subprocess.Popen[bytes]":
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "synthia_vllm", "gateway", *self._words],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def figures(streams: list[CheckedStream], kills: list[Kill], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the report keeps of a scenario."""
    broken = [stream for stream in streams if stream.broken is not None]
    pauses: list[float] = []
    others: list[float] = []
    for number, kill in enumerate(kills, start=1):
        between = (kill.at + kills[number].at) / 2 if number < len(kills) else kill.at - options.get("every", 0) / 2
        others += (pause for stream in streams if (pause := stream.pause_at(between)) is not None)
        spanning = sorted(pause for stream in streams if (pause := stream.pause_at(kill.at)) is not None)
        pauses += spanning[len(spanning) - min(kill.held, len(spanning)) :]
    summary: dict[str, Any] = {
        "streams": len(streams),
        "tokens": sum(stream.tokens for stream in streams),
        "kills": len(kills),
        "streams whose replica was killed": sum(kill.held for kill in kills),
        "broken streams": len(broken),
    }
    if pauses:
        summary |= {f"pause at a kill, s, {name}": round(value, 3) for name, value in quantiles(pauses).items()}
    if others:
        summary["gap between chunks halfway between two kills, s, p95"] = round(quantiles(others)["p95"], 3)
    return {
        "options": options,
        "summary": summary,
        "reasons": Counter(stream.broken for stream in broken).most_common(),
        "broken": [
            {"reason": stream.broken, "bytes": stream.offending.decode(errors="replace")} for stream in broken[:_SHOWN]
        ],
        "kills": [[kill.name, kill.held] for kill in kills],
        **more,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return {"p50": values[0], "p95": values[0], "max": values[0]}
    twentieths = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": statistics.median(values), "p95": twentieths[-1], "max": max(values)}
