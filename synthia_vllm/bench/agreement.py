"""Whether our load client, `vllm bench serve` and aiperf say the same of one server under one load.

    python -m synthia_vllm.bench.agreement --url http://127.0.0.1:8000 [--rounds 3] [--streams 4] [--aiperf PATH]

Each round runs the three in turn, the same closed loop: so many streams, prompts of 32 tokens, 64 tokens out, greedy.
Means are compared, since that is the one statistic that all three define alike: TTFT, ITL (aiperf has one value a
request), output tokens a second. Token counts are held against the server's own counter, where its /metrics has one.

aiperf is not a dependency: it wants other versions of what is here. Without --aiperf it is looked for in an environment
of its own in the data folder, and made there with --install-aiperf.
"""

import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.measuring import Terms, measure
from synthia_vllm.bench.probe import target_of
from synthia_vllm.bench.profiles import OUTPUT, PROMPT
from synthia_vllm.bench.summary import gaps, tokens_of, ttft
from synthia_vllm.bench.workloads import ClosedLoop

WITHIN = 0.03
_PROMPT, _OUTPUT = str(PROMPT.least), str(OUTPUT.least)
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Figures:
    """What a tool says of one run: means in ms, tokens a second, and how many tokens came."""

    ttft_ms: float
    itl_ms: float
    throughput: float
    tokens: int


@dataclass(frozen=True)
class Loop:
    """The load that all three make."""

    target: Target
    tokenizer: str
    streams: int
    requests: int


def ours(loop: Loop, number: int) -> Figures:
    workload = ClosedLoop(loop.streams, loop.requests, PROMPT, OUTPUT)
    found = asyncio.run(measure(loop.target, workload, Terms(), server="server", number=number))
    wrong = [request for request in found.requests if request.error]
    if wrong:
        raise click.ClickException(f"{len(wrong)} requests went wrong: {wrong[0].error}: {wrong[0].detail}")
    return Figures(
        1000 * statistics.mean(map(ttft, found.requests)),
        1000 * statistics.mean(gap for request in found.requests for gap in gaps(request)),
        sum(map(tokens_of, found.requests)) / found.duration_s,
        sum(request.seen_tokens or 0 for request in found.requests),
    )


