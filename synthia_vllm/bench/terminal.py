"""What a run comes to, for the terminal. The report has the rest."""

from math import isnan

from rich.console import Console
from rich.table import Table

from synthia_vllm.bench.gateway_standing import behind, compared, figures
from synthia_vllm.bench.groups import GROUPS, OURS
from synthia_vllm.bench.run_file import Measurement, Run
from synthia_vllm.bench.summary import METRICS, Slo, Summary, summarize
from synthia_vllm.bench.verdict import in_short

_SHOWN = ("output_throughput", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
_HEADS = ("tokens/s", "TTFT p50, ms", "p99", "ITL p50, ms", "p99")


def show(run: Run, console: Console) -> None:
    """Tells where ours is behind, what won, medians over the rounds, ratios, and everything that went wrong."""
    summary = Summary(run)

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for sentence in in_short(summary):
        tell(sentence)
    for table in (_behind(summary), _gateways(summary), _figures(summary), _ratios(summary)):
        if table.row_count:
            console.print(table)
    for server in run.servers:
        if server.missing:
            tell(f"left out: {server.name}: {server.missing}")
    for name, kinds in summary.errors().items():
        tell(f"errors: {name}: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
        if words := summary.words_of(name):
            tell(f"  the first of them: {words}")
    for found in summary.invalid:
        tell(f"invalid: {found.server}, {load_name(found)}, round {found.round + 1}: {'; '.join(found.invalid)}")


def line(measurement: Measurement, slo: Slo) -> str:
    """One measurement in one line, as progress."""
    figures = summarize(measurement, slo)
    told = f"{figures.output_throughput:7.1f} tokens/s, TTFT {1000 * figures.ttft.p50:.0f} ms"
    told += "" if isnan(figures.itl.p50) else f", ITL {1000 * figures.itl.p50:.1f} ms"
    told += f", {figures.failed} went wrong" if figures.failed else ""
    told += ", invalid" if measurement.invalid else ""
    return f"round {measurement.round + 1}  {load_name(measurement):36} {measurement.server:13} {told}"


def load_name(measurement: Measurement) -> str:
    """With what tells it from its sisters."""
    if measurement.streams is not None:
        return f"{measurement.workload}, {measurement.streams} stream{'s' * (measurement.streams > 1)}"
    return measurement.workload if measurement.rate is None else f"{measurement.workload}, {measurement.rate:g}/s"


def _behind(summary: Summary) -> Table:
    """First of all where our gateway is behind, or that it is not."""
    table = Table("figure", "load", "ours", "ahead of it", title="where our gateway is behind")
    for found in behind(summary):
        table.add_row(found.figure.title, found.where, found.own(), found.words())
    if not table.row_count and (rivals := compared(summary)):
        table.add_row("none", "", "", f"not {', '.join(rivals)}")
    return table


def _gateways(summary: Summary) -> Table:
    heads, rows = figures(summary)
    table = Table(*heads, title="gateways before one engine, medians over the rounds")
    before = ""
    for load, *cells in rows:
        if load != before:
            table.add_section()
        table.add_row("" if load == before else load, *cells)
        before = load
    return table


def _figures(summary: Summary) -> Table:
    table = Table("load", "server", title="medians over the rounds")
    for head in _HEADS:
        table.add_column(head, justify="right")
    for load in summary.loads():
        for at, server in enumerate(summary.servers(load)):
            estimates = [(name, summary.estimate(server, load, name)) for name in _SHOWN]
            cells = [f"{found.value * METRICS[name][2]:.1f}" if found else "" for name, found in estimates]
            table.add_row("" if at else str(load), server, *cells)
        table.add_section()
    return table


def _ratios(summary: Summary) -> Table:
    table = Table("tokens/s", "load", "ratio", title="pair by pair within each round")
    for ours, members in zip(OURS, GROUPS.values(), strict=True):
        for load in summary.loads("closed"):
            for theirs in members[:-1]:
                if (found := summary.ratio(ours, theirs, load)) is not None:
                    table.add_row(f"{ours} / {theirs}", str(load), found.text())
    return table
