"""Writes the figures of `benchmarks/results` into the documents that quote them: `python -m benchmarks.measured`.

A document has a table between `<!-- measured: NAME -->` and `<!-- end -->`. With --check nothing is written, and the
exit code is 1 where a document is not what the results say.
"""

import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import click

from benchmarks import cache_sharing, chaos, cluster, cost, eval_agreement, eval_speed, exporter, fairness, serving
from benchmarks.gpu import table as gpu
from synthia_vllm.bench import gateway_standing, quoted
from synthia_vllm.bench.run_file import read
from synthia_vllm.bench.summary import Summary
from synthia_vllm.engine.profiles import FOLDER, read_profile

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_IN_FLIGHT = "most tokens in flight, of what the engines hold"
_MARKED = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def headline() -> str:
    """The README's: a figure a row, and the command that measured it."""
    run = Summary(read(RESULTS / "full.json.gz"))
    load = next(load for load in run.loads("closed") if load.streams == 64)
    card, default = (run.ratio("ours", theirs, load) for theirs in ("card", "vllm-default"))
    assert card is not None
    assert default is not None
    full = "synthia-vllm bench run --profile full"
    process = result("api_process")["ratios"]["processor, µs a token: ours / vllm"]["median"]
    h200, profile = result("gpu/h200")["ratios"], read_profile(FOLDER / "h200-11b.yaml")
    scenarios, fair = result("chaos")["scenarios"], result("fairness")["summary"]
    real, null = (scenarios[name]["summary"] for name in ("demo, float32", "null"))
    light = {name: fair[f"light user, long prompts: p95 TTFT beside / alone, {name}"] for name in ("vtc", "fcfs")}
    rows = [
        ("tokens/s at 64 streams / the card's script", f"{card.value:.1f}", full),
        ("the same / vLLM's server as it starts by default, in eager mode", f"{default.value:.2f}", full),
        (
            "processor time a streamed token of the API process / vLLM's",
            f"{process:.2f}",
            "python -m benchmarks.api_process",
        ),
        (
            "tokens/s at 256 streams / vLLM's server with the same options, 11B on one H200",
            f"{h200['ours / vllm, 256 streams']:.2f}",
            "python -m benchmarks.gpu",
        ),
        (
            "rate at which p99 TTFT 450 ms and p99 ITL 40 ms hold / vLLM's defaults, the same H200",
            f"{profile.measured[gpu.GAIN]:.1f}",
            "python -m benchmarks.gpu tune",
        ),
        (
            f"broken streams under `kill -9` of replicas: of {real['streams']:,} on two real ones; "
            f"of {null['streams']:,} on 16 stand-ins",
            f"{real['broken streams']}; {null['broken streams']}",
            "python -m benchmarks.chaos",
        ),
        (
            "p95 TTFT of long prompts of a light user beside a heavy one / alone (first come, first served)",
            f"{light['vtc']:.2f} ({light['fcfs']:.0f})",
            "python -m benchmarks.fairness",
        ),
    ]
    lines = [f"| {figure} | {value} | `{command}` |" for figure, value, command in rows]
    cost = behind_rivals("processor, µs a token", 64)
    least = min(cost.ahead, key=lambda one: one.theirs.value)
    short = fair["light user, short prompts: p95 TTFT beside / alone, vtc"]
    times = cost.ours.value / least.theirs.value
    before = _before_one_engine()
    many = next(load for load in before.loads("closed") if load.streams == 256)
    carried, smg = (before.ratio(name, "direct", many) for name in ("gateway", "smg"))
    assert carried is not None
    assert smg is not None
    behind = (
        f"Where it is behind: the gateway alone takes {times:.1f} times the processor of {least.server}, in Rust, and "
        f"at 256 streams on two cores that it shares carries {carried.value:.2f} of what the engine makes "
        f"(smg: {smg.value:.2f}); "
        f"a light user's short prompts wait {short:.1f} times as long beside a heavy one; at 1 stream on the H200 ours "
        f"made {h200['ours / vllm, 1 streams']:.3f} of vLLM's tokens/s."
    )
    return "\n".join(["| | | measured by |", "|---|---:|---|", *lines, "", *textwrap.wrap(behind, 120)])


@cache
def _before_one_engine() -> Summary:
    """Read once: it is large, and README and docs both quote it."""
    return Summary(read(RESULTS / "rivals.json.gz"))


def rivals() -> str:
    """Our gateway and others before one engine, load by load; medians of the rounds."""
    heads, rows = gateway_standing.figures(_before_one_engine())
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---", "---", *["---:"] * (len(heads) - 2)], *rows)]
    return "\n".join(lines)


def behind_rivals(title: str, streams: int) -> gateway_standing.Behind:
    """Where ours is behind in a figure, with so many streams, and whom. Raises StopIteration where it is not."""
    found = gateway_standing.behind(_before_one_engine())
    return next(one for one in found if one.figure.title == title and one.load and one.load.streams == streams)


