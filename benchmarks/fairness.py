"""What fair sharing gives a light user beside a heavy one, on the real engine, against first come, first served.

    python -m benchmarks.fairness [--rounds 3] [--step-tokens 48] [--output benchmarks/results/fairness.json]

Servers run side by side and are loaded in turn, one with `--fair.policy vtc`, one with `fcfs`, and one with vtc for
each `--step-tokens`, vLLM's `--max-num-batched-tokens`: a step that computes fewer prompts is over sooner, but prompts
wait for one another then. Else they are alike.

alone     the light user sends one request at a time
beside    the same while the heavy user always has 100 requests with the server
weights   two users with weights 3 and 1, both with 64 requests at all times: what each gets
"""

import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
from rich.console import Console
from rich.table import Table

from benchmarks.serving import running
from synthia_vllm import __version__
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.machine import machine

HEAVY_REQUESTS = 100
HEAVY_INPUT, HEAVY_OUTPUT = 32, 64  # tokens
LIGHT_OUTPUT = 16
LIGHT_REQUESTS = 20
FCFS_REQUESTS = 3  # beside the heavy user, where each waits for the whole queue
WEIGHTS_SECONDS = 20.0


@dataclass
class Tally:
    """What one user saw: seconds to the first token of each request, and tokens (prompt and generated) with times."""

    first_token: list[float] = field(default_factory=list)
    tokens: int = 0


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@click.option("--max-num-seqs", default=32, show_default=True, help="Requests that the engine runs at once.")
@click.option("--step-tokens", multiple=True, type=click.IntRange(1), help="Of one step; again for more servers.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "fairness.json",
    show_default="benchmarks/results/fairness.json",
)
def main(rounds: int, max_num_seqs: int, step_tokens: tuple[int, ...], output: Path) -> None:
    """Measure a light user beside a heavy one, and service by weight."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options: dict[str, tuple[str, ...]] = {"vtc": (), "fcfs": ()}
    options |= {f"vtc, {most} tokens a step": ("--max-num-batched-tokens", str(most)) for most in step_tokens}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = {"SYNTHIA_DATA": str(folder)}
        keys = {
            "light": make_key("light", data=folder),
            "heavy": make_key("heavy", data=folder),
            "three": make_key("three", "--weight", "3", data=folder),
            "one": make_key("one", data=folder),
        }
        urls = {}
        for name, more in options.items():
            console.print(f"starting {name}", highlight=False)
            command = [sys.executable, "-m", "synthia_vllm", "serve", "--log-file", "-", "--access.mode", "keys"]
            command += ["--engine.max-model-len", "2048", "--engine.kv-cache-gib", "1"]
            command += ["--fair.max-wait-s", "600", "--fair.policy", name.partition(",")[0]]
            tail = ["--", "--max-num-seqs", str(max_num_seqs), *more]
            urls[name] = stack.enter_context(running(name, command, environment, folder, tail))
        results: dict[str, dict[str, list[Any]]] = {name: {} for name in options}
        for number in range(-1, rounds):
            for name in options if number % 2 else reversed(options):
                beside = 2 if number < 0 else FCFS_REQUESTS if name == "fcfs" else LIGHT_REQUESTS
                figures = asyncio.run(measure(urls[name], keys, beside, warm_up=number < 0))
                if number >= 0:
                    for figure, value in figures.items():
                        results[name].setdefault(figure, []).append(value)
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
    report = {"machine": machine(), "version": __version__, "rounds": rounds, "max_num_seqs": max_num_seqs}
    report |= {"results": results, "summary": summary(results)}
    output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(report))
    console.print(f"written to {output}", highlight=False)


async def measure(url: str, keys: dict[str, str], requests_beside: int, *, warm_up: bool) -> dict[str, Any]:
    """One round on one server."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        figures: dict[str, Any] = {}
        requests = 2 if warm_up else LIGHT_REQUESTS
        for shape, length in (("short", 32), ("long", 512)):
            alone = Tally()
            await one_at_a_time(session, keys["light"], alone, requests, length)
            beside, heavy = Tally(), Tally()
            async with background(session, keys["heavy"], heavy, HEAVY_REQUESTS, warm_up=warm_up):
                began, before = time.perf_counter(), heavy.tokens
                await one_at_a_time(session, keys["light"], beside, requests_beside, length)
                rate = (heavy.tokens - before + beside.tokens) / (time.perf_counter() - began)
            figures |= {f"{shape} alone": alone.first_token, f"{shape} beside": beside.first_token}
            figures[f"{shape} tokens/s"] = rate
        three, one = Tally(), Tally()
        seconds = 2.0 if warm_up else WEIGHTS_SECONDS
        async with background(session, keys["three"], three, 64), background(session, keys["one"], one, 64):
            start = three.tokens, one.tokens
            await asyncio.sleep(seconds)
            figures["weights 3:1"] = (three.tokens - start[0]) / max(1, one.tokens - start[1])
        return figures


