"""How much our tuning gains and our layers cost, against plain vLLM on the same machine in the same run.

    python -m benchmarks.serving [--rounds 5] [--model demo] [--output benchmarks/results/serving.json]

Four servers are started and kept running; each round loads them one after the other, so that drift of the machine
meets all alike. Load and metrics are vLLM's own `bench serve` code. Ratios are taken pair by pair within a round.

default    vLLM's server as it starts by default, in eager mode
tuned      vLLM's server with exactly our arguments and environment
untuned    the same without tcmalloc: what `doctor` quotes
ours       `synthia-vllm serve`
"""

import asyncio
import io
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from synthia_vllm import __version__
from synthia_vllm.bench import processes
from synthia_vllm.bench.machine import machine
from synthia_vllm.engine.arguments import EnginePlan, plan_engine
from synthia_vllm.engine.hardware import inspect_machine
from synthia_vllm.prompt import SAMPLING_DEFAULTS, STOP_STRINGS
from synthia_vllm.settings import EngineSettings, Settings

VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"
INPUT_TOKENS, OUTPUT_TOKENS = 32, 64


@dataclass(frozen=True)
class Load:
    """One kind of load. `metric` is a figure of vLLM's bench."""

    name: str
    backend: str
    endpoint: str
    streams: int
    requests: int
    output_tokens: int
    metric: str
    body: Mapping[str, Any]


_CARD = {**{k: v for k, v in SAMPLING_DEFAULTS.items() if k != "max_tokens"}, "stop": list(STOP_STRINGS)}
LOADS = (
    Load(
        "completions, 64 streams: tokens/s",
        "openai",
        "/v1/completions",
        64,
        128,
        OUTPUT_TOKENS,
        "output_throughput",
        {},
    ),
    Load(
        "chat, 64 streams: tokens/s",
        "openai-chat",
        "/v1/chat/completions",
        64,
        128,
        OUTPUT_TOKENS,
        "output_throughput",
        {**_CARD, "min_tokens": OUTPUT_TOKENS},
    ),
    Load("completions, 1 stream: median TTFT, ms", "openai", "/v1/completions", 1, 20, 8, "median_ttft_ms", {}),
    Load("chat, 1 stream: median TTFT, ms", "openai-chat", "/v1/chat/completions", 1, 20, 8, "median_ttft_ms", _CARD),
)
# Which server is held against which, and why.
FIRST_LOAD_ONLY = ("default", "untuned")
PAIRS = (("ours", "default"), ("ours", "tuned"), ("untuned", "tuned"))


@click.command()
@click.option("--model", default="demo", show_default=True, help="Folder, hub id or 'demo'.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option("--kv-cache-gib", default=1.0, show_default=True, help="KV cache of each server.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "serving.json",
    show_default="benchmarks/results/serving.json",
)
def main(model: str, rounds: int, kv_cache_gib: float, output: Path) -> None:
    """Measure ours, vLLM as started by default and vLLM tuned as we do, side by side."""
    console = Console()
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # of the load generator's part of vLLM, in this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    settings = Settings(model=model, engine=EngineSettings(max_model_len=2048, kv_cache_gib=kv_cache_gib))
    plan = plan_engine(settings, inspect_machine())
    results: dict[str, dict[str, list[float]]] = {load.name: {} for load in LOADS}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        urls = {}
        for name, (command, environment) in commands(model, plan, kv_cache_gib).items():
            console.print(f"starting {name}", highlight=False)
            urls[name] = stack.enter_context(running(name, command, environment, Path(logs)))
        for number in range(-1, rounds):  # round -1 warms up and is not counted
            for load in LOADS:
                for name, url in rotated(list(urls.items()), number):  # no server is always the first
                    if load is not LOADS[0] and name in FIRST_LOAD_ONLY:
                        continue
                    requests = load.requests if number >= 0 else load.streams
                    figure = asyncio.run(measure(url, replace(load, requests=requests), plan, number))
                    if number >= 0:
                        results[load.name].setdefault(name, []).append(figure)
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
    report = {"machine": machine(), "version": __version__, "model": plan.name, "rounds": rounds, "results": results}
    report["ratios"] = ratios(results)
    output.write_text(json.dumps(report, indent=1) + "\n")
    show(report, console)
    console.print(f"written to {output}", highlight=False)


