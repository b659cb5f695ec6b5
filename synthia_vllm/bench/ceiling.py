"""`synthia-vllm bench ceiling`: what our layers cost with no inference in the way, over a stand-in engine.

bare      the null engine under uvicorn (uvloop, httptools), asked for chats
engine    the same, asked for what a gateway asks it: /inference/v1/generate
stack     the null engine's port behind all layers, in one process: keys, limits, fair queue, ledger, metrics, log
gateway   `synthia-vllm gateway`, with the same layers, in front of a null engine in another process

The server has one core; the client, and the engine that the gateway asks, the other. All run side by side, each round
loads them in turn. Where the gateway waits for the other core, its processor time a token tells what it could do.
"""

import os
import resource
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.table import Table

from synthia_vllm import __version__
from synthia_vllm.bench.keys import make_key
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.null.tokenizer import write
from synthia_vllm.bench.processes import RunningServer, running
from synthia_vllm.bench.records import attach, default_path
from synthia_vllm.bench.streams import (
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


@click.command("ceiling")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@click.option("--seconds", default=3.0, show_default=True, help="Of full load, each.")
@click.option(
    "--streams",
    type=click.IntRange(1),
    default=OPEN_STREAMS,
    show_default=True,
    help="Open at once, for the memory of one.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A run's file to add it to (default: a new one)."
)
def command(rounds: int, seconds: float, streams: int, output: Path | None) -> None:
    """Chunks a second, open streams, memory a stream and added latency, around a null engine.

    The null engine is a stand-in that sends vLLM's chunks as fast as it can; it is measured bare, behind all our
    layers in one process, and behind `synthia-vllm gateway` in another. One core is the server's, one the client's.
    """
    console = Console(stderr=True, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = measured(rounds, seconds, streams, lambda text: console.print(text, highlight=False))
    show(report, Console())
    path = output or default_path("ceiling")
    attach(path, "ceiling", report, {"rounds": rounds, "seconds": seconds, "streams": streams})
    console.print(f"written: {path}", highlight=False)


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
    key = {"authorization": f"Bearer {make_key('bench', data=folder)}"}
    chatting, short, waiting = (chat("null", tokens, headers=key) for tokens in (TOKENS, 2, 1000))
    generating = {"token_ids": [1, 40, 50], "sampling_params": {"max_tokens": TOKENS}, "stream": True}
    asking = post(GENERATE, {**generating, "stream_options": {"include_usage": True}}, {})
    with ExitStack() as stack:

        def start(name: str, where: int, *words: str) -> RunningServer:
            say(f"starting {name}")
            return stack.enter_context(server(name, where, words, folder))

        bare = start("bare", _SERVER_CORE, "synthia_vllm.bench.null.engine")
        behind = start("stack", _SERVER_CORE, "synthia_vllm.bench.stack")
        far = start("far", _CLIENT_CORE, "synthia_vllm.bench.null.engine")
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
        for name, module in (("bare", "synthia_vllm.bench.null.engine"), ("stack", "synthia_vllm.bench.stack")):
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
