"""Are scores over HTTP the harness's own? Each log-likelihood against its `hf` backend, both in float32.

    python -m benchmarks.eval_agreement --data tests/eval/data --limit 3

Both are given the same questions, examples and token ids. Ends with 1 where a log-likelihood differs by more than 0.05
or a score is another.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.serving import machine
from synthia_vllm import __version__
from synthia_vllm.eval.benchmarks import Benchmark, chosen
from synthia_vllm.eval.harness import evaluate, load_tasks, require_harness, task_manager
from synthia_vllm.eval.scores import read_scores
from synthia_vllm.eval.server import find_endpoint, started

ALLOWED = 0.05
FLOAT32 = ("--engine.dtype", "float32", "--engine.max-model-len", "4096", "--engine.kv-cache-gib", "1")


@click.command()
@click.option("--model", default="demo", show_default=True, help="Folder, hub id or 'demo'.")
@click.option("--tasks", default="arc_challenge,hellaswag,truthfulqa_mc2", show_default=True)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="As `eval` takes it.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task.")
@click.option("--format", type=click.Choice(["plain", "chat"]), default="plain", show_default=True)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("benchmarks/results/eval_agreement.json"),
    show_default=True,
)
def main(model: str, tasks: str, data: Path | None, limit: int | None, format: Any, output: Path) -> None:
    """Ask a server and the `hf` backend the same and hold every answer against its twin."""
    benchmarks, console = chosen(tasks.split(",")), Console()
    with tempfile.TemporaryDirectory(prefix="synthia-agreement-") as name:
        folder = Path(name)
        with started(model, FLOAT32, folder / "serve.txt") as url:
            endpoint = find_endpoint(url, model=None, tokenizer=None, key="none")
            ours, raw = evaluate(
                endpoint,
                benchmarks,
                format=format,
                concurrency=8,
                limit=limit,
                data=data,
                cache=folder / "cache",
            )
        theirs = hf_results(endpoint.tokenizer, endpoint.max_length, benchmarks, folder, data, limit, format)
    differences = compare(raw, theirs)
    report = {
        "machine": machine(),
        "versions": {"synthia-vllm": __version__, "lm-eval": require_harness()},
        "options": {"model": model, "tasks": tasks, "limit": limit, "format": format, "dtype": "float32"},
        "summary": {
            "log-likelihoods": len(differences),
            "largest difference": round(max(differences), 5),
            "mean difference": round(sum(differences) / len(differences), 6),
            "scores, ours": {score.task: score.value for score in ours.scores},
            "scores, hf": {score.task: score.value for score in read_scores(benchmarks, theirs)},
        },
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(markdown(report), highlight=False, markup=False)
    agree = all(
        abs(a.value - b.value) < 0.01 for a, b in zip(ours.scores, read_scores(benchmarks, theirs), strict=True)
    )
    sys.exit(0 if max(differences) <= ALLOWED and agree else 1)


def markdown(report: Mapping[str, Any]) -> str:
    """The table that the README quotes."""
    summary = report["summary"]
    lines = ["| figure | over HTTP | `hf` backend |", "|---|---|---|"]
    for task, value in summary["scores, ours"].items():
        lines.append(f"| {task} | {value:.4f} | {summary['scores, hf'][task]:.4f} |")
    lines.append(f"| log-likelihoods compared | {summary['log-likelihoods']} | |")
    lines.append(f"| largest difference | {summary['largest difference']} | |")
    return "\n".join(lines)


def hf_results(
    model: str,
    max_length: int,
    benchmarks: list[Benchmark],
    folder: Path,
    data: Path | None,
    limit: int | None,
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

    (folder / "hf").mkdir()
    manager = task_manager(benchmarks, folder / "hf", data)
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
