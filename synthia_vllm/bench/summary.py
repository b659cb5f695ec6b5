"""Figures from the requests of a measurement, as vLLM's `bench serve` defines them (vllm/benchmarks/serve.py, 0.29).

TTFT counts from when the request was sent, to its first chunk; ITL is each gap between two chunks; TPOT is the time
from the first chunk to the last over the tokens after the first; E2EL ends with the last chunk. Only whole replies
count; a failed request is counted by its kind of error. Goodput is the requests a second that meet the SLO (Zhong et
al., DistServe, OSDI 2024).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from synthia_vllm.bench.estimates import Estimate, mean, median, paired_ratio, paired_verdict, per_round
from synthia_vllm.bench.run_file import Measurement, Request, Run

# Where the run's options name no SLO.
DEFAULT_TTFT_MS, DEFAULT_ITL_MS = 1000.0, 250.0
_NUMBER = re.compile(r",? ?\b[\d.]+ ?(streams?\b|(req)?/s\b)")


@dataclass(frozen=True)
class Slo:
    """A request is good where its TTFT and its TPOT are no longer than this."""

    ttft_s: float
    itl_s: float

    def met_by(self, request: Request) -> bool:
        return request.error is None and ttft(request) <= self.ttft_s and (tpot(request) or 0.0) <= self.itl_s


@dataclass(frozen=True)
class Spread:
    """Seconds; NaN where there is nothing to tell of."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """What one measurement comes to."""

    completed: int
    failed: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    goodput: float
    attainment: float  # share of all requests that meet the SLO
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2el: Spread
    late: Spread  # how long after its due time a request was sent


@dataclass(frozen=True, order=True)
class Load:
    """What was asked of a server. Measurements that share it are rounds of one thing."""

    workload: str
    kind: str
    streams: int | None = None
    rate: float | None = None

    @property
    def family(self) -> str:
        """The workload's name without streams and rate: what makes one line of a plot."""
        return _NUMBER.sub("", self.workload) or self.workload

    def __str__(self) -> str:
        if self.family != self.workload:
            return self.workload
        if self.rate is not None:
            return f"{self.workload}, {self.rate:g}/s"
        if self.streams is not None:
            return f"{self.workload}, {self.streams} stream{'s' if self.streams > 1 else ''}"
        return self.workload


# name: (title, unit, factor to that unit, higher is better, how to get it). The ones that are compared and tabulated.
Metric = tuple[str, str, float, bool, Callable[[Figures], float]]
METRICS: dict[str, Metric] = {
    "output_throughput": ("output throughput", "tokens/s", 1, True, lambda f: f.output_throughput),
    "request_throughput": ("request throughput", "req/s", 1, True, lambda f: f.request_throughput),
    "goodput": ("goodput", "req/s", 1, True, lambda f: f.goodput),
    "ttft_p50": ("TTFT p50", "ms", 1000, False, lambda f: f.ttft.p50),
    "ttft_p99": ("TTFT p99", "ms", 1000, False, lambda f: f.ttft.p99),
    "itl_p50": ("ITL p50", "ms", 1000, False, lambda f: f.itl.p50),
    "itl_p99": ("ITL p99", "ms", 1000, False, lambda f: f.itl.p99),
}


def ttft(request: Request) -> float:
    return request.chunk_s[0] - request.sent_s if request.chunk_s else float("inf")


def tpot(request: Request) -> float | None:
    """None for a reply of one token, which has none."""
    tokens = tokens_of(request)
    return (request.chunk_s[-1] - request.chunk_s[0]) / (tokens - 1) if tokens > 1 and request.chunk_s else None


def gaps(request: Request) -> list[float]:
    return [after - before for before, after in pairwise(request.chunk_s)]


def tokens_of(request: Request) -> int:
    """As the server says; as seen where it says nothing."""
    return request.output_tokens or request.seen_tokens or 0


