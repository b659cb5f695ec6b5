"""What came of it: the card's table as Markdown, JSON and terminal output."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from synthia_vllm.eval.benchmarks import Benchmark


@dataclass(frozen=True)
class Score:
    """One line of the table. Shares of 1; `stderr` is the harness's own, None for a single question."""

    task: str
    metric: str
    shots: int
    value: float
    stderr: float | None
    questions: int


@dataclass(frozen=True)
class Evaluation:
    """A run of the harness. `answered_before`: log-likelihoods that an earlier, interrupted run had found."""

    model: str
    format: str
    harness: str
    limit: int | None
    answered_before: int
    requests: int
    seconds: float
    scores: list[Score]

    @property
    def average(self) -> float | None:
        """The card's last line; None unless all four are there."""
        return fmean(score.value for score in self.scores) if len(self.scores) == 4 else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "average": self.average}


def read_scores(benchmarks: Sequence[Benchmark], results: Mapping[str, Any]) -> list[Score]:
    """From what `lm_eval.simple_evaluate` returns."""
    return [
        Score(
            benchmark.card_name,
            benchmark.card_metric,
            benchmark.shots,
            float(results["results"][benchmark.task][f"{benchmark.metric},none"]),
            _number(results["results"][benchmark.task][f"{benchmark.metric}_stderr,none"]),
            _questions(benchmark.task, results),
        )
        for benchmark in benchmarks
    ]


def markdown(evaluation: Evaluation) -> str:
    """The card's table with a column for the standard error, and how it was measured."""
    lines = ["|||||", "|:------:|:--------:|:-------:|:-------:|", "|**Task**|**Metric**|**Value**|**Std. error**|"]
    lines += [f"|*{s.task}*|{s.metric}|{s.value:.4f}|{_text(s.stderr)}|" for s in evaluation.scores]
    if evaluation.average is not None:
        lines.append(f"|**Total Average**|-|{evaluation.average:.4f}||")
    return "\n".join([*lines, "", caption(evaluation), ""])


def terminal(evaluation: Evaluation) -> Table:
    table = Table("task", "shots", "metric", "questions", title=f"{evaluation.model}, format {evaluation.format}")
    table.add_column("value", justify="right")
    table.add_column("std. error", justify="right")
    for score in evaluation.scores:
        cells = (str(score.shots), score.metric, str(score.questions), f"{score.value:.4f}", _text(score.stderr))
        table.add_row(score.task, *cells)
    if evaluation.average is not None:
        table.add_section()
        table.add_row("average", "", "", "", f"{evaluation.average:.4f}", "")
    table.caption = caption(evaluation)
    return table


def caption(evaluation: Evaluation) -> str:
    shots = ", ".join(f"{score.task} {score.shots}-shot" for score in evaluation.scores)
    part = (
        f"; only the first {evaluation.limit} questions of each task, no result to publish" if evaluation.limit else ""
    )
    asked = "the Synthia format" if evaluation.format == "chat" else "plain text"
    return f"{evaluation.model} through {asked}: {shots}; lm-evaluation-harness {evaluation.harness}{part}."


def _questions(task: str, results: Mapping[str, Any]) -> int:
    """Of a group all of its tasks' together."""
    counts, below = results["n-samples"], results.get("group_subtasks", {}).get(task)
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_questions(name, results) for name in below or ())


def _number(value: Any) -> float | None:
    """The harness writes "N/A" for what it does not know."""
    return float(value) if isinstance(value, int | float) else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
