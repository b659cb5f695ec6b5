"""The report of a run: one HTML file with everything in it, which loads nothing from anywhere."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from synthia_vllm.bench import gateway_standing
from synthia_vllm.bench.fairness import fairness
from synthia_vllm.bench.groups import OURS
from synthia_vllm.bench.pictures import Pictures
from synthia_vllm.bench.plots import Plot
from synthia_vllm.bench.run_file import Run, read, report_beside
from synthia_vllm.bench.summary import METRICS, Summary, load_of
from synthia_vllm.bench.targets import targets
from synthia_vllm.bench.verdict import sureness, verdicts, winners

_FIRST = "Throughput against latency"  # the section that follows the verdict
# What each kind of error means to who reads it.
_MEANINGS = {
    "stalled": "the stream stopped sending and did not end",
    "cut": "the connection closed before the reply was whole",
    "usage": "the server's count of tokens is not what its client saw",
    "short": "fewer tokens than were asked for",
    "connection": "no connection, or none that held until the answer",
    "malformed": "a chunk that is no JSON",
    "error event": "an error inside the stream, after status 200",
}


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def write_report(run: Run, path: Path) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(render(run), encoding="utf-8")
    beside.replace(path)


@click.command("report")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: beside the file, .html.")
def command(file: Path, output: Path | None) -> None:
    """Write the report of a run anew. FILE is the JSON file that `bench run` wrote."""
    try:
        run = read(file)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    output = output or report_beside(file)
    write_report(run, output)
    click.echo(output)


def render(run: Run) -> str:
    """As HTML."""
    summary = Summary(run)
    drawn, found = Pictures(summary).all(), verdicts(summary)
    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["markup"] = Markup
    return environment.get_template("report.html.jinja").render(
        run=run,
        summary=summary,
        load_of=load_of,
        metrics=METRICS,
        began=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.started_at)),
        gateways=_gateways(summary),
        tiles=_tiles(summary),
        verdicts=found,
        winners=winners(summary),
        sureness=sureness(found),
        silent=[(summary.title(name), _why(summary, name)) for name in summary.silent()],
        faults=_faults(summary),
        missing=[server for server in run.servers if server.missing],
        targets=targets(summary),
        plots=_grouped(drawn),
        first=_FIRST,
        users=list(_users(summary)),
        limits=[
            (title, part, [plot for plot in drawn if plot.key.startswith(key)])
            for title, key, part in (
                ("Highest rate that holds the SLO", "slo-", run.slo),
                ("Ceiling of the serving layer", "ceiling-", run.ceiling),
                ("Replicas killed under load", "chaos-", run.chaos),
            )
            if part
        ],
        sizing=_sizing(run.sizing) if run.sizing else None,
        sizing_model=run.sizing.get("model") if run.sizing else None,
        answer=_answer(run.sizing["answer"]) if run.sizing and "answer" in run.sizing else None,
        figures=[_figures(summary, kind, title) for kind, title in _KINDS if summary.loads(kind)],
    )  # fmt: skip


_KINDS = (
    ("closed", "Closed loops"),
    ("open", "Open loops"),
    ("conversations", "Conversations"),
    ("users", "Users at once"),
    ("trace", "Traces"),
)


@dataclass(frozen=True)
class Fault:
    """One kind of error of one server."""

    server: str
    kind: str
    meaning: str
    count: int
    of: int
    example: str


def _faults(summary: Summary) -> list[Fault]:
    sent = Counter[str]()
    examples: dict[tuple[str, str], str] = {}
    for measurement in summary.run.measurements:
        sent[measurement.server] += len(measurement.requests)
        for request in measurement.requests:
            if request.error is not None and request.detail:
                examples.setdefault((measurement.server, request.error), request.detail)
    return [
        Fault(summary.title(server), kind, _meaning(kind), count, sent[server], examples.get((server, kind), "")[:300])
        for server, kinds in summary.errors().items()
        for kind, count in kinds.most_common()
    ]


def _why(summary: Summary, server: str) -> str:
    """Of one that answered nothing: the commonest error, and its own words."""
    kinds = summary.errors().get(server)
    if not kinds:
        return "it was sent nothing"
    kind, count = kinds.most_common(1)[0]
    said = summary.words_of(server)
    return f"{kind} ({count} requests)" + (f": {said}" if said else "")


def _meaning(kind: str) -> str:
    return _MEANINGS.get(kind, f"answered with status {kind[5:]}" if kind.startswith("http ") else "")


def _gateways(summary: Summary) -> tuple[Table, Table] | None:
    """Where our gateway is behind its rivals, and all figures; None in a run without them."""
    rivals = gateway_standing.compared(summary)
    if not rivals:
        return None
    rows = [[found.figure.title, found.where, found.own(), found.words()] for found in gateway_standing.behind(summary)]
    title = f"Behind {', '.join(rivals)} in no figure" if not rows else "Where it is behind"
    return Table(title, ["figure", "load", "ours", "ahead of it"], rows), Table(
        "All of them", *gateway_standing.figures(summary)
    )


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The figures that a reader wants first, of ours: value, unit, what it is."""
    server = next((name for name in (*OURS, *summary.servers()) if name in summary.servers()), None)
    loads = [load for load in summary.loads("closed") if server and (server, load) in summary.cells]
    if server is None or not loads:
        return []
    title = summary.title(server)
    most, least = max(loads, key=lambda x: x.streams or 0), min(loads, key=lambda x: x.streams or 0)
    found = []
    for load, metric in ((most, "output_throughput"), (least, "ttft_p50"), (most, "itl_p50")):
        _, unit, factor, _, _ = METRICS[metric]
        if (estimate := summary.estimate(server, load, metric)) is not None:
            found.append((f"{estimate.value * factor:.0f}", unit, f"{METRICS[metric][0]} of {title}, {load}"))
    return found