def spread(values: Iterable[float]) -> Spread:
    sample = np.fromiter(values, dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    if not len(sample):
        return Spread(*[float("nan")] * 5)
    return Spread(float(sample.mean()), *(float(q) for q in np.percentile(sample, [50, 90, 95, 99])))


def summarize(measurement: Measurement, slo: Slo) -> Figures:
    whole = [request for request in measurement.requests if request.error is None]
    good = sum(slo.met_by(request) for request in whole)
    errors = Counter(request.error for request in measurement.requests if request.error is not None)
    seconds = measurement.duration_s or float("nan")
    output = sum(map(tokens_of, whole))
    return Figures(
        completed=len(whole),
        failed=sum(errors.values()),
        errors=dict(errors.most_common()),
        prompt_tokens=sum(request.prompt_tokens for request in whole),
        output_tokens=output,
        request_throughput=len(whole) / seconds,
        output_throughput=output / seconds,
        goodput=good / seconds,
        attainment=good / len(measurement.requests) if measurement.requests else float("nan"),
        ttft=spread(map(ttft, whole)),
        itl=spread(gap for request in whole for gap in gaps(request)),
        tpot=spread(value for request in whole if (value := tpot(request)) is not None),
        e2el=spread(request.chunk_s[-1] - request.sent_s for request in whole if request.chunk_s),
        late=spread(max(0.0, request.sent_s - request.due_s) for request in measurement.requests),
    )


def slo_of(run: Run) -> Slo:
    """The run's own (options `ttft_ms` and `itl_ms`), else the defaults."""
    return Slo(
        float(run.options.get("ttft_ms") or DEFAULT_TTFT_MS) / 1000,
        float(run.options.get("itl_ms") or DEFAULT_ITL_MS) / 1000,
    )


def load_of(measurement: Measurement) -> Load:
    return Load(measurement.workload, measurement.kind, measurement.streams, measurement.rate)


class Summary:
    """All valid measurements of a run by server and load; the invalid ones apart, told but not counted."""

    def __init__(self, run: Run, slo: Slo | None = None) -> None:
        self.run = run
        self.slo = slo or slo_of(run)
        self.invalid = [measurement for measurement in run.measurements if measurement.invalid]
        self.cells: dict[tuple[str, Load], list[tuple[Measurement, Figures]]] = {}
        for measurement in run.measurements:
            if not measurement.invalid:
                cell = self.cells.setdefault((measurement.server, load_of(measurement)), [])
                cell.append((measurement, summarize(measurement, self.slo)))

    def loads(self, *kinds: str) -> list[Load]:
        """In the order of the run, streams and rates rising."""
        order: dict[tuple[str, str], int] = {}
        for measurement in self.run.measurements:
            order.setdefault((load_of(measurement).family, measurement.kind), len(order))
        found = {load for _, load in self.cells if not kinds or load.kind in kinds}
        return sorted(found, key=lambda x: (order[x.family, x.kind], x.streams or 0, x.rate or 0.0))

    def servers(self, load: Load | None = None) -> list[str]:
        """Those with a valid measurement, in the run's order."""
        have = {server for server, own in self.cells if load is None or own == load}
        named = [server.name for server in self.run.servers]
        return [name for name in named if name in have] + sorted(have - set(named))

    def title(self, server: str) -> str:
        return next((s.title for s in self.run.servers if s.name == server), server)

    def measurements(self, server: str, load: Load) -> list[Measurement]:
        return [measurement for measurement, _ in self.cells.get((server, load), [])]

    def rounds(self, server: str, load: Load, metric: str) -> dict[int, float]:
        """Round: figure, in seconds, tokens or requests."""
        get = METRICS[metric][4]
        cell = self.cells.get((server, load), [])
        return per_round([(measurement.round, get(figures)) for measurement, figures in cell], mean)

    def estimate(self, server: str, load: Load, metric: str) -> Estimate | None:
        return median(list(self.rounds(server, load, metric).values()))

    def ratio(self, ours: str, theirs: str, load: Load, metric: str = "output_throughput") -> Estimate | None:
        """Pair by pair within a round; rounds that only one of them has are left out."""
        one, other = self.rounds(ours, load, metric), self.rounds(theirs, load, metric)
        both = sorted(one.keys() & other.keys())
        return paired_ratio([one[r] for r in both], [other[r] for r in both])

    def judged(self, ours: str, theirs: str, load: Load, metric: str, figures: int) -> Estimate | None:
        """As `ratio`, one of so many of which a verdict is given."""
        one, other = self.rounds(ours, load, metric), self.rounds(theirs, load, metric)
        both = sorted(one.keys() & other.keys())
        return paired_verdict([one[r] for r in both], [other[r] for r in both], figures)

    def silent(self) -> list[str]:
        """Servers that were asked and of which no request came back whole."""
        asked = dict.fromkeys(measurement.server for measurement in self.run.measurements)
        answered = {m.server for m in self.run.measurements if any(request.error is None for request in m.requests)}
        return [server for server in asked if server not in answered]

    def errors(self) -> dict[str, Counter[str]]:
        """Server: kind of error: requests. Of invalid measurements too: an error is an error."""
        found: dict[str, Counter[str]] = {}
        for measurement in self.run.measurements:
            kinds = [request.error for request in measurement.requests if request.error is not None]
            if kinds:
                found.setdefault(measurement.server, Counter()).update(kinds)
        return found

    def words_of(self, server: str) -> str:
        """What it said itself to the first request that went wrong, if anything."""
        found = (r.detail for m in self.run.measurements if m.server == server for r in m.requests if r.error)
        return next(found, "")


def pooled(measurements: Sequence[Measurement], of: Callable[[Request], Iterable[float]]) -> list[float]:
    """One kind of value of all whole replies, for a distribution."""
    return [value for m in measurements for request in m.requests if request.error is None for value in of(request)]