def vllm(loop: Loop, number: int) -> Figures:
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = ["--backend", "openai", "--base-url", loop.target.url, "--endpoint", "/v1/completions"]
    words += ["--model", loop.target.model, "--tokenizer", loop.tokenizer, "--dataset-name", "random"]
    words += ["--random-input-len", _PROMPT, "--random-output-len", _OUTPUT, "--seed", str(number), "--ignore-eos"]
    words += ["--num-prompts", str(loop.requests), "--max-concurrency", str(loop.streams), "--temperature", "0"]
    words += ["--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        told: dict[str, Any] = asyncio.run(main_async(parser.parse_args(words)))
    return Figures(
        told["mean_ttft_ms"], told["mean_itl_ms"], told["output_throughput"], int(told["total_output_tokens"])
    )


def aiperf(binary: Path) -> Callable[[Loop, int], Figures]:
    def run(loop: Loop, number: int) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            words = [str(binary), "profile", "--model", loop.target.model, "--url", loop.target.url, "--streaming"]
            words += ["--endpoint-type", "completions", "--tokenizer", loop.tokenizer, "--random-seed", str(number)]
            words += ["--concurrency", str(loop.streams), "--request-count", str(loop.requests)]
            words += ["--synthetic-input-tokens-mean", _PROMPT, "--synthetic-input-tokens-stddev", "0"]
            words += ["--output-tokens-mean", _OUTPUT, "--output-tokens-stddev", "0", "--use-legacy-max-tokens"]
            words += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"]
            words += ["--use-server-token-count", "--artifact-dir", folder, "--ui", "none"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            result = Path(folder, "profile_export_aiperf.json")
            if done.returncode or not result.exists():
                raise click.ClickException(f"aiperf failed:\n{(done.stdout + done.stderr)[-2000:]}")
            told = json.loads(result.read_text())
        return Figures(
            told["time_to_first_token"]["avg"],
            told["inter_token_latency"]["avg"],
            told["output_token_throughput"]["avg"],
            round(told["total_output_tokens"]["avg"]),
        )

    return run


@click.command()
@click.option("--url", required=True, help="Of the server.")
@click.option("--key", help="For it.")
@click.option("--served-model", help="Its name there (default: the first that it lists).")
@click.option(
    "--model", default="demo", show_default=True, help="Folder, hub id or 'demo': whose tokenizer makes prompts."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--streams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--requests", type=click.IntRange(1), default=32, show_default=True, help="Of each run.")
@click.option("--aiperf", "binary", type=click.Path(path_type=Path, exists=True), help="The command.")
@click.option("--install-aiperf", is_flag=True, help="Make an environment for it in the data folder.")
def main(binary: Path | None, install_aiperf: bool, rounds: int, **options: Any) -> None:
    """Hold three load tools against each other. Exit code 1 where they differ by more than 3 %, or in any token."""
    from synthia_vllm.engine.arguments import find_model

    console = Console()
    target = target_of(options["url"], options)
    loop = Loop(target, find_model(options["model"])[0], options["streams"], options["requests"])
    tools: dict[str, Callable[[Loop, int], Figures]] = {"ours": ours, "vllm bench serve": vllm}
    if found := binary or aiperf_binary(install=install_aiperf):
        tools["aiperf"] = aiperf(found)
    else:
        console.print("aiperf is left out: give --aiperf PATH, or --install-aiperf", highlight=False)
    ours(loop, rounds)  # warms up
    results: dict[str, list[Figures]] = {name: [] for name in tools}
    miscounted = []
    for number in range(rounds):
        order = list(tools)[number % len(tools) :] + list(tools)[: number % len(tools)]
        for name in order:
            before = generated(target)
            figures = tools[name](loop, number)
            results[name].append(figures)
            told = None if before is None else (generated(target) or 0) - before
            if told is not None and told != figures.tokens:
                miscounted.append(f"{name}: {figures.tokens} tokens, the server counted {told}")
        console.print(f"round {number + 1} of {rounds} done", highlight=False)
    sys.exit(0 if show(results, miscounted, console) else 1)


def show(results: dict[str, list[Figures]], miscounted: list[str], console: Console) -> bool:
    """Medians over the rounds and how far they are from ours; whether all is within the bounds."""
    table = Table("tool", "mean TTFT, ms", "mean ITL, ms", "tokens/s", "tokens", title="medians, and from ours")
    fine = not miscounted
    for name, runs in results.items():
        cells = []
        for part in ("ttft_ms", "itl_ms", "throughput", "tokens"):
            value = statistics.median(getattr(figures, part) for figures in runs)
            off = value / statistics.median(getattr(figures, part) for figures in results["ours"]) - 1
            fine = fine and abs(off) <= (0 if part == "tokens" else WITHIN)
            cells.append(f"{value:.2f} ({off:+.1%})" if part != "tokens" else f"{value:.0f}")
        table.add_row(name, *cells)
    console.print(table)
    for line in miscounted:
        console.print(line, highlight=False)
    console.print(f"{'within' if fine else 'not within'} {WITHIN:.0%}, token counts exact", highlight=False)
    return fine


def generated(target: Target) -> int | None:
    """Tokens that the server's engines have generated, by its own counter; None where it tells none."""
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    try:
        page = httpx.get(f"{target.url}/metrics", headers=headers, timeout=30).raise_for_status().text
    except httpx.HTTPError:
        return None
    found = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "vllm:generation_tokens_total"
    ]
    return round(sum(found)) if found else None


def aiperf_binary(*, install: bool) -> Path | None:
    """In an environment of its own, made if that is asked for."""
    from synthia_vllm.gateway.store.database import data_folder

    folder = data_folder() / "aiperf"
    binary = folder / "bin" / "aiperf"
    if install and not binary.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "aiperf"], check=True)
    return binary if binary.exists() else None


if __name__ == "__main__":
    main()
