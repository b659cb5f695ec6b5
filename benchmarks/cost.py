"""What our layers cost, with no inference in the way: the full stack over a stand-in engine, against that alone.

    python -m benchmarks.cost [--rounds 5] [--output benchmarks/results/cost.json]

bare      the null engine under uvicorn (uvloop, httptools), asked for chats
engine    the same, asked for what a gateway asks it: /inference/v1/generate
stack     the null engine's port behind all layers, in one process: keys, limits, fair queue, ledger, metrics, log
gateway   `synthia-vllm gateway`, with the same layers, in front of a null engine in another process

The server has one core; the client, and the engine that the gateway asks, the other. All run side by side, each round
loads them in turn. Where the gateway waits for the other core, its processor time a token tells what it could do.
"""

import json
import os
import resource
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.fairness import make_key
from benchmarks.load.processes import RunningServer, running
from benchmarks.null_tokenizer import write
from benchmarks.serving import machine
from benchmarks.streams import (
    GENERATE,
    chat,
    first_tokens,
    for_seconds,
    load,
    memory_a_stream,
    port_of,
    post,
    processor_seconds,
)
from synthia_vllm import __version__

STREAMS, TOKENS = 32, 4000
OPEN_STREAMS = 5000
TTFT_REQUESTS = 200
RATES, COST, TTFT, MEMORY = "tokens a second", "processor, µs a token", "median TTFT, ms", "KB a stream"
_SERVER_CORE, _CLIENT_CORE = 0, 1
# All layers have something to do, and none says no.
_FULL = {
    "SYNTHIA_ACCESS__MODE": "keys",
    "SYNTHIA_LIMITS__REQUESTS_PER_MINUTE": str(10**9),
    "SYNTHIA_LIMITS__TOKENS_PER_MINUTE": str(10**12),
    "SYNTHIA_LIMITS__TOKENS_PER_MONTH": str(10**15),
    "SYNTHIA_LIMITS__CONCURRENT_REQUESTS": str(10**6),
    "SYNTHIA_FAIR__MAX_IN_FLIGHT_TOKENS": str(10**12),
}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option("--seconds", default=3.0, show_default=True, help="Of full load, each.")
@click.option("--streams", default=OPEN_STREAMS, show_default=True, help="Open at once for the memory's figure.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "cost.json",
    show_default="benchmarks/results/cost.json",
)
def main(rounds: int, seconds: float, streams: int, output: Path) -> None:
    """Measure tokens a second, time to first token and memory a stream, with and without our layers."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = measured(rounds, seconds, streams, lambda text: console.print(text, highlight=False))
    output.write_text(json.dumps(report, indent=1) + "\n")
    show(report, console)
    console.print(f"written to {output}", highlight=False)


def measured(rounds: int, seconds: float, streams: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole measurement, with its servers. Leaves this process on one core while it lasts."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cores, where = os.sched_getaffinity(0), machine()
    os.sched_setaffinity(0, {core(_CLIENT_CORE)})
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = _measured(rounds, seconds, streams, Path(folder), say)
    finally:
        os.sched_setaffinity(0, cores)
    report: dict[str, Any] = {"machine": where, "version": __version__, "rounds": rounds, "open_streams": streams}
    return report | {"results": results, "summary": summary(results)}


def _measured(
    rounds: int, seconds: float, streams: int, folder: Path, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    results: dict[str, dict[str, list[float]]] = {RATES: {}, COST: {}, TTFT: {}, MEMORY: {}}
    key = {"authorization": f"Bearer {make_key('bench', {'SYNTHIA_DATA': str(folder)})}"}
    chatting, short, waiting = (chat("null", tokens, headers=key) for tokens in (TOKENS, 2, 1000))
    generating = {"token_ids": [1, 40, 50], "sampling_params": {"max_tokens": TOKENS}, "stream": True}
    asking = post(GENERATE, {**generating, "stream_options": {"include_usage": True}}, {})
    with ExitStack() as stack:

        def start(name: str, where: int, *words: str) -> RunningServer:
            say(f"starting {name}")
            return stack.enter_context(server(name, where, words, folder))

        bare = start("bare", _SERVER_CORE, "benchmarks.null_engine")
        behind = start("stack", _SERVER_CORE, "benchmarks.stack")
        far = start("far", _CLIENT_CORE, "benchmarks.null_engine")
        tokenizer = str(write(folder / "tokenizer"))
        words = ("synthia_vllm", "gateway", "--tokenizer", tokenizer, "--upstream", far.url)
        gateway = start("gateway", _SERVER_CORE, *words)
        loads = {"bare": (bare, chatting), "engine": (bare, asking)}
        loads |= {"stack": (behind, chatting), "gateway": (gateway, chatting)}
        for number in range(-1, rounds):  # round -1 warms up and is not counted
            for name, (one, request) in loads.items():
                before = processor_seconds(one.pid)
                clients = [for_seconds(seconds if number >= 0 else 0.1, request) for _ in range(STREAMS)]
                found = uvloop.run(load(port_of(one.url), clients))
                if number >= 0:
                    results[RATES].setdefault(name, []).append(found.tokens / found.seconds)
                    used = processor_seconds(one.pid) - before
                    results[COST].setdefault(name, []).append(1e6 * used / found.tokens)
            ports = {"bare": port_of(bare.url), "stack": port_of(behind.url)}
            for name, times in uvloop.run(first_tokens(ports, lambda: short, TTFT_REQUESTS)).items():
                if number >= 0:
                    results[TTFT].setdefault(name, []).append(1000 * statistics.median(times))
            say(f"round {number + 1} of {rounds} done")
        for name, module in (("bare", "benchmarks.null_engine"), ("stack", "benchmarks.stack")):
            slow = start(f"slow {name}", _SERVER_CORE, module, "--tokens-per-second", "0.2")
            results[MEMORY][name] = [uvloop.run(memory_a_stream(slow.pid, port_of(slow.url), waiting, streams))]
    return results


@contextmanager
def server(name: str, where: int, words: tuple[str, ...], folder: Path) -> Iterator[RunningServer]:
    """A module run on one core, with all layers that it has at work; stopped at the end."""
    command = ["taskset", "-c", str(core(where)), sys.executable, "-m", *words]
    with running(name, command, _FULL, folder) as one:
        yield one


def core(number: int) -> int:
    return number % (os.cpu_count() or 1)


def show(report: dict[str, Any], console: Console) -> None:
    shown = Table("figure", "median of rounds")
    for figure, value in report["summary"].items():
        shown.add_row(figure, str(value))
    console.print(shown)


def summary(results: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
    rates, waits = results[RATES], results[TTFT]
    pairs = [a / b for a, b in zip(rates["stack"], rates["bare"], strict=True)]
    added = [a - b for a, b in zip(waits["stack"], waits["bare"], strict=True)]
    found: dict[str, float] = {f"{name}: {RATES}": round(statistics.median(values)) for name, values in rates.items()}
    found |= {f"{name}: {COST}": round(statistics.median(values), 2) for name, values in results[COST].items()}
    found |= {"stack / bare": round(statistics.median(pairs), 3)}
    found |= {"added to the median TTFT, ms": round(statistics.median(added), 3)}
    return found | {f"{name}: {MEMORY}": round(values[0], 1) for name, values in results[MEMORY].items()}


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    rows = (f"| {name} | {value} |\n" for name, value in report["summary"].items())
    return "| figure | median of rounds |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