def rotated(items: list[tuple[str, str]], by: int) -> list[tuple[str, str]]:
    at = by % len(items)
    return items[at:] + items[:at]


def commands(model: str, plan: EnginePlan, kv_cache_gib: float) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command line and environment of each server, without its port."""
    plain = [sys.executable, "-m", VLLM_SERVER, "--model", plan.model, "--served-model-name", plan.name]
    plain += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30))]
    tuned = [sys.executable, "-m", VLLM_SERVER, *plan.arguments]
    ours = [sys.executable, "-m", "synthia_vllm", "serve", "--model", model, "--log-file", "-"]
    ours += ["--engine.max-model-len", "2048", "--engine.kv-cache-gib", str(kv_cache_gib)]
    preload = plan.environment.get("LD_PRELOAD", "").split(":")
    without = ":".join(path for path in preload if "tcmalloc" not in path)
    found = {
        "default": ([*plain, "--enforce-eager"], {}),
        "tuned": (tuned, plan.environment),
        "untuned": (tuned, {**plan.environment, "LD_PRELOAD": without}),
        "ours": (ours, {}),
    }
    if without == plan.environment.get("LD_PRELOAD", ""):
        del found["untuned"]  # no tcmalloc on this machine: nothing to leave out
    return found


@contextmanager
def running(
    name: str, command: list[str], environment: Mapping[str, str], logs: Path, tail: Sequence[str] = ()
) -> Iterator[str]:
    """A server while it is needed; yields its URL."""
    with processes.running(name, command, environment, logs, tail=tail) as server:
        yield server.url


async def measure(url: str, load: Load, plan: EnginePlan, seed: int) -> float:
    """One run of vLLM's bench. Raises ClickException where a request failed: such a run tells nothing."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = ["--backend", load.backend, "--base-url", url, "--endpoint", load.endpoint]
    words += ["--model", plan.name, "--tokenizer", plan.model, "--dataset-name", "random", "--seed", str(seed + 1)]
    words += ["--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(load.output_tokens)]
    words += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.streams), "--ignore-eos"]
    words += ["--disable-tqdm", "--num-warmups", "2", "--extra-body", json.dumps(dict(load.body))]
    with redirect_stdout(io.StringIO()):
        result: dict[str, Any] = await main_async(parser.parse_args(words))
    if result["completed"] != load.requests:
        why = next((error for error in result.get("errors", ()) if error), "")
        raise click.ClickException(
            f"{url}: {load.requests - result['completed']} requests of '{load.name}' failed: {why[-500:]}"
        )
    return float(result[load.metric])


def ratios(results: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of the ratios within each round; differences in ms for latencies."""
    found = {}
    for load, figures in results.items():
        for one, other in PAIRS:
            if one not in figures or other not in figures:
                continue
            pairs = list(zip(figures[one], figures[other], strict=True))
            values = [a - b for a, b in pairs] if load.endswith("ms") else [a / b for a, b in pairs]
            sign = "-" if load.endswith("ms") else "/"
            found[f"{load}, {one} {sign} {other}"] = {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
    return found


def show(report: Mapping[str, Any], console: Console) -> None:
    names = list(next(iter(report["results"].values())))
    figures = Table("load", *names, title="medians")
    for load, servers in report["results"].items():
        figures.add_row(load, *(f"{statistics.median(servers[name]):.1f}" if name in servers else "" for name in names))
    console.print(figures)
    pairs = Table("pair", "median", "least", "greatest", title="within each round")
    for name, values in report["ratios"].items():
        pairs.add_row(name, *(str(value) for value in values.values()))
    console.print(pairs)


def markdown(report: Mapping[str, Any]) -> str:
    """The table that the README quotes."""
    head = "| pair, in one run | median | least | greatest |\n|---|---|---|---|\n"
    rows = (f"| {name} | {v['median']} | {v['min']} | {v['max']} |\n" for name, v in report["ratios"].items())
    return head + "".join(rows)


if __name__ == "__main__":
    main()
