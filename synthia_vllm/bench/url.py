"""`synthia-vllm bench url`: any server that speaks OpenAI's API, from one stream to as many as it has use for."""

import asyncio
import csv
import dataclasses
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.clients import Clients, client_processes
from synthia_vllm.bench.dataset import Entry, read_dataset
from synthia_vllm.bench.measuring import Terms, measure, whole
from synthia_vllm.bench.probe import ProbeError, probe, target_of
from synthia_vllm.bench.prompts import Lengths, Normal, Span, lengths
from synthia_vllm.bench.records import Recorder, default_path, new_run
from synthia_vllm.bench.report import write_report
from synthia_vllm.bench.run_file import Measurement, Server, report_beside
from synthia_vllm.bench.sources import AsText, FromFile, MadeUp, Prefixed, Source
from synthia_vllm.bench.summary import METRICS, Figures, Slo, summarize
from synthia_vllm.bench.workloads import ClosedLoop

Say = Callable[[str], None]
PROMPT, OUTPUT = Span(32, 32), Span(64, 64)
GAIN = 1.05  # twice as many streams that make less than so many times the tokens: the server has no use for more
_LEAST_WAVES = 2  # replies of each stream in a step, at least
_HEADS = ("streams", "tokens/s", "req/s", "TTFT", "p95", "p99", "ITL", "p99", "E2EL", "failed")
_UNITS = "TTFT: p50, p95, p99, ms; ITL: p50, p99, ms; E2EL: p95, s"


