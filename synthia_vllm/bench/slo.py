"""`synthia-vllm bench slo`: the highest rate of an open loop at which p99 TTFT and p99 ITL hold."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from synthia_vllm.bench.client import Target
from synthia_vllm.bench.measuring import Terms, measure, quantile
from synthia_vllm.bench.prompts import Span
from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.workloads import OpenLoop


@dataclass(frozen=True)
class Trial:
    """One open loop at one rate. Milliseconds; None where no reply told. `invalid`: it was repeated."""

    rate: float
    number: int
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    requests: int
    errors: int
    invalid: list[str]
    holds: bool

    def __str__(self) -> str:
        said = "invalid" if self.invalid else "holds" if self.holds else "does not hold"
        figures = f"p99 TTFT {_ms(self.ttft_p99_ms)}, p99 ITL {_ms(self.itl_p99_ms)}, {self.errors} errors"
        return f"{self.rate:6.2f}/s: {figures}: {said}"


@dataclass
class Search:
    """Trials at rates on demand: a rate holds if most of its trials do."""

    run: Callable[[float, int], Awaitable[Measurement]]
    ttft_ms: float
    itl_ms: float
    repeats: int
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.trials: list[Trial] = []

    async def holds(self, rate: float) -> bool:
        """Trials until most agree. Those whose client was late don't count, as long as they are no more than half."""
        votes: list[bool] = []
        needed = self.repeats // 2 + 1
        for number in range(2 * self.repeats):
            trial = self._judge(await self.run(rate, number), rate, number)
            self.trials.append(trial)
            if not trial.invalid or number >= self.repeats:
                votes.append(trial.holds)
            self.say(str(trial))
            if max(votes.count(True), votes.count(False)) >= needed:
                break
        return votes.count(True) >= needed

    def _judge(self, found: Measurement, rate: float, number: int) -> Trial:
        whole = [request for request in found.requests if request.error is None]
        waits = [request.chunk_s[0] - request.sent_s for request in whole]
        gaps = [b - a for request in whole for a, b in pairwise(request.chunk_s)]
        ttft = round(1000 * quantile(waits, 0.99), 3) if waits else None
        itl = round(1000 * quantile(gaps, 0.99), 3) if gaps else None
        errors = len(found.requests) - len(whole)
        holds = not errors and ttft is not None and ttft <= self.ttft_ms and (itl is None or itl <= self.itl_ms)
        return Trial(rate, number, ttft, itl, len(found.requests), errors, list(found.invalid), holds)


async def bisect(
    holds: Callable[[float], Awaitable[bool]],
    start: float,
    precision: float,
    least: float,
    most: float,
    growth: float = 2.0,
) -> tuple[float | None, float | None]:
    """The highest rate that holds and the lowest that does not, no further apart than `precision` (a share).

    Multiplies or divides by `growth` from `start` on until both are known. None: not even `least` holds, or `most`
    does.
    """
    low, high, rate = None, None, start
    while low is None or high is None:
        if await holds(rate):
            low = rate
            if rate >= most:
                return low, None
            rate = min(most, growth * rate)
        else:
            high = rate
            if rate <= least:
                return None, high
            rate = max(least, rate / growth)
        if low is not None and high is not None:
            break
    while high > low * (1 + precision):
        rate = (low + high) / 2
        if await holds(rate):
            low = rate
        else:
            high = rate
    return low, high


@click.command("slo")
@click.option("--server", "server", metavar="URL", help="One that runs (default: starts `synthia-vllm serve`).")
@click.option("--key", help="--server: its key.")
@click.option("--served-model", help="--server: the model's name there (default: the first that it lists).")
@click.option("--model", help="Without --server: folder, hub id or 'demo'.")
@click.option(
    "--ttft-ms",
    type=click.FloatRange(0, min_open=True),
    default=1000.0,
    show_default=True,
    help="What p99 TTFT must not exceed.",
)
@click.option(
    "--itl-ms",
    type=click.FloatRange(0, min_open=True),
    default=250.0,
    show_default=True,
    help="What p99 ITL must not exceed.",
)
@click.option(
    "--start",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="The first rate, requests a second.",
)
@click.option(
    "--most",
    type=click.FloatRange(0, min_open=True),
    default=1000.0,
    show_default=True,
    help="The highest rate to try.",
)
@click.option(
    "--precision",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="How far apart, as a share, the answer's two sides may be.",
)
@click.option(
    "--trials", type=click.IntRange(1), default=3, show_default=True, help="At each rate; most of them decide."
)
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="Of each trial.")
@click.option(
    "--burstiness",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="1: Poisson; less: bursts.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--output-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A run's file to add it to (default: a new one)."
)
def command(output: Path | None, **options: Any) -> None:
    """Search for the rate at which the SLO breaks, by bisection with repeated trials.

    Each trial is an open loop without a cap on requests at once. A rate holds if, in most trials, p99 of TTFT and of
    ITL are within the limits and no request failed.
    """
    from synthia_vllm.bench.records import attach, default_path
    from synthia_vllm.bench.servers import one_server

    console = Console(stderr=True, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    with one_server(options, say) as (name, target):
        search, low, high = asyncio.run(_search(target, name, options, say))
    found: dict[str, Any] = {name: options[name] for name in _TOLD}
    found |= {"server": name, "rate": low, "fails_at": high, "trials": [asdict(trial) for trial in search.trials]}
    table = Table("server", "holds up to, requests/s", "fails at", "p99 TTFT, ms", "p99 ITL, ms")
    table.add_row(name, _rate(low), _rate(high), f"{options['ttft_ms']:g}", f"{options['itl_ms']:g}")
    Console().print(table)
    path = output or default_path("slo")
    attach(path, "slo", found, {name: options[name] for name in _TOLD})
    console.print(f"written: {path}", highlight=False)


_TOLD = ("ttft_ms", "itl_ms", "precision", "seconds", "burstiness", "prompt_tokens", "output_tokens", "seed")


async def _search(
    target: Target, name: str, options: dict[str, Any], say: Callable[[str], None]
) -> tuple[Search, float | None, float | None]:
    terms = Terms(options["seed"])
    lengths = Span.of(options["prompt_tokens"]), Span.of(options["output_tokens"])

    async def run(rate: float, number: int) -> Measurement:
        load = OpenLoop(rate, options["seconds"], *lengths, burstiness=options["burstiness"])
        return await measure(target, load, terms, server=name, number=number)

    search = Search(run, options["ttft_ms"], options["itl_ms"], options["trials"], say)
    await run(options["start"], -1)  # warms up
    least = 1 / options["seconds"]  # one request
    low, high = await bisect(search.holds, options["start"], options["precision"], least, options["most"])
    return search, low, high


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} ms"


def _rate(value: float | None) -> str:
    return "none tried" if value is None else f"{value:.2f}"