def _grouped(plots: Iterable[Plot]) -> dict[str, list[Plot]]:
    """By section."""
    sections = {
        "tradeoff": _FIRST, "throughput": "Throughput", "cdf": "Latency", "time": "Latency",
        "goodput": "Goodput", "gap": "Fairness", "service": "Fairness", "roofline": "Roofline",
    }  # fmt: skip
    found: dict[str, list[Plot]] = {}
    for plot in plots:
        if (section := sections.get(plot.key.split("-")[0])) is not None:
            found.setdefault(section, []).append(plot)
    return found


def _figures(summary: Summary, kind: str, title: str) -> Table:
    columns = ["load", "server", *(f"{name}, {unit}" for name, unit, *_ in METRICS.values()), "good", "rounds"]
    rows = []
    for load in summary.loads(kind):
        for server in summary.servers(load):
            cells = []
            for metric, (_, _, factor, _, _) in METRICS.items():
                values = [factor * value for value in summary.rounds(server, load, metric).values()]
                cells.append(_estimate(values))
            own = [figures for _, figures in summary.cells[server, load]]
            good = sum(f.attainment for f in own) / len(own)
            rows.append([str(load), summary.title(server), *cells, f"{good:.0%}", str(len(own))])
    return Table(title, columns, rows)


def _estimate(values: list[float]) -> str:
    from synthia_vllm.bench.estimates import median

    found = median(values)
    if found is None:
        return "–"
    return found.text(0 if found.value >= 100 else 1 if found.value >= 10 else 2)


def _users(summary: Summary) -> Iterable[Table]:
    for load in summary.loads("users", "trace"):
        rows = []
        for server in summary.servers(load):
            found = fairness(summary.measurements(server, load)[0], summary.slo)
            rows += [
                [
                    summary.title(server), user.name or "–", f"{user.weight:g}", str(user.requests), str(user.failed),
                    f"{1000 * user.ttft.p50:.0f} / {1000 * user.ttft.p99:.0f}",
                    f"{1000 * user.itl.p50:.1f} / {1000 * user.itl.p99:.1f}",
                    f"{user.attainment:.0%}", f"{user.service:.0f}", f"{found.jain:.3f}",
                ]
                for user in found.users[:20]
            ]  # fmt: skip
        columns = ["server", "user", "weight", "requests", "failed", "TTFT p50 / p99, ms", "ITL p50 / p99, ms",
                   "SLO met", "service, weighted tokens", "Jain's index of all"]  # fmt: skip
        yield Table(str(load), columns, rows)


def _sizing(sizing: Mapping[str, Any]) -> Table:
    def pair(row: Mapping[str, Any], name: str, factor: float) -> str:
        return f"{factor * row[f'measured_{name}']:.1f} / {factor * row[f'simulated_{name}']:.1f}"

    rows = [
        [
            row["load"], "calibrated on" if row["calibrated"] else "held out", str(row["requests"]),
            pair(row, "ttft_p50", 1000), pair(row, "ttft_p99", 1000),
            f"{1000 * row['measured_ttft_p99_low']:.0f} to {1000 * row['measured_ttft_p99_high']:.0f}",
            pair(row, "throughput", 1), ", ".join(f"{error:+.0%}" for error in row["errors"]),
            "" if row["calibrated"] else "yes" if all(abs(e) <= sizing["tolerance"] for e in row["errors"]) else "no",
        ]
        for row in sorted(sizing["rows"], key=lambda row: row["calibrated"])
    ]  # fmt: skip
    columns = [
        "load", "used", "requests", "TTFT p50, ms: measured / simulated", "TTFT p99, ms: measured / simulated",
        "measured p99, 95 % interval", "tokens/s: measured / simulated", "errors: p50, p99, tokens/s",
        f"within {sizing['tolerance']:.0%}",
    ]  # fmt: skip
    return Table(f"The simulator against the measurement, {sizing['server']}", columns, rows)


def _answer(answer: Mapping[str, Any]) -> Table:
    wanted = answer["wanted"]
    slo = wanted["slo"]

    def ms(value: float | None) -> str:
        return "too long" if value is None else f"{1000 * value:.0f}"

    rows = [
        [
            str(trial["replicas"]), str(trial["requests"]), ms(trial["ttft_p50"]), ms(trial["ttft_p99"]),
            ms(trial["itl_p50"]), ms(trial["itl_p99"]),
            "–" if trial["attainment"] is None else f"{trial['attainment']:.1%}", "yes" if trial["holds"] else "no",
        ]
        for trial in answer["trials"]
    ]  # fmt: skip
    replicas = answer["replicas"]
    hold = "no number of replicas holds" if replicas is None else f"{replicas} replica{'s' * (replicas > 1)} for"
    lengths = f"{wanted['prompt_tokens']:g} prompt and {wanted['output_tokens']:g} output tokens"
    limits = f"p99 TTFT {1000 * slo['ttft_s']:g} ms, p99 ITL {1000 * slo['itl_s']:g} ms"
    asked = f"{hold} {wanted['rate']:g} requests a second of {wanted['users']} users, {lengths}, {limits}"
    columns = ["replicas", "requests simulated", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms", "ITL p99, ms",
               "SLO met", "holds"]  # fmt: skip
    return Table(asked[0].upper() + asked[1:], columns, rows)
