"""What a run comes to: the file of results, and the table that docs/gpu.md quotes."""

from collections.abc import Mapping
from typing import Any

from synthia_vllm.bench.roofline import bound, mean_context
from synthia_vllm.bench.run_file import Roofline, Run
from synthia_vllm.bench.summary import METRICS, Load, Summary, tokens_of

# Ours, theirs, streams (None: each), at least. From the issue that asked for this kit.
TARGETS: tuple[tuple[str, str, int | None, float], ...] = (
    ("ours", "vllm", None, 0.98),
    ("ours-fp8", "vllm-fp8", None, 0.98),
    ("ours", "card", 64, 14.0),
    ("ours-fp8", "ours", 1, 1.5),
)
ROOFLINE_SHARE = 0.75  # of the bandwidth roofline, at one stream
GAIN = "gain over vLLM's defaults"  # what a profile's file calls it
PROFILE_GAIN = 1.15  # goodput of the tuned profile over vLLM's defaults
_SHOWN = ("output_throughput", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
NOT_MEASURED = "not measured"


def results(run: Run, goodput: Mapping[str, float]) -> dict[str, Any]:
    """Figures by server and streams, with the bound of the roofline beside each, and the ratios pair by pair."""
    summary = Summary(run)
    rows, ratios = [], {}
    for load in summary.loads("closed"):
        for server in summary.servers(load):
            row: dict[str, Any] = {"server": server, "streams": load.streams}
            for name in _SHOWN:
                estimate = summary.estimate(server, load, name)
                row[name] = round(estimate.value * METRICS[name][2], 2) if estimate else None
            row["processor_us"] = processor_us(summary, server, load)
            if run.roofline is not None and load.streams and row["output_throughput"]:
                context = mean_context(summary, server, load)
                row["bound"] = round(bound(roofline_of(run.roofline, server), load.streams, context), 1)
                row["share"] = round(row["output_throughput"] / row["bound"], 3)
            rows.append(row)
        for ours, theirs, streams, _ in TARGETS:
            found = summary.ratio(ours, theirs, load) if streams in (None, load.streams) else None
            if found is not None:
                ratios[f"{ours} / {theirs}, {load.streams} streams"] = round(found.value, 3)
    return {
        "machine": run.machine,
        "versions": run.versions,
        "model": run.model,
        "options": run.options,
        "roofline": run.roofline.model_dump() if run.roofline else None,
        "rows": rows,
        "ratios": ratios,
        "goodput": {name: round(value, 2) for name, value in goodput.items()},
        "startup_s": {server.name: server.startup_s for server in run.servers if server.startup_s is not None},
        "memory_gib": {
            server.name: round(server.memory_bytes / 2**30, 2) for server in run.servers if server.memory_bytes
        },
        "left_out": {server.name: server.missing for server in run.servers if server.missing},
    }


def processor_us(summary: Summary, server: str, load: Load) -> float | None:
    """Of the API process, microseconds a token, in all rounds together; None where it was not taken."""
    taken = [found for found in summary.measurements(server, load) if found.processor_s is not None]
    tokens = sum(tokens_of(request) for found in taken for request in found.requests)
    return round(1e6 * sum(found.processor_s or 0.0 for found in taken) / tokens, 1) if tokens else None


def roofline_of(roofline: Roofline, server: str) -> Roofline:
    """In FP8 a weight is half as many bytes; the matrix rate stays bf16's, which bounds no small batch."""
    if not server.endswith("-fp8"):
        return roofline
    return roofline.model_copy(update={"weight_bytes": roofline.weight_bytes // 2})


def markdown(report: Mapping[str, Any] | None, tuned: Mapping[str, Any] | None = None) -> str:
    """Each target with what was measured; without a report all of them say so."""
    lines = ["| figure | target | measured |", "|---|---|---|"]
    for ours, theirs, streams, least in TARGETS:
        where = f"{streams} stream{'s' if streams != 1 else ''}" if streams else "at every number of streams, the least"
        lines.append(
            f"| tokens/s, {ours} / {theirs}, {where} | ≥ {least:g} | {_ratio(report, ours, theirs, streams)} |"
        )
    share = next((row.get("share") for row in _rows(report) if (row["server"], row["streams"]) == ("ours", 1)), None)
    lines.append(f"| share of the bandwidth roofline, ours, 1 stream | ≥ {ROOFLINE_SHARE:g} | {_text(share)} |")
    gain = tuned["measured"].get(GAIN) if tuned else None
    lines.append(f"| goodput, tuned profile / vLLM's defaults | ≥ {PROFILE_GAIN:g} | {_text(gain)} |")
    if report is None:
        return "\n".join(lines)
    heads = [
        "server",
        "streams",
        "tokens/s",
        "TTFT p50, ms",
        "p99",
        "ITL p50, ms",
        "p99",
        "API process, µs a token",
        "roofline, tokens/s",
        "share",
    ]
    lines += ["", f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in report["rows"]:
        cells = [row["server"], row["streams"], *(row[name] for name in _SHOWN)]
        cells += [row.get("processor_us"), row.get("bound"), row.get("share")]
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    lines += ["", "| server | start, s | memory, GiB | goodput, requests/s |", "|---|---:|---:|---:|"]
    for name, seconds in report["startup_s"].items():
        cells = [name, seconds, report["memory_gib"].get(name, ""), report["goodput"].get(name, "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _ratio(report: Mapping[str, Any] | None, ours: str, theirs: str, streams: int | None) -> str:
    if report is None:
        return NOT_MEASURED
    start = f"{ours} / {theirs}, "
    found = [
        value
        for name, value in report["ratios"].items()
        if name.startswith(start) and streams in (None, int(name.removeprefix(start).split()[0]))
    ]
    return _text(min(found, default=None))


def _rows(report: Mapping[str, Any] | None) -> list[Any]:
    return list(report["rows"]) if report else []


def _text(value: Any) -> str:
    return NOT_MEASURED if value is None else f"{value:g}"
