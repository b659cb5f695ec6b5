"""Replicas are killed under load, as the documents quote it: `synthia-vllm bench chaos`, larger.

python -m benchmarks.chaos [--no-resume]                              2,000 streams, 16 null engines, 2 minutes
python -m benchmarks.chaos --url http://127.0.0.1:8000 --name "demo"  20 kills on real engines that run
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from synthia_vllm import __version__
from synthia_vllm.bench import chaos
from synthia_vllm.bench.machine import machine

_SIZES = {"rounds": 20, "replicas": 16, "seconds": 120.0, "tokens_per_second": 2.0}
_RESULTS = Path(__file__).with_name("results") / "chaos.json"


def main() -> None:
    """Takes the options of `synthia-vllm bench chaos`, and --name: what the results call this run."""
    given = click.Command("chaos", params=[*chaos.command.params, click.Option(["--name"])], callback=_measure)
    given(default_map=_SIZES)


def _measure(name: str | None, output: Path | None, **options: Any) -> None:
    console, target = Console(), output or _RESULTS
    options["streams"] = options["streams"] or (None if options["url"] else 2000)
    scenario, found = chaos.measured(options, lambda text: console.print(text, highlight=False))
    name = name or scenario
    report = json.loads(target.read_text()) if target.exists() else {}
    report |= {"machine": machine(), "version": __version__}
    report["scenarios"] = report.get("scenarios", {}) | {name: found}
    target.write_text(json.dumps(report, indent=1) + "\n")
    chaos.show(name, found, console)
    console.print(f"written to {target}", highlight=False)
    sys.exit(1 if found["summary"]["broken streams"] and options["resume"] else 0)


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    scenarios = report["scenarios"]
    names = list(dict.fromkeys(figure for found in scenarios.values() for figure in found["summary"]))
    lines = [f"| figure | {' | '.join(scenarios)} |", "|---" * (len(scenarios) + 1) + "|"]
    for name in names:
        lines.append(
            f"| {name} | " + " | ".join(str(found["summary"].get(name, "")) for found in scenarios.values()) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
