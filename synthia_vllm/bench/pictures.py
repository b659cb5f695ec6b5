"""The pictures of the report: which data goes into each, and what it says in words."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from synthia_vllm.bench.estimates import ENOUGH, Estimate, median
from synthia_vllm.bench.fairness import fairness
from synthia_vllm.bench.groups import OURS
from synthia_vllm.bench.plots import BAND, INK, Plot, Style, drawing, swatch
from synthia_vllm.bench.roofline import bound, mean_context, points
from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.summary import Load, Summary, gaps, pooled, ttft
from synthia_vllm.bench.targets import main_family

_BINS = 24


class Pictures:
    """Draws what the run has data for."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        silent = summary.silent()
        names = [name for name in summary.servers() if name not in silent]
        # Ours first, so that it has the same looks in every report.
        self.order = sorted(names, key=lambda name: (name not in OURS, names.index(name)))
        self.styles = {name: Style(number) for number, name in enumerate(self.order)}

    def all(self) -> list[Plot]:
        made = [*self.tradeoff(), *self.throughput(), *self.distributions(), *self.over_time(), *self.goodput()]
        made += [*self.fairness(), *self.roofline(), *trials(self.summary.run.slo or {})]
        made += [*ceiling(self.summary.run.ceiling or {}), *chaos(self.summary.run.chaos or {})]
        return [plot for plot in made if plot.rows]  # one without figures would be empty axes

    def tradeoff(self) -> Iterable[Plot]:
        """What more streams bring and what they cost, of all servers."""
        family = main_family(self.summary)
        loads = [x for x in self.summary.loads("closed") if x.family == family and x.streams is not None]
        if len(loads) < 2:
            return
        # Not ITL: of a server that sends tokens in twos every other gap is none.
        for key, title in (("ttft", "time to first token"), ("tpot", "time per output token")):
            plot = Plot(f"tradeoff-{key}", f"Throughput against {title}: {family}", "")
            plot.columns = ("server", *(f"{x.streams} stream{'s' * (x.streams != 1)}" for x in loads))
            plot.note = (
                f"Up and to the left is better. One point for each number of streams: "
                f"{', '.join(str(load.streams) for load in loads)}; those of {self.summary.title(self.order[0])} "
                "are written at them. Medians over the rounds. In the table: tokens/s at ms."
                if self.order
                else ""
            )
            found = {server: list(self._tradeoff(server, loads, key)) for server in self._with(loads)}
            servers = [server for server, known in found.items() if known]
            with drawing(plot, x=f"median {title}, milliseconds", y="output tokens a second") as axes:
                for server in servers:
                    known = found[server]
                    first = server == self.order[0]
                    axes.plot(
                        [x for _, x, _ in known], [y for _, _, y in known], zorder=5 if first else 3,
                        **self.styles[server].marked,
                    )  # fmt: skip
                    for streams, x, y in known if first else ():
                        axes.annotate(f"{streams}", (x, y), (-5, 5), textcoords="offset points", color=INK, ha="right")
                    told = {n: f"{y:.0f} at {x:.0f}" for n, x, y in known}
                    plot.rows.append((self.summary.title(server), *(told.get(load.streams, "") for load in loads)))
                axes.set_xscale("log")
                _plain_ticks(axes)
                axes.set_ylim(bottom=0)
                plot.alt = _alt(f"Output tokens a second at milliseconds of {title}, by number of streams", plot)
            yield self._with_legend(plot, servers)

    def _tradeoff(self, server: str, loads: Sequence[Load], key: str) -> Iterable[tuple[int | None, float, float]]:
        """Streams, milliseconds, tokens a second; without those of a server that sends a reply in one piece."""
        for load in loads:
            waits = median([getattr(figures, key).p50 for _, figures in self.summary.cells.get((server, load), [])])
            tokens = self.summary.estimate(server, load, "output_throughput")
            if waits is not None and tokens is not None and waits.value > 0:
                yield load.streams, 1000 * waits.value, tokens.value

    def throughput(self) -> Iterable[Plot]:
        for nth, family in enumerate(_families(self.summary, "closed")):
            loads = [x for x in self.summary.loads("closed") if x.family == family and x.streams is not None]
            if len(loads) < 2:
                continue
            plot = Plot(f"throughput-{nth}", f"Throughput against streams: {family}", "")
            plot.columns = ("server", *(f"{load.streams}" for load in loads))
            servers = self._with(loads)
            rounds = max((len(self.summary.measurements(s, x)) for s in servers for x in loads), default=0)
            plot.note = "Bars: " + ("95 % interval." if rounds >= ENOUGH else "from the least round to the greatest.")
            with drawing(plot, x="streams at once", y="output tokens a second") as axes:
                for server in servers:
                    found = {x.streams or 0: self.summary.estimate(server, x, "output_throughput") for x in loads}
                    known = {streams: value for streams, value in found.items() if value is not None}
                    axes.errorbar(
                        list(known), [value.value for value in known.values()], yerr=_bars(list(known.values())),
                        capsize=2.5, elinewidth=1, zorder=5 if server == self.order[0] else 3,
                        **self.styles[server].marked,
                    )  # fmt: skip
                    plot.rows.append((self.summary.title(server), *(v.text(1) if v else "" for v in found.values())))
                axes.set_xscale("log", base=2)
                _plain_ticks(axes, [load.streams or 0 for load in loads])
                axes.set_ylim(bottom=0)
                plot.alt = _alt("Output throughput by number of streams", plot)
            yield self._with_legend(plot, servers)

    def distributions(self) -> Iterable[Plot]:
        family = main_family(self.summary)
        loads = [x for x in self.summary.loads("closed") if x.family == family]
        if not loads:
            return
        load = max(loads, key=lambda x: (len(self.summary.servers(x)), x.streams or 0))
        for key, title, of in (
            ("ttft", "Time to first token", lambda r: [ttft(r)]),
            ("itl", "Inter-token latency", gaps),
        ):
            plot = Plot(f"cdf-{key}", f"{title}, distribution: {load}", "", columns=("server", "p50", "p90", "p99"))
            servers = []
            with drawing(plot, x="milliseconds", y="share of " + ("requests" if key == "ttft" else "tokens")) as axes:
                for server in self._with([load]):
                    values = 1000 * np.sort(pooled(self.summary.measurements(server, load), of))
                    if not len(values):
                        continue
                    share = np.linspace(0, 1, 201)
                    x = np.maximum(np.quantile(values, share), 0.1)
                    axes.plot(x, share, markevery=(0.1, 0.2), **self.styles[server].marked)
                    servers.append(server)
                    told = (f"{q:.1f} ms" for q in np.percentile(values, [50, 90, 99]))
                    plot.rows.append((self.summary.title(server), *told))
                axes.set_xscale("log")
                _plain_ticks(axes)
                axes.set_ylim(0, 1.02)
                plot.alt = _alt(f"Distribution of {title.lower()} under {load}", plot)
            if servers:
                yield self._with_legend(plot, servers)

    def over_time(self) -> Iterable[Plot]:
        load = self._busiest()
        if load is None:
            return
        for key, title in (("ttft", "Time to first token"), ("itl", "Inter-token latency")):
            plot = Plot(
                f"time-{key}", f"{title} over time: {load}", "", columns=("server", "first third", "last third")
            )
            plot.note = "Line: median of the moment; band: 10th to 90th percentile. One round."
            servers = self._with([load])[:4]
            with drawing(plot, x="seconds since the measurement began", y="milliseconds") as axes:
                for server in servers:
                    at, values = _over_time(self.summary.measurements(server, load)[0], key)
                    if len(at) < 4:
                        continue
                    x, (low, middle, high) = _binned(at, 1000 * values)
                    style = self.styles[server]
                    axes.fill_between(x, low, high, color=style.colour, alpha=0.14, linewidth=0)
                    axes.plot(x, middle, markevery=4, **style.marked)
                    third = at.min() + (at.max() - at.min()) / 3 * np.arange(1, 3)
                    ends = np.median(values[at <= third[0]]), np.median(values[at >= third[1]])
                    plot.rows.append((self.summary.title(server), *(f"{1000 * value:.1f} ms" for value in ends)))
                axes.set_ylim(bottom=0)
                plot.alt = _alt(f"Median {title.lower()} over time under {load}", plot)
            yield self._with_legend(plot, servers)

    def goodput(self) -> Iterable[Plot]:
        slo = self.summary.slo
        for nth, family in enumerate(_families(self.summary, "open")):
            loads = [x for x in self.summary.loads("open") if x.family == family and x.rate is not None]
            if len(loads) < 2:
                continue
            plot = Plot(f"goodput-{nth}", f"Goodput against rate: {family}", "")
            plot.note = f"Requests with TTFT up to {1000 * slo.ttft_s:g} ms and TPOT up to {1000 * slo.itl_s:g} ms."
            plot.columns = ("server", *(f"{load.rate:g}/s" for load in loads))
            rates = [load.rate or 0.0 for load in loads]
            servers = self._with(loads)
            with drawing(plot, x="requests sent a second", y="requests a second that meet the SLO") as axes:
                axes.plot([0, max(rates)], [0, max(rates)], color=BAND, linewidth=1, linestyle=":")
                axes.annotate("all good", (max(rates), max(rates)), ha="right", va="bottom", color=INK, fontsize=9)
                for server in servers:
                    found = [self.summary.estimate(server, load, "goodput") for load in loads]
                    known = [(rate, value) for rate, value in zip(rates, found, strict=True) if value]
                    axes.errorbar(
                        [rate for rate, _ in known], [value.value for _, value in known],
                        yerr=_bars([value for _, value in known]), capsize=2.5, elinewidth=1,
                        **self.styles[server].marked,
                    )  # fmt: skip
                    plot.rows.append((self.summary.title(server), *(v.text() if v else "" for v in found)))
                axes.set_ylim(bottom=0)
                axes.set_xlim(left=0)
                plot.alt = _alt("Goodput by request rate", plot)
            yield self._with_legend(plot, servers)

    def fairness(self) -> Iterable[Plot]:
        shared = [
            (load, [s for s in self._with([load]) if _several_users(self.summary.measurements(s, load)[0])])
            for load in self.summary.loads("users", "trace")
        ]
        for nth, (load, servers) in enumerate(x for x in shared if x[1]):
            found = {
                server: fairness(self.summary.measurements(server, load)[0], self.summary.slo) for server in servers
            }
            plot = Plot(
                f"gap-{nth}", f"Accumulated service gap: {load}", "", columns=("server", "at the end", "Jain's index")
            )
            plot.note = "Tokens of prompt + 2 x generated, over weight: the most any user had more than any other."
            with drawing(plot, x="seconds since the measurement began", y="weighted tokens") as axes:
                for server, one in found.items():
                    axes.plot(one.times, one.gap, markevery=25, **self.styles[server].marked)
                    plot.rows.append((self.summary.title(server), f"{one.gap[-1]:.0f}", f"{one.jain:.3f}"))
                axes.set_ylim(bottom=0)
                plot.alt = _alt(f"Service gap over time under {load}", plot)
            yield self._with_legend(plot, servers)
            server = servers[0] if self.order[0] not in servers else self.order[0]
            one = found[server]
            plot = Plot(f"service-{nth}", f"Service of each user, {self.summary.title(server)}: {load}", "")
            plot.columns = ("user", "weighted tokens")
            users = list(one.services)[:9]
            with drawing(plot, x="seconds since the measurement began", y="weighted tokens") as axes:
                for number, user in enumerate(users):
                    axes.plot(one.times, one.services[user], markevery=25, **Style(number).marked)
                    plot.rows.append((user, f"{one.services[user][-1]:.0f}"))
                axes.set_ylim(bottom=0)
                plot.alt = _alt("Service of each user over time", plot)
            plot.legend = [(swatch(Style(number), plot.key), user) for number, user in enumerate(users)]
            yield plot

    def roofline(self) -> Iterable[Plot]:
        roofline, family = self.summary.run.roofline, main_family(self.summary)
        reached = points(self.summary, family)
        if roofline is None or not reached:
            return
        context = np.mean([
            mean_context(self.summary, server, load)
            for load in self.summary.loads("closed") if load.family == family for server in self._with([load])
        ])  # fmt: skip
        most = max(64, *(point.batch for point in reached))
        batches = np.geomspace(1, 2 * most, 100)
        limits = np.asarray([bound(roofline, batch, float(context)) for batch in batches])
        plot = Plot("roofline", "Roofline: how far from what the machine can do", "")
        plot.note = (
            f"Bound: {roofline.bandwidth_bytes_s / 1e9:.1f} GB/s of memory and {roofline.matrix_flops_s / 1e9:.0f} "
            f"GFLOP/s in {roofline.dtype}, {context:.0f} tokens of context. "
            + "".join(f"{note[:1].upper()}{note[1:]}. " for note in roofline.notes)
        )
        sizes = sorted({point.batch for point in reached})
        plot.columns = ("server", *(f"{size} streams" for size in sizes))
        servers = [server for server in self.order if any(point.server == server for point in reached)]
        with drawing(plot, x="batch (streams at once)", y="output tokens a second") as axes:
            axes.plot(batches, limits, color=INK, linewidth=1.4)
            axes.fill_between(batches, limits, limits.max() * 3, color=BAND, alpha=0.12, linewidth=0)
            axes.annotate(
                f"out of reach with {roofline.dtype} weights",
                (1.1, limits.max() * 1.6),
                color=INK,
                fontsize=9,
                va="center",
            )
            for server in servers:
                own = {point.batch: point for point in reached if point.server == server}
                axes.plot(list(own), [point.tokens_s for point in own.values()], **self.styles[server].marked)
                shares = (f"{own[size].share:.0%} of {own[size].bound:.0f}" if size in own else "" for size in sizes)
                plot.rows.append((self.summary.title(server), *shares))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylim(top=limits.max() * 3)
            _plain_ticks(axes, [float(size) for size in sizes])
            _plain_ticks(axes, axis="y")
            plot.alt = _alt("Output tokens a second by batch size, as a share of the bound", plot)
        yield self._with_legend(plot, servers)

    def _with(self, loads: Sequence[Load]) -> list[str]:
        """Servers with any of these, ours first."""
        return [server for server in self.order if any((server, load) in self.summary.cells for load in loads)]

    def _with_legend(self, plot: Plot, servers: Sequence[str]) -> Plot:
        plot.legend = [(swatch(self.styles[server], plot.key), self.summary.title(server)) for server in servers]
        return plot

    def _busiest(self) -> Load | None:
        """The open loop of the highest rate that most servers have; else the closed loop with most streams."""
        loads = self.summary.loads("open") or self.summary.loads("closed")
        return max(loads, key=lambda x: (len(self.summary.servers(x)), x.rate or 0.0, x.streams or 0), default=None)