class _Lengths(click.ParamType[Lengths]):
    """`prompts.lengths`."""

    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lengths:
        try:
            return value if isinstance(value, Span | Normal) else lengths(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


LENGTHS = _Lengths()


@click.command("url")
@click.argument("url")
@click.option("--key", envvar="SYNTHIA_API_KEY", help="API key (also SYNTHIA_API_KEY).")
@click.option("--served-model", help="The model's name there (default: the first that it lists).")
@click.option("--completions", is_flag=True, help="/v1/completions with text, not the chat route.")
@click.option(
    "--prompt-tokens", type=LENGTHS, metavar="LENGTH", show_default="32", help="About, as words: 512, 128-512, 512:128."
)
@click.option(
    "--output-tokens",
    type=LENGTHS,
    metavar="LENGTH",
    show_default=f"{OUTPUT}, and of a data set's replies their own",
    help="512, 128-512 (evenly), or 512:128 (mean and standard deviation).",
)
@click.option(
    "--dataset",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts of this file, in a random order: ShareGPT's JSON, or lines with messages or prompt.",
)
@click.option("--most-tokens", type=click.IntRange(2), help="--dataset: longer entries, about, are left out.")
@click.option("--shared-prefix-tokens", type=click.IntRange(1), help="The first so many of each prompt are the same.")
@click.option("--prefixes", type=click.IntRange(1), default=1, show_default=True, help="So many different ones.")
@click.option("--seed", default=1, show_default=True, help="Of lengths and order; made-up words are new in each run.")
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

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    source = source_of(options, say)
    target = target_of(url, options)
    chat = not options["completions"]
    try:
        target = asyncio.run(probe(dataclasses.replace(target, chat=chat), chat=chat))
    except ProbeError as error:
        raise click.ClickException(f"{target.url} answers no request of {target.model}: {error}") from None
    if target.omit:
        say(f"it does not take or heed {', '.join(sorted(target.omit))}")
    said = {name: _told(value) for name, value in options.items() if name != "key" and value is not None}
    recorder = Recorder(new_run("url", said, {"name": target.model}), output or default_path("url"))
    slo = Slo(options["ttft_ms"] / 1000, options["itl_ms"] / 1000)
    code = 0
    with Clients(options["clients"] or client_processes()) as clients:
        try:
            asyncio.run(sweep(target, source, Terms(clients=clients), recorder, slo, options, say))
        except KeyboardInterrupt:
            say("interrupted: what was measured so far is kept")
            code = 130
    if not recorder.run.measurements:
        sys.exit(code)
    page, table = report_beside(recorder.path), recorder.path.with_suffix(".csv")
    write_report(recorder.run, page)
    write_csv(recorder.run.measurements, slo, options["price_per_hour"], table)
    say(f"written: {recorder.path}, {table} and {page}")
    sys.exit(code or (0 if any(map(whole, recorder.run.measurements)) else 1))


def source_of(options: Mapping[str, Any], say: Say) -> Source:
    """What the options ask to be sent. Raises ClickException that names the option, or the file's line."""
    prompt, output = options["prompt_tokens"] or PROMPT, options["output_tokens"]
    prefix, seed, salt = options["shared_prefix_tokens"] or 0, str(options["seed"]), secrets.token_hex(4)
    source: Source
    if options["dataset"] is not None:
        if options["prompt_tokens"] is not None:
            raise click.UsageError(
                "--prompt-tokens: --dataset's prompts are as long as they are; leave one of them out"
            )
        source = FromFile(_entries(options["dataset"], options["most_tokens"], say), output, OUTPUT, seed)
    else:
        if prefix >= prompt.mean:
            raise click.UsageError(
                f"--shared-prefix-tokens {prefix}: part of each prompt's {prompt} tokens, so fewer are wanted; "
                f"or give more of --prompt-tokens"
            )
        source = MadeUp(prompt, output or OUTPUT, seed, salt, already=prefix)
    if prefix:
        source = Prefixed(source, prefix, options["prefixes"], seed, salt)
    return AsText(source) if options["completions"] else source


def _entries(path: Path, most: int | None, say: Say) -> list[Entry]:
    entries = read_dataset(path)
    kept = [e for e in entries if most is None or e.prompt_tokens + (e.output_tokens or 0) <= most]
    if not kept:
        raise click.UsageError(f"--most-tokens {most}: all {len(entries)} entries of {path} are longer; give more")
    longer = f", {len(entries) - len(kept)} longer ones left out" if len(kept) < len(entries) else ""
    say(f"{path}: {len(kept)} prompts{longer}; where more requests are sent, they come again")
    return kept


async def sweep(
    target: Target, source: Source, terms: Terms, recorder: Recorder, slo: Slo, options: Any, say: Say
) -> None:
    """Measures step by step, with a table that grows. Ends where more streams bring nothing, or all requests fail.

    Raises ClickException where nothing comes of the warm-up.
    """
    warm = await measure(target, loop(4, 8, source, "warm-up"), terms, server="server", number=-1)
    if not whole(warm):
        raise click.ClickException(f"{target.url} answered none of {len(warm.requests)} requests: {words(warm)}")
    recorder.take_servers([Server(name="server", title=target.url)])
    console = Console()
    table = table_of(options["price_per_hour"])
    live = Live(table, console=console, refresh_per_second=4) if console.is_terminal else nullcontext()
    seconds_a_wave, best = 0.0, 0.0
    with live:
        for streams in doubled(options["most_streams"]):
            waves = max(_LEAST_WAVES, round(options["seconds"] / seconds_a_wave)) if seconds_a_wave else _LEAST_WAVES
            load = loop(streams, waves * streams, source)
            found = await measure(target, load, terms, server="server", number=0)
            recorder.take(found)
            figures = summarize(found, slo)
            table.add_row(*cells(streams, figures, options["price_per_hour"], found.invalid))
            if not whole(found):
                say(f"none of {len(found.requests)} requests was answered: {words(found)}")
                break
            seconds_a_wave = found.duration_s / waves
            if figures.output_throughput < GAIN * best:
                break
            best = max(best, figures.output_throughput)
    if not console.is_terminal:
        console.print(table)


def loop(streams: int, requests: int, source: Source, label: str = "") -> ClosedLoop:
    return ClosedLoop(streams, requests, label=label, calls=tuple(source.take(requests)))


def words(found: Measurement) -> str:
    """The server's own, to the first request that went wrong."""
    request = next(request for request in found.requests if request.error is not None)
    return f"{request.error}: {request.detail}" if request.detail else str(request.error)


def _told(value: Any) -> Any:
    """As the run's file has it."""
    return str(value) if isinstance(value, Path | Span | Normal) else value


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
