"""What a streamed token costs a gateway between client and engine: ours and smg (Rust).

    pip install --target FOLDER smg==1.13.0
    python -m benchmarks.gateways --smg FOLDER [--rounds 3] [--output benchmarks/results/gateways.json]

engine   one null engine, at a pace as a real one has it, asked without a gateway: what is there without one
ours     `synthia-vllm gateway`, open mode, log on
smg      `smg launch --backend openai --policy round_robin`: no keys, limits or bill

All run all the time, and each round loads them one after the other; ratios are taken within a round. The processor time
is that of a gateway's processes, over the tokens that came through it.
"""

import importlib.util
import os
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import click
import uvloop
from rich.console import Console

from synthia_vllm.bench import rounds as interleaved
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.null.tokenizer import write
from synthia_vllm.bench.processes import RunningServer, running
from synthia_vllm.bench.streams import chat, load, port_of, processor_seconds
from synthia_vllm.free_ports import free_port

COST, TTFT, LATE, MEMORY = "processor, µs a token", "TTFT p50, ms", "TTFT p99, ms", "memory, MB"
PAIRS = (("ours", "smg"),)


@click.command()
@click.option("--smg", type=click.Path(exists=True, file_okay=False), help="Folder in which smg is installed.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@click.option("--streams", type=click.IntRange(1), default=150, show_default=True, help="At once.")
@click.option("--rate", type=float, default=20.0, show_default=True, help="Tokens a second of each.")
@click.option("--tokens", type=click.IntRange(1), default=300, show_default=True, help="Of each stream.")
@click.option("--spread", type=float, default=3.0, show_default=True, help="Seconds over which they begin.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "gateways.json",
    show_default="benchmarks/results/gateways.json",
)
def main(smg: str | None, rounds: int, streams: int, rate: float, tokens: int, spread: float, output: Path) -> None:
    """Measure gateways before one paced null engine."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where = machine()
    results: interleaved.Results = {}
    if smg is None and importlib.util.find_spec("smg") is None:
        console.print("left out: smg is not installed; name its folder with --smg", style="yellow", highlight=False)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="synthia-bench-")))
        null = [sys.executable, "-m", "synthia_vllm.bench.null.engine", "--tokens-per-second", str(rate)]
        engine = stack.enter_context(running("engine", null, {}, folder))
        servers = {"engine": engine}
        for name, (command, environment) in commands(engine.url, folder, smg).items():
            console.print(f"starting {name}", highlight=False)
            servers[name] = stack.enter_context(running(name, command, environment, folder))
        for number in range(-1, rounds):  # round -1 warms up and is not counted
            for name in interleaved.in_turn(list(servers), number):
                length = tokens if number >= 0 else max(1, tokens // 10)
                found = uvloop.run(paced(servers[name], streams, length, spread))
                if number >= 0:
                    for figure, value in found.items():
                        interleaved.add(results, figure, name, value)
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
    told = {"rounds": rounds, "streams": streams, "rate": rate, "tokens": tokens, "spread_s": spread}
    interleaved.write(interleaved.report(where, results, PAIRS, **told), output, console)


def commands(url: str, folder: Path, smg: str | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command line and environment of each gateway, without its port; smg only where it is installed."""
    ours = [sys.executable, "-m", "synthia_vllm", "gateway", "--tokenizer", str(write(folder / "tokenizer"))]
    ours += ["--upstream", url]
    found = {"ours": (ours, {"SYNTHIA_DATA": str(folder / "ours")})}
    if smg is not None or importlib.util.find_spec("smg") is not None:
        theirs = [sys.executable, "-m", "smg", "launch", "--backend", "openai", "--policy", "round_robin"]
        theirs += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--worker-urls", url]
        paths = [path for path in (smg and str(Path(smg).resolve()), os.environ.get("PYTHONPATH")) if path]
        found["smg"] = (theirs, {"PYTHONPATH": os.pathsep.join(paths)})
    return found


async def paced(server: RunningServer, streams: int, tokens: int, spread: float) -> dict[str, float]:
    """One load: each figure of one server."""
    before = processor_seconds(server.pid, family=True)
    found = await load(
        port_of(server.url), [[chat("null", tokens, salt=f"{one}")] for one in range(streams)], spread=spread
    )
    first = sorted(found.first)
    return {
        COST: 1e6 * (processor_seconds(server.pid, family=True) - before) / found.tokens,
        TTFT: 1000 * statistics.median(first),
        LATE: 1000 * first[int(0.99 * len(first))],
        MEMORY: server.memory_bytes() / 1e6,
    }


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