def trials(slo: Mapping[str, Any]) -> Iterable[Plot]:
    """What each rate of `bench slo` came to, beside the limit."""
    for key, name in (("ttft", "TTFT"), ("itl", "ITL")):
        tried = [t for t in slo.get("trials", []) if t.get(f"{key}_p99_ms") is not None and not t.get("invalid")]
        limit = slo.get(f"{key}_ms")
        if not tried or limit is None:
            continue
        plot = Plot(f"slo-{key}", f"p99 {name} by rate, {slo.get('server', 'server')}", "")
        plot.columns = ("requests a second", f"p99 {name}, ms", "SLO")
        plot.note = f"One point a trial of {slo.get('seconds', 0):g} s; the line is the limit, {limit:g} ms."
        with drawing(plot, x="requests sent a second", y=f"p99 {name}, milliseconds") as axes:
            axes.axhline(limit, color=INK, linewidth=1.2, linestyle=":")
            for held, style, label in ((True, Style(0), "holds the SLO"), (False, Style(1), "does not hold it")):
                own = [(t["rate"], t[f"{key}_p99_ms"]) for t in tried if t["holds"] == held]
                axes.plot([x for x, _ in own], [y for _, y in own], **{**style.marked, "linestyle": ""})
                plot.legend.append((swatch(style, plot.key), label))
            reached = [limit, *(t[f"{key}_p99_ms"] for t in tried)]
            if max(reached) > 10 * min(reached):
                axes.set_yscale("log")
                _plain_ticks(axes, axis="y")
            else:
                axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            for trial in sorted(tried, key=lambda t: t["rate"]):
                said = "holds" if trial["holds"] else "does not hold"
                plot.rows.append((f"{trial['rate']:g}", f"{trial[f'{key}_p99_ms']:.0f}", said))
            plot.alt = _alt(f"p99 {name} of each trial beside the limit of {limit:g} ms", plot)
        yield plot