async def one_at_a_time(session: aiohttp.ClientSession, key: str, tally: Tally, count: int, length: int) -> None:
    for number in range(count):
        await request(session, key, tally, length, number, LIGHT_OUTPUT)


class background:
    """A user who always has `count` requests with the server; entered when the first tokens have come."""

    def __init__(
        self, session: aiohttp.ClientSession, key: str, tally: Tally, count: int, *, warm_up: bool = False
    ) -> None:
        self._args = session, key, tally
        self._count = 4 if warm_up else count
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> None:
        self._tasks = [asyncio.create_task(self._keep_asking(number)) for number in range(self._count)]
        while len(self._args[2].first_token) < min(self._count, 40):  # the engine is full
            await asyncio.sleep(0.05)

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(2.0)  # the engine lets go of what was cut

    async def _keep_asking(self, number: int) -> None:
        session, key, tally = self._args
        while True:
            await request(session, key, tally, HEAVY_INPUT, number, HEAVY_OUTPUT)


async def request(
    session: aiohttp.ClientSession, key: str, tally: Tally, input_tokens: int, number: int, length: int
) -> None:
    """One streamed completion. Raises where it is not answered with 200."""
    body = {
        "model": "synthia",
        "prompt": prompt(input_tokens, number),
        "max_tokens": length,
        "ignore_eos": True,
        "stream": True,
    }
    began = time.perf_counter()
    first = True
    async with session.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}) as reply:
        if reply.status != 200:
            raise click.ClickException(f"{reply.status}: {await reply.text()}")
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            if first:
                first = False
                tally.first_token.append(time.perf_counter() - began)
                tally.tokens += input_tokens
            tally.tokens += 1  # one token a chunk; both policies are counted alike


def prompt(tokens: int, number: int) -> str:
    """About so many tokens, another text each time so that no prefix is found in the cache."""
    return f"{time.monotonic_ns()} {number} " + " ".join("orca" for _ in range(max(1, (tokens - 16) // 2)))


def summary(results: dict[str, dict[str, list[Any]]]) -> dict[str, float]:
    """Medians over rounds."""
    found = {}
    for shape in ("short", "long"):
        for policy, figures in results.items():
            ratios = [
                p95(beside) / p95(alone)
                for alone, beside in zip(figures[f"{shape} alone"], figures[f"{shape} beside"], strict=True)
            ]
            found[f"light user, {shape} prompts: p95 TTFT beside / alone, {policy}"] = statistics.median(ratios)
        rates = {policy: figures[f"{shape} tokens/s"] for policy, figures in results.items()}
        for policy in results:
            beside = "fcfs" if policy == "vtc" else "vtc"
            if policy != "fcfs":
                ratios = [a / b for a, b in zip(rates[policy], rates[beside], strict=True)]
                found[f"{shape} prompts: total tokens/s, {policy} / {beside}"] = statistics.median(ratios)
    for policy in results:
        found[f"service of weight 3 / weight 1, {policy}"] = statistics.median(results[policy]["weights 3:1"])
    return {name: round(value, 3) for name, value in found.items()}


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def table(report: dict[str, Any]) -> Table:
    shown = Table("figure", "median of rounds")
    for name, value in report["summary"].items():
        shown.add_row(name, str(value))
    return shown


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    rows = (f"| {name} | {value} |\n" for name, value in report["summary"].items())
    return "| figure | median of rounds |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
