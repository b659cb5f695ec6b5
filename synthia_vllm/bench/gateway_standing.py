"""How our gateway stands against its rivals before one engine, and first of all where it is behind.

Added TTFT is that of a gateway less that of the engine asked directly, in the same round. Processor time is that of a
gateway's processes over the tokens that came through it; and with the API process of the engine's server, since some
gateways do work that others leave to that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from synthia_vllm.bench.estimates import Estimate, mean, median, per_round
from synthia_vllm.bench.rivals import DIRECT, GATEWAY, RIVALS
from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.summary import Load, Summary, tokens_of

_LEAST_SHARE = 0.01  # a difference of less is none
Rounds = dict[int, float]


@dataclass(frozen=True)
class Figure:
    """What gateways are held against each other by: a value of each round."""

    title: str
    digits: int
    higher_is_better: bool
    of: Callable[[Summary, str, Load], Rounds]


@dataclass(frozen=True)
class Ahead:
    """A rival that does better than ours. `sure`: in every round, or by the interval of many."""

    server: str
    theirs: Estimate
    sure: bool


@dataclass(frozen=True)
class Behind:
    """A figure in which rivals do better than ours; None as load: it is not of one."""

    figure: Figure
    load: Load | None
    ours: Estimate
    ahead: Sequence[Ahead]

    @property
    def where(self) -> str:
        return str(self.load) if self.load else "after the warm-up"

    def words(self) -> str:
        """`smg 12.1, vllm-router 15.0 (within noise)`."""
        digits = self.figure.digits
        return ", ".join(f"{a.server} {a.theirs.value:.{digits}f}{'' if a.sure else _unsure(a)}" for a in self.ahead)

    def own(self) -> str:
        return f"{self.ours.value:.{self.figure.digits}f}"


def _unsure(ahead: Ahead) -> str:
    return " (one round)" if ahead.theirs.rounds == 1 else " (within noise)"


def throughput(summary: Summary, server: str, load: Load) -> Rounds:
    return summary.rounds(server, load, "output_throughput")


def added(metric: str) -> Callable[[Summary, str, Load], Rounds]:
    """Milliseconds of `metric` beyond the direct engine's, in the rounds that have both; of the engine itself none."""

    def of(summary: Summary, server: str, load: Load) -> Rounds:
        if server == DIRECT:
            return {}
        through, direct = summary.rounds(server, load, metric), summary.rounds(DIRECT, load, metric)
        return {number: 1000 * (through[number] - direct[number]) for number in sorted(through.keys() & direct.keys())}

    return of


def cost(spent: Callable[[Measurement], float | None]) -> Callable[[Summary, str, Load], Rounds]:
    """Microseconds of processors a token, of what was `spent`."""

    def of(summary: Summary, server: str, load: Load) -> Rounds:
        found = []
        for measurement in summary.measurements(server, load):
            seconds, tokens = spent(measurement), sum(map(tokens_of, measurement.requests))
            if seconds is not None and tokens:
                found.append((measurement.round, 1e6 * seconds / tokens))
        return per_round(found, mean)

    return of


def _with_upstream(measurement: Measurement) -> float | None:
    if measurement.upstream_processor_s is None:
        return None
    return (measurement.processor_s or 0.0) + measurement.upstream_processor_s


FIGURES: tuple[Figure, ...] = (
    Figure("tokens/s", 1, True, throughput),
    Figure("added TTFT p50, ms", 2, False, added("ttft_p50")),
    Figure("added TTFT p99, ms", 2, False, added("ttft_p99")),
    Figure("processor, µs a token", 1, False, cost(lambda measurement: measurement.processor_s)),
    Figure("with the engine's API process", 1, False, cost(_with_upstream)),
)
MEMORY = Figure("memory, MB", 0, False, lambda summary, server, load: {})


def measured(summary: Summary) -> list[Load]:
    """The loads under which our gateway or a rival of it was measured."""
    gateways = {GATEWAY, *(rival.name for rival in RIVALS)}
    return [load for load in summary.loads() if gateways & set(summary.servers(load))]


def behind(summary: Summary) -> list[Behind]:
    """Where rivals are ahead of ours, however unsure that is: by figure, then by load."""
    found = []
    for figure in FIGURES:
        for load in measured(summary):
            ours = figure.of(summary, GATEWAY, load)
            ahead = [
                one
                for rival in RIVALS
                if (one := _ahead(rival.name, figure, ours, figure.of(summary, rival.name, load))) is not None
            ]
            own = median(list(ours.values()))
            if own is not None and ahead:
                found.append(Behind(figure, load, own, ahead))
    return [*found, *_memory(summary)]


def _ahead(server: str, figure: Figure, ours: Rounds, theirs: Rounds) -> Ahead | None:
    """By the differences within the rounds that both have."""
    both = sorted(ours.keys() & theirs.keys())
    sign = 1 if figure.higher_is_better else -1
    gain = median([sign * (theirs[number] - ours[number]) for number in both])
    value = median([theirs[number] for number in both])
    if gain is None or value is None or gain.value <= _LEAST_SHARE * abs(value.value):
        return None
    return Ahead(server, value, gain.low is not None and gain.low > 0)


def _memory(summary: Summary) -> list[Behind]:
    """Weighed once in a run, and much the same in each."""
    used = {server.name: server.memory_bytes / 1e6 for server in summary.run.servers if server.memory_bytes}
    if GATEWAY not in used:
        return []
    ahead = [
        Ahead(rival.name, Estimate(used[rival.name], None, None, 1), sure=True)
        for rival in RIVALS
        if used.get(rival.name, float("inf")) < (1 - _LEAST_SHARE) * used[GATEWAY]
    ]
    return [Behind(MEMORY, None, Estimate(used[GATEWAY], None, None, 1), ahead)] if ahead else []


def compared(summary: Summary) -> list[str]:
    """The rivals that were measured where ours was."""
    loads = [load for load in measured(summary) if GATEWAY in summary.servers(load)]
    return [rival.name for rival in RIVALS if any(rival.name in summary.servers(load) for load in loads)]


def figures(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of all figures, load by load; columns without a value are left out."""
    heads = ["load", "server", *(figure.title for figure in FIGURES), MEMORY.title]
    memory = {server.name: f"{server.memory_bytes / 1e6:.0f}" for server in summary.run.servers if server.memory_bytes}
    group = [DIRECT, *(rival.name for rival in RIVALS), GATEWAY]
    rows = []
    for load in measured(summary):
        for server in (name for name in group if name in summary.servers(load)):
            values = [median(list(figure.of(summary, server, load).values())) for figure in FIGURES]
            cells = [found.text(f.digits) if found else "–" for f, found in zip(FIGURES, values, strict=True)]
            rows.append([str(load), server, *cells, memory.get(server, "–")])
    kept = [at for at in range(len(heads)) if at < 2 or any(row[at] != "–" for row in rows)]
    return [heads[at] for at in kept], [[row[at] for at in kept] for row in rows]
