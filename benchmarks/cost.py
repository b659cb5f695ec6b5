"""What our layers cost with no inference in the way: `synthia-vllm bench ceiling`, as the documents quote it.

python -m benchmarks.cost [--rounds 5] [--output benchmarks/results/cost.json]
"""

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from synthia_vllm.bench import ceiling


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "cost.json",
    show_default="benchmarks/results/cost.json",
)
def main(rounds: int, output: Path) -> None:
    """Measure tokens a second, time to first token and memory a stream, with and without our layers."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = ceiling.measured(rounds, 3.0, ceiling.OPEN_STREAMS, lambda text: console.print(text, highlight=False))
    output.write_text(json.dumps(report, indent=1) + "\n")
    ceiling.show(report, console)
    console.print(f"written to {output}", highlight=False)


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    rows = (f"| {name} | {value} |\n" for name, value in report["summary"].items())
    return "| figure | median of rounds |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
