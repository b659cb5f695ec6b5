"""Figures of servers that were loaded in turn, round by round: kept, compared within each round, shown, written."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from synthia_vllm import __version__

Results = dict[str, dict[str, list[float]]]  # figure: server: one value a round


def add(results: Results, figure: str, server: str, value: float) -> None:
    results.setdefault(figure, {}).setdefault(server, []).append(value)


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The servers in an order that changes with the round: none is always the first."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def ratios(results: Results, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of the ratios within each round, of every figure that both servers of a pair have."""
    found = {}
    for figure, servers in results.items():
        for one, other in pairs:
            if one in servers and other in servers:
                each = [a / b for a, b in zip(servers[one], servers[other], strict=True)]
                values = {"median": statistics.median(each), "least": min(each), "greatest": max(each)}
                found[f"{figure}: {one} / {other}"] = {name: round(value, 3) for name, value in values.items()}
    return found


def report(
    machine: Mapping[str, Any], results: Results, pairs: Sequence[tuple[str, str]], **told: Any
) -> dict[str, Any]:
    """What is written: the machine, the version, what was `told` of the load, every round's figures, the ratios."""
    return {"machine": machine, "version": __version__, **told, "results": results, "ratios": ratios(results, pairs)}


def write(found: Mapping[str, Any], output: Path, console: Console) -> None:
    """Shows a report, and writes it as JSON."""
    results: Results = found["results"]
    names = list(dict.fromkeys(name for servers in results.values() for name in servers))
    figures = Table("figure", *names, title="medians of the rounds")
    for figure, servers in results.items():
        figures.add_row(
            figure, *(f"{statistics.median(servers[name]):.2f}" if name in servers else "" for name in names)
        )
    console.print(figures)
    pairs = Table("ratio", "median", "least", "greatest", title="within each round")
    for name, values in found["ratios"].items():
        pairs.add_row(name, *(str(value) for value in values.values()))
    console.print(pairs)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {output}", highlight=False)
