"""Are scores over HTTP the harness's own? Each log-likelihood against its `hf` backend, both in float32.

    python -m benchmarks.eval_agreement

Both are given the same questions, examples and token ids. Ends with 1 where a log-likelihood differs by more than 0.05
or a score is another.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.eval_data import stand_ins
from synthia_vllm import __version__
from synthia_vllm.bench.machine import machine
from synthia_vllm.eval.benchmarks import Benchmark, chosen
from synthia_vllm.eval.harness import evaluate, load_tasks, require_harness, task_manager
from synthia_vllm.eval.scores import Score, read_scores
from synthia_vllm.eval.server import find_endpoint, started

ALLOWED = 0.05
_SAME_SCORE = 1e-4
FLOAT32 = ("--engine.dtype", "float32", "--engine.max-model-len", "4096", "--engine.kv-cache-gib", "1")


@click.command()
@click.option("--model", default="demo", show_default=True, help="Folder, hub id or 'demo'.")
@click.option("--tasks", default="arc_challenge,hellaswag,mmlu,truthfulqa_mc2", show_default=True)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="As `eval` takes it (default: the tests' stand-ins).",
)
@click.option(
    "--limit", type=click.IntRange(1), default=1, show_default=True, help="Questions of each task; MMLU has 57."
)
@click.option("--format", type=click.Choice(["plain", "chat", "both"]), default="both", show_default=True)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("benchmarks/results/eval_agreement.json"),
    show_default=True,
)
def main(model: str, tasks: str, data: Path | None, limit: int, format: str, output: Path) -> None:
    """Ask a server and the `hf` backend the same and hold every answer against its twin."""
    benchmarks, console = chosen(tasks.split(",")), Console()
    formats: list[Any] = ["plain", "chat"] if format == "both" else [format]
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {"synthia-vllm": __version__, "lm-eval": require_harness()},
        "options": {"model": model, "tasks": tasks, "limit": limit, "dtype": "float32"},
        "summary": {},
    }
    with tempfile.TemporaryDirectory(prefix="synthia-agreement-") as name:
        folder = Path(name)
        data = data or stand_ins(folder)
        found = {}
        with started(model, FLOAT32, folder / "serve.txt") as url:
            endpoint = find_endpoint(url, model=None, tokenizer=None, key="none")
            for asked in formats:
                cache = folder / "cache" / asked
                found[asked] = evaluate(
                    endpoint, benchmarks, format=asked, concurrency=8, limit=limit, data=data, cache=cache
                )
        for asked, (ours, raw) in found.items():
            theirs = hf_results(
                endpoint.tokenizer, endpoint.max_length, benchmarks, folder / f"hf-{asked}", data, limit, asked
            )
            report["summary"][asked] = compared(ours.scores, read_scores(benchmarks, theirs), compare(raw, theirs))
            output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(markdown(report), highlight=False, markup=False)
    sys.exit(0 if all(map(agrees, report["summary"].values())) else 1)


def compared(ours: Sequence[Score], theirs: Sequence[Score], differences: Sequence[float]) -> dict[str, Any]:
    return {
        "log-likelihoods": len(differences),
        "largest difference": round(max(differences), 5),
        "mean difference": round(sum(differences) / len(differences), 6),
        "scores, ours": {score.task: score.value for score in ours},
        "scores, hf": {score.task: score.value for score in theirs},
    }


def agrees(summary: Mapping[str, Any]) -> bool:
    """TruthfulQA's score is a sum of probabilities, and so not the same in its last digits."""
    theirs = summary["scores, hf"]
    same = all(abs(value - theirs[task]) < _SAME_SCORE for task, value in summary["scores, ours"].items())
    return same and summary["largest difference"] <= ALLOWED


def markdown(report: Mapping[str, Any]) -> str:
    """The table that the README quotes."""
    lines = ["| figure | over HTTP | `hf` backend |", "|---|---|---|"]
    for format, summary in report["summary"].items():
        for task, value in summary["scores, ours"].items():
            lines.append(f"| {task}, {format} | {value:.4f} | {summary['scores, hf'][task]:.4f} |")
        lines.append(f"| log-likelihoods compared, {format} | {summary['log-likelihoods']} | |")
        lines.append(f"| largest difference, {format} | {summary['largest difference']} | |")
    return "\n".join(lines)


def hf_results(
    model: str,
    max_length: int,
    benchmarks: list[Benchmark],
    folder: Path,
    data: Path | None,
    limit: int,
    format: str,
) -> Mapping[str, Any]:
    """The harness's own backend, in this process."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from synthia_vllm.prompt import render

    class Local(HFLM):  # type: ignore[misc]
        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return render(chat_history, add_generation_prompt=add_generation_prompt) + " "

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "synthia"

    folder.mkdir()
    manager = task_manager(benchmarks, folder, data)
    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        model=Local(pretrained=model, dtype="float32", device="cpu", batch_size=1, max_length=max_length),
        tasks=load_tasks(benchmarks, manager, data),
        task_manager=manager,
        limit=limit,
        apply_chat_template=format == "chat",
    )
    return found


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[float]:
    """How far apart the log-likelihoods of each answer are."""
    found = []
    for task, samples in ours["samples"].items():
        for one, other in zip(samples, theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"], "not the same question"
            pairs = zip(one["filtered_resps"], other["filtered_resps"], strict=True)
            found += [abs(float(a[0]) - float(b[0])) for a, b in pairs]
    return found


if __name__ == "__main__":
    main()