def ratios(*names: str) -> Callable[[], str]:
    """The ratios of runs, each within a run."""

    def made() -> str:
        lines = ["| figure, in one run | median | least | greatest |", "|---|---:|---:|---:|"]
        for name in names:
            for figure, found in result(name)["ratios"].items():
                lines.append(f"| {figure} | {found['median']} | {found['least']} | {found['greatest']} |")
        return "\n".join(lines)

    return made


def start() -> str:
    """Medians of the rounds, and the ratio within them."""
    found = result("start")
    lines = [f"| medians of {found['rounds']} rounds | forked | spawned | ratio |", "|---|---:|---:|---:|"]
    for figure, servers in found["results"].items():
        forked, spawned = (statistics.median(servers[name]) for name in ("forked", "spawned"))
        ratio = found["ratios"][f"{figure}: forked / spawned"]
        told = f"{ratio['median']} ({ratio['least']} to {ratio['greatest']})"
        lines.append(f"| {figure} | {forked:.1f} | {spawned:.1f} | {told} |")
    return "\n".join(lines)


def soak() -> str:
    """What an hour of all kinds of users came to."""
    found = result("soak")
    answers = sum(sum(told.values()) for told in found["answers"].values())
    rows = [
        ("minutes of load", f"{found['minutes']:g}"),
        ("answers", f"{answers:,}"),
        ("of them, of a kind that may not be", f"{sum(found['unexpected answers'].values())}"),
        ("times that a store was stopped, started or stood still", f"{sum(found['faults'].values())}"),
    ]
    for name, one in found["processes"].items():
        slope, margin = one["anonymous, an hour"], one["anonymous, an hour, 95 %"]
        rows.append((f"{name}: MB allocated, more an hour", f"{slope} ± {margin}"))
    for what in ("generated", "prompt"):
        rows.append(
            (f"{what} tokens counted and not accounted for", f"{found['bill'][f'{what}: counted, not accounted for']}")
        )
    rows.append(("promises missed", "; ".join(found["missed"]) or "none"))
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def several_gateways() -> str:
    """What several gateways share, what the death of one costs its clients, and what it costs to share."""
    fair, cost = result("shared_fairness"), result("sharing_cost")
    summary = fair["summary"]
    rows = [
        (
            f"{fair['options']['users']} users at 4 gateways, {len(fair['kills'])} killed in "
            f"{fair['options']['seconds']:.0f} s: gap in service / one gateway's bound",
            summary["of one gateway's bound"],
        ),
        ("the same: most tokens in flight / what the engines hold", summary[_IN_FLIGHT]),
    ]
    for scenario, told in result("gateway_loss_null")["scenarios"].items():
        if "pause p95" in told:
            lost = told["failed"] + told["other texts"] + told["other token counts"]
            what = f"{told['replies']} streams, {scenario}"
            rows.append((f"{what}: failed, or with other tokens", lost))
            rows.append((f"{what}: tokens billed / counted by clients", told["billed / counted by clients"]))
            usual = told["any gap p95"]
            rows.append((f"{what}: pause, s, p95 (any gap: {usual:.2f})", f"{told['pause p95']:.2f}"))
    for figure, ratio in cost["ratios"].items():
        if "shared / limits" in figure:
            rows.append((figure, f"{ratio['median']} ({ratio['least']} to {ratio['greatest']})"))
    return "\n".join(["| figure | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


def _page(module: Any) -> Callable[[], str]:
    def made() -> str:
        text: str = module.markdown(result(module.__name__.rpartition(".")[2]))
        return text

    return made


TABLES: Mapping[str, Callable[[], str]] = {
    "headline": headline,
    "processes": ratios("api_process"),
    "rivals": rivals,
    "open_connections": ratios("open_connections"),
    "several-gateways": several_gateways,
    "soak": soak,
    "start": start,
    "full": lambda: quoted.markdown(read(RESULTS / "full.json.gz")),
    "gpu-h100": lambda: gpu.markdown(result("gpu/h100")),
    "gpu-h200": lambda: gpu.markdown(result("gpu/h200"), read_profile(FOLDER / "h200-11b.yaml").model_dump()),
    **{
        module.__name__.rpartition(".")[2]: _page(module)
        for module in (cache_sharing, chaos, cluster, cost, eval_agreement, eval_speed, exporter, fairness, serving)
    },
}


def filled(page: str) -> str:
    """A document with its tables as the results have them. Raises KeyError for a table that there is not."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]().strip()}\n{found[3]}", page)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where a document differs.")
def main(check: bool) -> None:
    """Write the tables of README and docs from benchmarks/results."""
    texts = {page: page.read_text() for page in PAGES}
    stale = {page: new for page, text in texts.items() if (new := filled(text)) != text}
    for page, new in stale.items():
        click.echo(f"{page.relative_to(ROOT)}{': differs from the results' if check else ''}")
        if not check:
            page.write_text(new)
    sys.exit(1 if stale and check else 0)


if __name__ == "__main__":
    main()
