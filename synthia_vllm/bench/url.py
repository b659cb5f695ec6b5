"""`synthia-vllm bench url`: any server that speaks OpenAI's API, from one stream to as many as it has use for."""

import asyncio
import csv
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.clients import Clients, client_processes
from synthia_vllm.bench.measuring import Terms, measure, whole
from synthia_vllm.bench.probe import ProbeError, probe
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.records import Recorder, default_path, new_run
from synthia_vllm.bench.report import write_report
from synthia_vllm.bench.run_file import Measurement, Server, report_beside
from synthia_vllm.bench.servers import target_of
from synthia_vllm.bench.summary import METRICS, Figures, Slo, summarize
from synthia_vllm.bench.workloads import ClosedLoop

GAIN = 1.05  # twice as many streams that make less than so many times the tokens: the server has no use for more
_LEAST_WAVES = 2  # replies of each stream in a step, at least
_HEADS = ("streams", "tokens/s", "req/s", "TTFT", "p95", "p99", "ITL", "p99", "E2EL", "failed")
_UNITS = "TTFT: p50, p95, p99, ms; ITL: p50, p99, ms; E2EL: p95, s"


@click.command("url")
@click.argument("url")
@click.option("--key", envvar="SYNTHIA_API_KEY", help="API key (also SYNTHIA_API_KEY).")
@click.option("--served-model", help="The model's name there (default: the first that it lists).")
@click.option("--completions", is_flag=True, help="/v1/completions with text, not the chat route.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True, help="About; words are sent.")
@click.option("--output-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--most-streams", type=click.IntRange(1), default=256, show_default=True, help="The sweep ends there.")
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="Of each step, about.")
@click.option("--price-per-hour", type=click.FloatRange(0), help="Of the server: tells the price of a million tokens.")
@click.option("--clients", type=click.IntRange(1), help="Client processes (default: one for each four cores).")
@click.option("--ttft-ms", type=click.FloatRange(0, min_open=True), default=1000.0, show_default=True, help="SLO.")
@click.option("--itl-ms", type=click.FloatRange(0, min_open=True), default=250.0, show_default=True, help="SLO.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), show_default="bench/TIME-url.json", help="The run."
)
def command(url: str, output: Path | None, **options: Any) -> None:
    """Sweep the server at URL from one stream to saturation: 1, 2, 4, … at once, until more bring nothing.

    Asks first which fields it takes, so that servers other than vLLM can be measured. Writes every request (JSON), a
    table (CSV) and a report (HTML). Ctrl-C keeps what there is. Exit code 1 where the server answers no request.
    """
    console = Console(stderr=True, soft_wrap=True)
    target = target_of(url, options)
    chat = not options["completions"]
    try:
        target = asyncio.run(probe(dataclasses.replace(target, chat=chat), chat=chat))
    except ProbeError as error:
        raise click.ClickException(f"{target.url} answers no request of {target.model}: {error}") from None
    if target.omit:
        console.print(f"it does not take or heed {', '.join(sorted(target.omit))}", highlight=False)
    said = {name: value for name, value in options.items() if name != "key"}
    recorder = Recorder(new_run("url", said, {"name": target.model}), output or default_path("url"))
    recorder.take_servers([Server(name="server", title=target.url)])
    slo = Slo(options["ttft_ms"] / 1000, options["itl_ms"] / 1000)
    code = 0
    with Clients(options["clients"] or client_processes()) as clients:
        try:
            asyncio.run(sweep(target, Terms(clients=clients), recorder, slo, options))
        except KeyboardInterrupt:
            console.print("interrupted: what was measured so far is kept", highlight=False)
            code = 130
    if not recorder.run.measurements:
        sys.exit(code)
    page, table = report_beside(recorder.path), recorder.path.with_suffix(".csv")
    write_report(recorder.run, page)
    write_csv(recorder.run.measurements, slo, options["price_per_hour"], table)
    console.print(f"written: {recorder.path}, {table} and {page}", highlight=False)
    sys.exit(code or (0 if any(map(whole, recorder.run.measurements)) else 1))


async def sweep(target: Target, terms: Terms, recorder: Recorder, slo: Slo, options: Any) -> None:
    """Measures step by step, with a table that grows. Ends where more streams bring nothing, or all requests fail."""
    console = Console()
    table = table_of(options["price_per_hour"])
    lengths = Span.of(options["prompt_tokens"]), Span.of(options["output_tokens"])
    chat = not options["completions"]
    live = Live(table, console=console, refresh_per_second=4) if console.is_terminal else nullcontext()
    seconds_a_wave, best = 0.0, 0.0
    with live:
        warm = ClosedLoop(4, 8, *lengths, "warm-up", chat=chat)
        await measure(target, warm, terms, server="server", number=-1)
        for streams in doubled(options["most_streams"]):
            waves = max(_LEAST_WAVES, round(options["seconds"] / seconds_a_wave)) if seconds_a_wave else _LEAST_WAVES
            load = ClosedLoop(streams, waves * streams, *lengths, chat=chat)
            found = await measure(target, load, terms, server="server", number=0)
            recorder.take(found)
            figures = summarize(found, slo)
            table.add_row(*cells(streams, figures, options["price_per_hour"], found.invalid))
            if not whole(found):
                break
            seconds_a_wave = found.duration_s / waves
            if figures.output_throughput < GAIN * best:
                break
            best = max(best, figures.output_throughput)
    if not console.is_terminal:
        console.print(table)


def doubled(most: int) -> Iterator[int]:
    """1, 2, 4, … and `most`."""
    streams = 1
    while streams < most:
        yield streams
        streams *= 2
    yield most


def table_of(price: float | None) -> Table:
    heads = [*_HEADS, *(["per 1M"] if price is not None else [])]
    told = "; per 1M: what a million generated tokens cost" if price is not None else ""
    table = Table(box=None, padding=(0, 1, 0, 0), caption=_UNITS + told, caption_justify="left")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def cells(streams: int, figures: Figures, price: float | None, invalid: list[str]) -> list[str]:
    """A row of `table_of`; in brackets where the client, not the server, was the limit."""
    told = [
        f"{figures.output_throughput:.1f}",
        f"{figures.request_throughput:.2f}",
        *(f"{1000 * value:.0f}" for value in (figures.ttft.p50, figures.ttft.p95, figures.ttft.p99)),
        *(f"{1000 * value:.1f}" for value in (figures.itl.p50, figures.itl.p99)),
        f"{figures.e2el.p95:.2f}",
        str(figures.failed or ""),
    ]
    told += [f"{cost(figures, price):.2f}"] if price is not None else []
    return [f"({streams})" if invalid else str(streams), *(word.replace("nan", "–") for word in told)]


def cost(figures: Figures, price: float) -> float:
    """Of a million generated tokens at so much an hour, in the same money."""
    return price / 3600 / figures.output_throughput * 1e6 if figures.output_throughput else float("nan")


def write_csv(measurements: list[Measurement], slo: Slo, price: float | None, file: Path) -> None:
    """One row a step: streams, requests, failures, then the figures in their units, and whether it counts."""
    names = list(METRICS)
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream)
        heads = [f"{METRICS[name][0]}, {METRICS[name][1]}" for name in names]
        rows.writerow(["streams", "requests", "failed", *heads, "price of a million tokens", "invalid"])
        for found in measurements:
            figures = summarize(found, slo)
            values = [round(METRICS[name][4](figures) * METRICS[name][2], 3) for name in names]
            money = round(cost(figures, price), 4) if price is not None else ""
            told = [found.streams, len(found.requests), figures.failed, *values, money, "; ".join(found.invalid)]
            rows.writerow(told)
