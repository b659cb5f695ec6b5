"""The cluster against what Ray Serve LLM has by itself, with the same engine replicas in the same run.

    python -m benchmarks.cluster [--rounds 5] [--replicas 2] [--output benchmarks/results/cluster.json]

normal   Ray Serve LLM's normal ingress, as it is by default
direct   its direct streaming: HAProxy and a replica's own HTTP server, without our gateway
ours     `synthia-vllm cluster up`

All three answer from the replicas of one cluster and are loaded in turn within each round; ratios are taken pair by
pair. Then conversations of several turns run through the gateway with affinity and with round robin, and the replicas
tell how much of their prompts was in their prefix caches.
"""

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.serving import LOADS, measure, rotated
from synthia_vllm import __version__
from synthia_vllm.bench.machine import machine
from synthia_vllm.bench.ray_cluster import running, up, ways_in
from synthia_vllm.cluster.guard import engine_key
from synthia_vllm.cluster.planning import plan_replica
from synthia_vllm.engine.arguments import EnginePlan
from synthia_vllm.engine.hardware import inspect_machine
from synthia_vllm.settings import Settings, load_settings

LOAD = LOADS[0]  # completions, 64 streams
PAIRS = (("ours", "normal"), ("ours", "direct"))
# Different enough in length that the cache's blocks show, short enough for a small context.
CONVERSATIONS, TURNS, WORDS_A_TURN, REPLY_TOKENS = 16, 6, 30, 24


@click.command()
@click.option("--model", default="demo", show_default=True, help="Folder, hub id or 'demo'.")
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved repeats.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("results") / "cluster.json",
    show_default="benchmarks/results/cluster.json",
)
def main(model: str, replicas: int, rounds: int, output: Path) -> None:
    """Measure the cluster against Ray Serve LLM's own ways in."""
    console = Console()
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # of the load generator's part of vLLM, in this process
    words = ["--model", model, "--cluster.replicas", str(replicas), "--engine.max-model-len", "2048"]
    words += ["--engine.kv-cache-gib", "1"]
    with tempfile.TemporaryDirectory() as data:
        os.environ["SYNTHIA_DATA"] = data
        settings = load_settings(words)
        plan = plan_replica(settings, inspect_machine(), [])
        with running(words, console) as (port, seconds):
            settings.port = port
            report: dict[str, Any] = {"machine": machine(), "version": __version__, "model": plan.name}
            report |= {"replicas": replicas, "rounds": rounds, "seconds to start": round(seconds, 1)}
            results = throughput(settings, plan, rounds, console)
            report |= {"results": results, "ratios": ratios(results)}
            report["prefix cache hits"] = prefix_cache(words, settings, plan.name, console)
    output.write_text(json.dumps(report, indent=1) + "\n")
    show(report, console)
    console.print(f"written to {output}", highlight=False)


def throughput(settings: Settings, plan: EnginePlan, rounds: int, console: Console) -> dict[str, list[float]]:
    """Tokens a second at each way in."""
    os.environ["OPENAI_API_KEY"] = engine_key(settings)  # what vLLM's load generator shows
    with ways_in(settings, plan.name) as urls:
        results: dict[str, list[float]] = {name: [] for name in urls}
        for number in range(-1, rounds):  # round -1 warms up and is not counted
            for name, url in rotated(list(urls.items()), number):
                requests = LOAD.requests if number >= 0 else LOAD.streams
                figure = asyncio.run(measure(url, replace(LOAD, requests=requests), plan, number))
                if number >= 0:
                    results[name].append(figure)
            console.print(f"round {number + 1} of {rounds} done", highlight=False)
    return results


def prefix_cache(words: list[str], settings: Settings, model: str, console: Console) -> dict[str, float]:
    """Share of prompt tokens that were in a replica's prefix cache, by routing."""
    found = {}
    for routing in ("affinity", "round_robin"):
        up([*words, "--port", str(settings.port), "--replicas.routing", routing])
        before = _cache_counters(settings.port)
        asyncio.run(_converse(f"http://127.0.0.1:{settings.port}", model, routing[0]))
        after = _cache_counters(settings.port)
        hits, queries = (now - then for now, then in zip(after, before, strict=True))
        found[routing] = round(hits / queries, 3)
        console.print(f"prefix cache with {routing}: {found[routing]:.1%} of {queries:.0f} tokens", highlight=False)
    return found


async def _converse(url: str, model: str, salt: str) -> None:
    """Conversations of several turns, all at once; nothing of one is in another, nor in another run's (`salt`)."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def conversation(number: int) -> None:
            messages: list[dict[str, str]] = []
            for turn in range(TURNS):
                text = " ".join(f"{salt}{number}x{turn}w{word}" for word in range(WORDS_A_TURN))
                messages.append({"role": "user", "content": text})
                body = {"model": model, "messages": messages, "max_tokens": REPLY_TOKENS, "min_tokens": REPLY_TOKENS}
                reply = await client.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                answer = reply.json()["choices"][0]["message"]["content"] or "…"
                messages.append({"role": "assistant", "content": answer})

        await asyncio.gather(*(conversation(number) for number in range(CONVERSATIONS)))


def _cache_counters(port: int) -> tuple[float, float]:
    """Hits and queries of all replicas' prefix caches, in tokens, as the gateway's own page tells them."""
    hits = queries = 0.0
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            hits += sample.value if sample.name == "vllm:prefix_cache_hits_total" else 0
            queries += sample.value if sample.name == "vllm:prefix_cache_queries_total" else 0
    return hits, queries


def ratios(results: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of the ratios within each round."""
    found = {}
    for one, other in PAIRS:
        values = [a / b for a, b in zip(results[one], results[other], strict=True)]
        spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        found[f"64 streams: tokens/s, {one} / {other}"] = {name: round(value, 3) for name, value in spread.items()}
    return found


def show(report: Mapping[str, Any], console: Console) -> None:
    figures = Table("way in", "tokens/s, median", title="64 streams")
    for name, values in report["results"].items():
        figures.add_row(name, f"{statistics.median(values):.1f}")
    console.print(figures)
    pairs = Table("pair", "median", "least", "greatest", title="within each round")
    for name, values in report["ratios"].items():
        pairs.add_row(name, *(str(value) for value in values.values()))
    console.print(pairs)


def markdown(report: Mapping[str, Any]) -> str:
    """The table that the README quotes."""
    rows = [f"| {name} | {v['median']} ({v['min']} to {v['max']}) |\n" for name, v in report["ratios"].items()]
    rows.append(f"| seconds until {report['replicas']} replicas serve | {report['seconds to start']} |\n")
    hits = report["prefix cache hits"]
    rows += [f"| prompt tokens found in the prefix cache, {name} | {share} |\n" for name, share in hits.items()]
    return "| figure, in one run | median (least to greatest) |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    main()
