"""Two runs side by side, and whether the new one is worse than noise explains.

The rule: of each server, load and metric that both runs have, the ratio new / old over the rounds, with the ends of
what it may be (`estimates.unpaired_ratio`). It is a regression where all of that lies on the bad side of 1, by more
than the tolerance. From six rounds on both sides the ends hold for all figures of the comparison together: of a run
held against itself all are told as the same in 99 % of the cases. Fewer rounds can't be that sure, and the tolerance
does the work: with fewer than four on a side it is `FEW` times as much, since three rounds lie all on one side of three
others in a tenth of the cases; with one, `LONE`. Then less than 1 % of the figures are told as changed. The share of
failed requests is a regression where it grows by more than `FAILURES`.
"""

import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from synthia_vllm.bench.estimates import Estimate, unpaired_ratio
from synthia_vllm.bench.run_file import Run, read
from synthia_vllm.bench.summary import METRICS, Load, Summary

TOLERANCE = 0.05
LONE, FEW = 5, 3
_FEW_ROUNDS = 4
FAILURES = 0.01
Verdict = Literal["same", "better", "worse"]


@dataclass(frozen=True)
class Change:
    """One metric of one server under one load. `ratio` is None for failures, which are shares."""

    server: str
    load: Load
    metric: str
    old: float
    new: float
    ratio: Estimate | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    gone: list[str]  # measured in the old run only
    added: list[str]
    differences: list[str]  # of machine, versions, options, model: what else may explain a change

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]


def compare(old: Run, new: Run, tolerance: float = TOLERANCE) -> Comparison:
    """Raises ValueError where the runs have no measurement in common."""
    before, after = Summary(old), Summary(new, Summary(old).slo)
    both = [cell for cell in before.cells if cell in after.cells]
    if not both:
        raise ValueError("the two runs share no server and load with a valid measurement: nothing to compare")
    figures = len(both) * len(METRICS)
    changes = [
        change
        for server, load in both
        for change in (
            *(_change(before, after, server, load, metric, tolerance, figures) for metric in METRICS),
            _failures(before, after, server, load),
        )
        if change is not None
    ]
    return Comparison(
        changes,
        gone=[f"{server}: {load}" for server, load in before.cells if (server, load) not in after.cells],
        added=[f"{server}: {load}" for server, load in after.cells if (server, load) not in before.cells],
        differences=_differences(old, new),
    )


def show(comparison: Comparison, console: Console, *, everything: bool = False) -> None:
    """What changed, or with `everything` also what did not."""
    for difference in comparison.differences:
        console.print(f"differs: {difference}", highlight=False, markup=False)
    for title, names in (("only in the old run", comparison.gone), ("only in the new run", comparison.added)):
        for name in names:
            console.print(f"{title}: {name}", highlight=False, markup=False)
    shown = [change for change in comparison.changes if everything or change.verdict != "same"]
    for (server, load), changes in groupby(shown, lambda change: (change.server, change.load)):
        table = Table("metric", "old", "new", "new / old", "verdict", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for change in changes:
            table.add_row(*_cells(change), change.verdict)
        console.print(f"{server}, {load}", highlight=False, markup=False)
        console.print(table)
    same = sum(change.verdict == "same" for change in comparison.changes)
    console.print(
        f"{len(comparison.changes)} figures compared: {same} within noise, {len(comparison.regressions)} worse, "
        f"{len(comparison.changes) - same - len(comparison.regressions)} better",
        highlight=False,
    )


def _cells(change: Change) -> tuple[str, str, str, str]:
    if change.ratio is None:
        return change.metric, f"{change.old:.1%}", f"{change.new:.1%}", ""
    title, unit, factor, _, _ = METRICS[change.metric]
    values = f"{change.old * factor:.4g}", f"{change.new * factor:.4g}"
    return f"{title}, {unit}", *values, change.ratio.text(3)


def _change(
    before: Summary, after: Summary, server: str, load: Load, metric: str, tolerance: float, figures: int
) -> Change | None:
    old, new = before.estimate(server, load, metric), after.estimate(server, load, metric)
    ratio = unpaired_ratio(
        list(after.rounds(server, load, metric).values()),
        list(before.rounds(server, load, metric).values()),
        figures,
    )
    if old is None or new is None or ratio is None:
        return None
    return Change(server, load, metric, old.value, new.value, ratio, verdict(ratio, METRICS[metric][3], tolerance))


def verdict(ratio: Estimate, higher_is_better: bool, tolerance: float) -> Verdict:
    """Of a ratio new / old."""
    if ratio.low is None or ratio.high is None:
        low = high = ratio.value
        tolerance = min(LONE * tolerance, 0.9)
    else:
        low, high = ratio.low, ratio.high
        tolerance *= FEW if ratio.rounds < _FEW_ROUNDS else 1
    # Below and above by the same factor, so that which run is called old makes no difference.
    if high < 1 / (1 + tolerance):
        return "worse" if higher_is_better else "better"
    if low > 1 + tolerance:
        return "better" if higher_is_better else "worse"
    return "same"


def _failures(before: Summary, after: Summary, server: str, load: Load) -> Change:
    old, new = _failed_share(before, server, load), _failed_share(after, server, load)
    found: Verdict = "worse" if new > old + FAILURES else "better" if old > new + FAILURES else "same"
    return Change(server, load, "failed requests", old, new, None, found)


def _failed_share(summary: Summary, server: str, load: Load) -> float:
    figures = [figures for _, figures in summary.cells[server, load]]
    failed, whole = sum(f.failed for f in figures), sum(f.completed for f in figures)
    return failed / (failed + whole) if failed + whole else 0.0


def _differences(old: Run, new: Run) -> list[str]:
    found = []
    for part in ("machine", "versions", "options", "model"):
        one, other = getattr(old, part), getattr(new, part)
        found += [
            f"{part} {key}: {one.get(key)!r}, now {other.get(key)!r}"
            for key in sorted(one.keys() | other.keys())
            if one.get(key) != other.get(key)
        ]
    commands = {server.name: (server.command, server.environment) for server in old.servers}
    found += [
        f"server {server.name}: command or environment"
        for server in new.servers
        if commands.get(server.name, (server.command, server.environment)) != (server.command, server.environment)
    ]
    if old.profile != new.profile:
        found.append(f"profile: {old.profile}, now {new.profile}")
    return found


@click.command("compare")
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=TOLERANCE,
    show_default=True,
    help="A change that is none, as a share.",
)
@click.option("--all", "everything", is_flag=True, help="What did not change too.")
def command(old: Path, new: Path, tolerance: float, everything: bool) -> None:
    """Hold a run against an older one. Exits with 1 where it is worse by more than noise and tolerance explain.

    OLD and NEW are JSON files of `bench run`. A figure is worse where all that new / old may be lies beyond
    1 + tolerance on the bad side; with two or three rounds on a side beyond three tolerances, with one beyond five.
    """
    try:
        comparison = compare(read(old), read(new), tolerance)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    show(comparison, Console(), everything=everything)
    sys.exit(1 if comparison.regressions else 0)
