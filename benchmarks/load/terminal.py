"""What a run comes to, for the terminal. The report has the rest."""

from rich.console import Console
from rich.table import Table

from benchmarks.load.run_file import Measurement, Run
from benchmarks.load.summary import METRICS, Load, Summary, summarize

_SHOWN = ("output_throughput", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
# Which server is held against which of its group.
_OURS = ("ours", "cluster")
_GROUPS = {
    "ours": ("card", "card-batched", "vllm-default", "vllm-tuned", "llama.cpp"),
    "cluster": ("ray-normal", "ray-direct"),
}


def show(run: Run, console: Console) -> None:
    """Medians over the rounds, ratios pair by pair, and everything that went wrong."""
    summary = Summary(run)
    for load in summary.loads():
        console.print(_figures(summary, load))
    ratios = _ratios(summary)
    if ratios.row_count:
        console.print(ratios)
    for server in run.servers:
        if server.missing:
            console.print(f"left out: {server.name}: {server.missing}", highlight=False, markup=False)
    for name, kinds in summary.errors().items():
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        console.print(f"errors: {name}: {told}", highlight=False, markup=False)
    for found in summary.invalid:
        why = "; ".join(found.invalid)
        console.print(
            f"invalid: {found.server}, {found.workload}, round {found.round + 1}: {why}", highlight=False, markup=False
        )


def line(measurement: Measurement, summary_of: Summary) -> str:
    """One measurement in one line, as progress."""
    figures = summarize(measurement, summary_of.slo)
    load = f"{measurement.workload}" + (f", {measurement.streams}" if measurement.streams else "")
    load += f", {measurement.rate:g}/s" if measurement.rate else ""
    told = f"{figures.output_throughput:7.1f} tokens/s, TTFT {1000 * figures.ttft.p50:.0f} ms, "
    told += f"ITL {1000 * figures.itl.p50:.1f} ms"
    wrong = f", {figures.failed} went wrong" if figures.failed else ""
    wrong += ", invalid" if measurement.invalid else ""
    return f"round {measurement.round + 1}  {load:44} {measurement.server:13} {told}{wrong}"


def _figures(summary: Summary, load: Load) -> Table:
    table = Table("server", *(f"{METRICS[name][0]}, {METRICS[name][1]}" for name in _SHOWN), title=str(load))
    for server in summary.servers(load):
        cells = []
        for name in _SHOWN:
            found = summary.estimate(server, load, name)
            cells.append("" if found is None else f"{found.value * METRICS[name][2]:.1f}")
        table.add_row(server, *cells)
    return table


def _ratios(summary: Summary) -> Table:
    table = Table("tokens/s", "load", "ratio, 95 % interval", title="pair by pair within each round")
    for ours in _OURS:
        for load in summary.loads("closed"):
            for theirs in _GROUPS[ours]:
                if (found := summary.ratio(ours, theirs, load)) is not None:
                    table.add_row(f"{ours} / {theirs}", str(load), found.text())
    return table
