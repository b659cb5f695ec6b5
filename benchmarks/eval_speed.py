"""How fast evaluation requests go through us, against plain vLLM with the same arguments.

    python -m benchmarks.eval_speed

The harness's own client, 32 requests at once, zero-shot questions of `--data`; parts of the requests go to both servers
in turn, and ratios are taken part by part.
"""

import itertools
import json
import logging
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from synthia_vllm import __version__
from synthia_vllm.bench.client import Target
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.peers import machine_group
from synthia_vllm.bench.servers import plan_of
from synthia_vllm.eval.benchmarks import chosen
from synthia_vllm.eval.harness import load_tasks, require_harness, task_manager
from synthia_vllm.eval.server import find_endpoint

OURS, PLAIN = "ours", "vllm-tuned"
CONCURRENCY = 32


@click.command()
@click.option("--requests", "count", type=click.IntRange(100), default=2000, show_default=True)
@click.option("--parts", type=click.IntRange(2), default=8, show_default=True, help="Pairs of measurements.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("tests/eval/data"),
    show_default=True,
)
@click.option("--model", help="Folder, hub id or 'demo' (default: as serve).")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("benchmarks/results/eval_speed.json"),
    show_default=True,
)
def main(count: int, parts: int, data: Path, model: str | None, output: Path) -> None:
    """Send the same requests to both and compare."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    plan = plan_of({"model": model, "kv_cache_gib": 1.0, "replicas": 1})
    with tempfile.TemporaryDirectory(prefix="synthia-eval-speed-") as name:
        asked = instances(data, count, Path(name))

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False)

        with machine_group(plan, [OURS, PLAIN], Path(name), say) as servers:
            targets = {}
            for up in servers:
                if up.target is None:
                    raise click.ClickException(f"{up.server.name}: {up.server.missing}")
                targets[up.server.name] = up.target
            report: dict[str, Any] = {
                "machine": machine(),
                "versions": {"synthia-vllm": __version__, "lm-eval": require_harness()},
                "options": {"each": len(asked) // parts, "concurrency": CONCURRENCY, "model": plan.engine.name},
            }
            for seconds in measure(targets, asked, parts, plan.engine.model, say):
                # After every pair: an interruption loses one.
                output.write_text(json.dumps(report | {"seconds": seconds}, indent=1) + "\n")
    report |= {"seconds": seconds}
    console.print(markdown(report), highlight=False, markup=False)


def instances(data: Path, count: int, folder: Path) -> list[Any]:
    """As many of the harness's requests as wanted, zero-shot; where there are fewer, the same again.

    A log-likelihood of a prompt skips the prefix cache, so one that comes again costs as much.
    """
    benchmarks = chosen(["arc_challenge", "truthfulqa_mc2"])
    found: list[Any] = []
    for task in load_tasks(benchmarks, task_manager(benchmarks, folder, data), data):
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
        found += task.instances
    return list(itertools.islice(itertools.cycle(found), count))


def measure(
    targets: dict[str, Target], asked: list[Any], parts: int, tokenizer: str, say: Any
) -> Iterator[dict[str, list[float]]]:
    """Seconds of the parts so far at each server, after each pair; first one and then the other goes first."""
    from synthia_vllm.eval.model import Completions

    clients = {
        name: Completions(
            find_endpoint(target.url, model=None, tokenizer=tokenizer, key="none"), concurrency=CONCURRENCY
        )
        for name, target in targets.items()
    }
    for client in clients.values():
        client.loglikelihood(asked[:CONCURRENCY], disable_tqdm=True)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    each = len(asked) // parts
    for part in range(parts):
        order = list(clients)[:: 1 if part % 2 == 0 else -1]
        for name in order:
            began = time.perf_counter()
            clients[name].loglikelihood(asked[part * each : (part + 1) * each], disable_tqdm=True)
            seconds[name].append(round(time.perf_counter() - began, 3))
            say(f"part {part + 1} of {parts}: {name}: {each / seconds[name][-1]:.1f} requests/s")
        yield seconds


def markdown(report: dict[str, Any]) -> str:
    """The table that the README quotes."""
    seconds, each = report["seconds"], report["options"]["each"]
    rates = {name: each / statistics.median(found) for name, found in seconds.items()}
    ratios = [plain / ours for ours, plain in zip(seconds[OURS], seconds[PLAIN], strict=True)]
    told = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return "\n".join(
        [
            "| figure, in one run | median of parts (least to greatest) |",
            "|---|---|",
            f"| evaluation requests/s, 32 at once: ours | {rates[OURS]:.1f} |",
            f"| the same, plain vLLM | {rates[PLAIN]:.1f} |",
            f"| ours / plain vLLM | {told} |",
        ]
    )


if __name__ == "__main__":
    main()
