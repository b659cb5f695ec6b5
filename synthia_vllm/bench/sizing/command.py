"""`synthia-vllm bench size`: how many replicas a load needs."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from synthia_vllm.bench.run_file import Run, read
from synthia_vllm.bench.summary import DEFAULT_ITL_MS, DEFAULT_TTFT_MS, Slo

if TYPE_CHECKING:
    from synthia_vllm.bench.sizing.answer import Answer, Trial, Wanted

_POSITIVE = click.FloatRange(0, min_open=True)


@click.command("size")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rate", type=_POSITIVE, required=True, help="Requests a second of all users together.")
@click.option("--users", type=click.IntRange(1), default=1, show_default=True, help="That share the rate evenly.")
@click.option("--prompt-tokens", type=_POSITIVE, default=512, show_default=True, help="Mean.")
@click.option("--output-tokens", type=_POSITIVE, default=256, show_default=True, help="Mean.")
@click.option(
    "--spread",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="Standard deviation of both lengths over their mean (log-normal).",
)
@click.option("--ttft-ms", type=_POSITIVE, default=DEFAULT_TTFT_MS, show_default=True, help="p99 TTFT to hold.")
@click.option("--itl-ms", type=_POSITIVE, default=DEFAULT_ITL_MS, show_default=True, help="p99 ITL to hold.")
@click.option("--server", help="Of the file, whose engine it is (default: ours).")
@click.option("--requests", type=click.IntRange(100, 1_000_000), help="To simulate (default: five minutes of them).")
@click.option("--autoscale", is_flag=True, help="And how the autoscaler does with the same load.")
@click.option(
    "--startup-s",
    type=click.FloatRange(0),
    default=100.0,
    show_default=True,
    help="--autoscale: from the decision to a replica that answers.",
)
@click.option(
    "--save", is_flag=True, help="Put the answer, and how far the simulator is off, into the file and its report."
)
def command(
    file: Path,
    rate: float,
    users: int,
    prompt_tokens: float,
    output_tokens: float,
    spread: float,
    ttft_ms: float,
    itl_ms: float,
    server: str | None,
    requests: int | None,
    autoscale: bool,
    startup_s: float,
    save: bool,
) -> None:
    """Find the least number of replicas that holds an SLO, by simulation. Exits with 1 where 1,000 do not.

    FILE is the JSON file of a `bench run`: the engine's step times are taken from it.
    """
    from synthia_vllm.bench.sizing.answer import MOST_REPLICAS, Wanted, size
    from synthia_vllm.bench.sizing.check import calibrated, check
    from synthia_vllm.bench.sizing.simulator import ONE_REPLICA

    told = Console(stderr=True)
    wanted = Wanted(users, rate, prompt_tokens, output_tokens, Slo(ttft_ms / 1000, itl_ms / 1000), spread, requests)
    try:
        run = read(file)
        with told.status("calibrating the engine on the measurements"):
            name, model = calibrated(run, server)
        if save:
            run = check(run, server)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    full = model.rate(prompt_tokens, output_tokens)
    told.print(f"engine of {name}: at most {full:.2f} requests a second with these lengths", highlight=False)

    def progress(trial: "Trial") -> None:
        verdict = "holds" if trial.holds else "does not hold"
        told.print(f"{trial.replicas} replicas, {trial.requests} requests: {verdict}", highlight=False)

    cluster = dataclasses.replace(ONE_REPLICA, startup_s=startup_s)
    answer = size(model, wanted, cluster, autoscale=autoscale, told=progress)
    if save:
        store(run, wanted, answer, file)
    table = Table("replicas", "requests", "TTFT p50/p99, ms", "ITL p50/p99, ms", "SLO met", "tokens/s", "holds")
    for trial in answer.trials:
        table.add_row(*_row(trial, str(trial.replicas)))
    if answer.scaled is not None:
        table.add_row(*_row(answer.scaled, f"scaled: {answer.scaled.mean_replicas:.1f}"))
    console = Console()
    console.print(table)
    if answer.replicas is None:
        console.print(f"not even {MOST_REPLICAS} replicas hold it: a request alone may be too slow for the SLO")
        sys.exit(1)
    console.print(f"{answer.replicas} replica{'s' if answer.replicas > 1 else ''} hold it", highlight=False)


def store(run: Run, wanted: "Wanted", answer: "Answer", file: Path) -> None:
    """Into the run's file beside the check, and the report anew if there is one."""
    from synthia_vllm.bench.report import write_report
    from synthia_vllm.bench.run_file import report_beside, write
    from synthia_vllm.bench.sizing.check import answered

    run = answered(run, wanted, answer)
    write(run, file)
    if (page := report_beside(file)).exists():
        write_report(run, page)


def _row(trial: "Trial", name: str) -> list[str]:
    def ms(seconds: float) -> str:
        return f"{1000 * seconds:.0f}"

    share = "" if math.isnan(trial.attainment) else f"{trial.attainment:.1%}"
    rate = "" if math.isnan(trial.output_throughput) else f"{trial.output_throughput:.0f}"
    waits, gaps = f"{ms(trial.ttft_p50)} / {ms(trial.ttft_p99)}", f"{ms(trial.itl_p50)} / {ms(trial.itl_p99)}"
    if not math.isfinite(trial.ttft_p99):
        waits, gaps = "too long", ""
    return [name, str(trial.requests), waits, gaps, share, rate, "yes" if trial.holds else "no"]