def ceiling(found: Mapping[str, Any]) -> Iterable[Plot]:
    """What our layers do around an engine that costs nothing, beside that engine bare."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for nth, (figure, variants) in enumerate(found.get("results", {}).items()):
        plot = Plot(f"ceiling-{nth}", figure[:1].upper() + figure[1:], "", columns=("what", "median", "times bare"))
        bare = float(np.median(variants["bare"])) if variants.get("bare") else None
        values = {name: sorted(own) for name, own in variants.items() if own}
        plot.note = "Median of the rounds; bars: from the least to the greatest. Bare: the null engine alone."
        with drawing(plot, x=figure, y="") as axes:
            for name, own in values.items():
                middle = float(np.median(own))
                ends = [[middle - own[0]], [own[-1] - middle]] if len(own) > 1 else None
                colour = BAND if name == "bare" else Style(0).colour
                axes.barh(name, middle, xerr=ends, color=colour, ecolor=INK, capsize=3, height=0.55)
                times = f"{middle / bare:.2f}" if bare else ""
                plot.rows.append((name, f"{middle:.4g}" if middle < 1000 else f"{middle:,.0f}", times))
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            plot.alt = _alt(figure, plot)
        yield plot


def chaos(found: Mapping[str, Any]) -> Iterable[Plot]:
    """How long streams paused when their replica was killed, beside their usual gaps between tokens."""
    for nth, (name, scenario) in enumerate(found.get("scenarios", {}).items()):
        told = scenario.get("summary", {})
        seconds = {key.replace(", s", ""): value for key, value in told.items() if ", s" in key and value is not None}
        plot = Plot(f"chaos-{nth}", f"Pauses of streams: {name}", "", columns=("what", "seconds"))
        kills, broken = told.get("kills", 0), told.get("broken streams", 0)
        plot.note = f"{kills} kills, {told.get('streams', 0)} streams, {broken} of them broken. Grey: without a kill."
        with drawing(plot, x="seconds", y="") as axes:
            for what, value in seconds.items():
                colour = Style(0).colour if what.startswith("pause") else BAND
                axes.barh(textwrap.fill(what, 22), value, color=colour, height=0.55)
                plot.rows.append((what, f"{value:.3f}"))
            axes.invert_yaxis()
            plot.alt = _alt(f"Pauses of streams, {name}", plot)
        yield plot


def _families(summary: Summary, kind: str) -> list[str]:
    return list(dict.fromkeys(load.family for load in summary.loads(kind)))


def _several_users(measurement: Measurement) -> bool:
    return len({request.user for request in measurement.requests}) > 1


def _bars(values: Sequence[Estimate]) -> list[list[float]]:
    """As matplotlib wants them: how far down and up."""
    return [
        [max(0.0, v.value - v.low) if v.low is not None else 0.0 for v in values],
        [max(0.0, v.high - v.value) if v.high is not None else 0.0 for v in values],
    ]


def _over_time(measurement: Measurement, key: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], ...]:
    pairs: list[tuple[float, float]] = []
    for request in measurement.requests:
        if request.error is None and request.chunk_s:
            if key == "ttft":
                pairs.append((request.chunk_s[0], ttft(request)))
            else:
                pairs += zip(request.chunk_s[1:], gaps(request), strict=True)
    found = np.asarray(sorted(pairs)).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _binned(
    at: np.ndarray[tuple[int], np.dtype[np.float64]], values: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> tuple[list[float], list[list[float]]]:
    """Middles of the bins that have values, and three percentiles of each."""
    edges = np.linspace(at.min(), at.max() + 1e-9, min(_BINS, max(2, len(at) // 4)) + 1)
    which = np.digitize(at, edges) - 1
    x, found = [], []
    for n in range(len(edges) - 1):
        if (inside := values[which == n]).size:
            x.append(float((edges[n] + edges[n + 1]) / 2))
            found.append(np.percentile(inside, [10, 50, 90]))
    return x, [[float(q[n]) for q in found] for n in range(3)]


def _plain_ticks(axes: object, at: Sequence[float] | None = None, axis: str = "x") -> None:
    """8, 100 and 1000, not 2^3 and 10^2."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    assert isinstance(axes, Axes)
    one = axes.xaxis if axis == "x" else axes.yaxis
    one.set_major_locator(FixedLocator(at) if at else LogLocator(base=10, subs=(1.0, 3.0), numticks=12))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _alt(what: str, plot: Plot) -> str:
    """The picture in words: its table."""
    lines = (
        f"{row[0]}: "
        + ", ".join(f"{head} {cell}" for head, cell in zip(plot.columns[1:], row[1:], strict=True) if cell)
        for row in plot.rows
    )
    return f"{what}. {'; '.join(lines)}."
