"""`synthia-vllm bench ceiling`: what the serving layer can do when no model holds it back (`benchmarks.cost`)."""

import signal
import sys
from pathlib import Path

import click
from rich.console import Console


@click.command("ceiling")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repeats.")
@click.option("--seconds", default=3.0, show_default=True, help="Of full load, each.")
@click.option(
    "--streams", type=click.IntRange(1), default=5000, show_default=True, help="Open at once, for the memory of one."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A run's file to add it to (default: a new one)."
)
def command(rounds: int, seconds: float, streams: int, output: Path | None) -> None:
    """Chunks a second, open streams, memory a stream and added latency, around a null engine.

    The null engine is a stand-in that sends vLLM's chunks as fast as it can; it is measured bare, behind all our
    layers in one process, and behind `synthia-vllm gateway` in another. One core is the server's, one the client's.
    """
    from benchmarks import cost
    from benchmarks.load.records import attach, default_path

    console = Console(stderr=True, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = cost.measured(rounds, seconds, streams, lambda text: console.print(text, highlight=False))
    cost.show(report, Console())
    path = output or default_path("ceiling")
    attach(path, "ceiling", report, {"rounds": rounds, "seconds": seconds, "streams": streams})
    console.print(f"written: {path}", highlight=False)
