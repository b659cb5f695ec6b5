"""The tables that the README quotes from a run: closed loops, ours against the others, what the simulator foretold.

python -m synthia_vllm.bench.quoted benchmarks/results/full.json.gz
"""

from pathlib import Path
from typing import Any

import click

from synthia_vllm.bench.run_file import Run, read
from synthia_vllm.bench.summary import Summary

# Ours, the other, and at how many streams.
PAIRS = (
    ("ours", "card", 64),
    ("ours", "card-batched", 64),
    ("ours", "vllm-default", 64),
    ("ours", "vllm-tuned", 64),
    ("ours", "llama.cpp", 32),
    ("ours", "llama.cpp", 64),
    ("cluster", "ray-normal", 64),
    ("cluster", "ray-direct", 64),
)


def markdown(run: Run) -> str:
    """Medians over the rounds, and ratios taken round by round, with what they may be."""
    summary = Summary(run)
    loads = {load.streams: load for load in summary.loads("closed") if load.family == "closed loop"}
    lines = [f"| tokens/s, streams: | {' | '.join(map(str, loads))} |", "|---|" + "---|" * len(loads)]
    for server in summary.servers():
        found = [summary.estimate(server, load, "output_throughput") for load in loads.values()]
        lines.append(f"| `{server}` | {' | '.join(f'{one.value:.0f}' if one else '' for one in found)} |")
    lines += [
        "",
        "| tokens/s, in one run | ratio (least to greatest; from six rounds on [95 % interval]) |",
        "|---|---|",
    ]
    for ours, theirs, streams in PAIRS:
        ratio = summary.ratio(ours, theirs, loads[streams]) if streams in loads else None
        if ratio is not None:
            lines.append(f"| `{ours}` / `{theirs}`, {streams} streams | {ratio.text()} |")
    if run.sizing:
        lines += ["", *_foretold(run.sizing)]
    return "\n".join(lines)


def _foretold(sizing: dict[str, Any]) -> list[str]:
    """The loads that the simulator had not seen (`sizing.check`)."""
    figures = ("ttft_p50", 1000), ("ttft_p99", 1000), ("throughput", 1)
    lines = ["| simulated / measured | TTFT p50, ms | TTFT p99, ms | tokens/s |", "|---|---|---|---|"]
    for row in sizing["rows"]:
        if not row["calibrated"]:
            cells = [
                f"{row[f'simulated_{name}'] * unit:.0f} / {row[f'measured_{name}'] * unit:.0f} ({error:+.1%})"
                for (name, unit), error in zip(figures, row["errors"], strict=True)
            ]
            lines.append(f"| {row['load']} | {' | '.join(cells)} |")
    return lines


@click.command()
@click.argument("run", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(run: Path) -> None:
    """Print the tables."""
    click.echo(markdown(read(run)))


if __name__ == "__main__":
    main()
