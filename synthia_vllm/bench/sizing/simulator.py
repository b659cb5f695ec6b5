"""Runs the kernel on a traffic and tells what clients would see."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthia_vllm.bench.sizing.autoscaler import PEAK, TARGET, Autoscaler
from synthia_vllm.bench.sizing.engine_model import EngineModel
from synthia_vllm.bench.sizing.gateway import Gateway
from synthia_vllm.bench.sizing.kernel import HISTOGRAM_BINS, HISTOGRAM_FROM, HISTOGRAM_PER_E, simulate
from synthia_vllm.bench.sizing.state import (
    NONE,
    OFF,
    REPLICA_SECONDS,
    SERVED,
    TOTALS,
    UP,
    UP_COUNT,
    Replicas,
    Requests,
    Users,
)
from synthia_vllm.bench.sizing.traffic import Traffic
from synthia_vllm.bench.summary import Slo

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """What stands before the engines. The defaults are those of `synthia_vllm.settings`."""

    replicas: int = 1
    fair_queue: bool = True
    max_queued_requests: int = 2048
    max_wait_s: float = 60.0
    max_load_factor: float = 1.5
    # None: a fixed number of replicas. Else scaling starts at `replicas`, and goes up to this.
    max_replicas: int | None = None
    min_replicas: int = 1
    target_load: float = 0.8
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    startup_s: float = 100.0


ONE_REPLICA = Cluster()


@dataclass(frozen=True)
class Outcome:
    """One entry a request; NaN for what was refused or, in an aborted run, had not come yet."""

    ttft_s: Floats
    tpot_s: Floats  # NaN for replies of one token
    output: NDArray[np.int64]
    duration_s: float
    aborted: bool
    step_s: Floats  # of the gaps between tokens: seconds, and how many
    step_count: Floats
    noise: Floats
    mean_replicas: float
    most_replicas: int

    @property
    def served(self) -> int:
        return int(np.isfinite(self.ttft_s).sum())

    @property
    def output_throughput(self) -> float:
        return float(self.output[np.isfinite(self.ttft_s)].sum()) / self.duration_s

    def ttft(self, percentile: float) -> float:
        """A refused request counts as one that waited for ever."""
        waits = np.where(np.isfinite(self.ttft_s), self.ttft_s, np.inf)
        return float(np.percentile(waits, percentile, method="inverted_cdf"))

    def itl(self, percentile: float) -> float:
        """Of all gaps between tokens, with the noise of single steps."""
        if not self.step_count.sum():
            return 0.0
        seconds = np.outer(self.step_s, self.noise).ravel()
        weights = np.repeat(self.step_count, len(self.noise))
        order = np.argsort(seconds)
        share = np.cumsum(weights[order]) / weights.sum()
        return float(seconds[order][np.searchsorted(share, percentile / 100)])

    def attainment(self, slo: Slo) -> float:
        good = (self.ttft_s <= slo.ttft_s) & ~(self.tpot_s > slo.itl_s)
        return float(good.mean())


def run(
    traffic: Traffic,
    model: EngineModel,
    cluster: Cluster = ONE_REPLICA,
    *,
    ttft_limit_s: float = float("inf"),
    late_share: float = 1.0,
    warm_up_s: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Aborts where more than `late_share` of the requests come later than `ttft_limit_s`: enough for a p99 to fail.

    Requests of the first `warm_up_s` are served, but not told of.
    """
    size = max(cluster.replicas, cluster.max_replicas or 0)
    engine = model.compiled()
    requests, users = _requests(traffic), _users(traffic)
    replicas = _replicas(size, cluster.replicas, engine.max_seqs)
    gateway = Gateway(
        cluster.fair_queue,
        cluster.max_queued_requests,
        cluster.max_wait_s if cluster.fair_queue else float("inf"),
        cluster.max_load_factor,
        model.overhead_s,
    )
    scaled = cluster.max_replicas is not None
    autoscaler = Autoscaler(
        cluster.min_replicas if scaled else size,
        size,
        cluster.target_load,
        cluster.upscale_delay_s,
        cluster.downscale_delay_s,
        cluster.startup_s,
    )
    totals, scaling, histogram = np.zeros(TOTALS), np.zeros(4), np.zeros(HISTOGRAM_BINS)
    totals[UP_COUNT] = scaling[TARGET] = cluster.replicas
    homes = np.full(max(1, int(traffic.session.max(initial=NONE)) + 1), NONE)
    first = np.flatnonzero(np.isfinite(traffic.arrival))
    order = first[np.argsort(traffic.arrival[first], kind="stable")]
    following = int(np.isinf(traffic.arrival).sum()) + 1
    releases = np.full(following, np.inf), np.zeros(following, dtype=np.int64)
    counted = ~(traffic.arrival < warm_up_s)
    late = late_share * counted.sum()
    ended = simulate(
        requests, users, replicas, engine, gateway, autoscaler, homes, totals, scaling, releases, histogram, order,
        warm_up_s, ttft_limit_s, late, seed,
    )  # fmt: skip
    served = requests.status == SERVED
    ttft = np.where(np.isfinite(requests.first), requests.first - requests.arrival + model.overhead_s, np.nan)
    steps = np.maximum(1, traffic.output - 1)
    tpot = np.where(served & (traffic.output > 1), (requests.last - requests.first) / steps, np.nan)
    begin = max(warm_up_s, float(traffic.arrival[order[0]]) if len(order) else 0.0)
    return Outcome(
        ttft_s=ttft[counted],
        tpot_s=tpot[counted],
        output=traffic.output[counted],
        duration_s=max(1e-9, float(np.nanmax(requests.last, initial=begin)) + model.overhead_s - begin),
        aborted=bool((requests.status == 0).any()),
        step_s=HISTOGRAM_FROM * np.exp((np.arange(HISTOGRAM_BINS) + 0.5) / HISTOGRAM_PER_E),
        step_count=histogram,
        noise=engine.noise,
        mean_replicas=float(totals[REPLICA_SECONDS]) / max(1.0, ended) if scaled else float(size),
        most_replicas=int(scaling[PEAK]) if scaled else size,
    )


def _requests(traffic: Traffic) -> Requests:
    count = len(traffic)
    return Requests(
        arrival=traffic.arrival.copy(),
        user=traffic.user,
        prompt=traffic.prompt,
        output=traffic.output,
        cached=traffic.cached,
        session=traffic.session,
        follower=traffic.follower,
        think=traffic.think,
        first=np.full(count, np.nan),
        last=np.full(count, np.nan),
        status=np.zeros(count, dtype=np.int8),
        expected=np.zeros(count),
        left=np.zeros(count, dtype=np.int64),
        admitted=np.zeros(count, dtype=np.bool_),
        after=np.full(count, NONE),
    )


def _users(traffic: Traffic) -> Users:
    count = max(1, len(traffic.weights))
    return Users(
        weight=np.asarray(traffic.weights or (1.0,), dtype=np.float64),
        head=np.full(count, NONE),
        tail=np.full(count, NONE),
        place=np.zeros(count),
        running=np.zeros(count, dtype=np.int64),
        held=np.zeros(count),
        mean=np.zeros(count),
        queued=np.zeros(count + 1, dtype=np.int64),
        position=np.zeros(count, dtype=np.int64),
        queued_count=np.zeros(1, dtype=np.int64),
    )


def _replicas(size: int, up: int, max_seqs: int) -> Replicas:
    def zeros() -> NDArray[np.int64]:
        return np.zeros(size, dtype=np.int64)

    return Replicas(
        state=np.where(np.arange(size) < up, UP, OFF),
        ready_at=np.zeros(size),
        in_flight=zeros(),
        kv_used=zeros(),
        running=zeros(),
        steps=zeros(),
        head=np.full(size, NONE),
        tail=np.full(size, NONE),
        completing=zeros(),
        began=np.zeros(size),
        step_s=np.zeros(size),
        plain_s=np.zeros(size),
        making=zeros(),
        cuttable=np.zeros(size, dtype=np.bool_),
        busy=np.zeros(size, dtype=np.bool_),
        finish_step=np.zeros((size, max_seqs + 1), dtype=np.int64),
        finish_request=np.zeros((size, max_seqs + 1), dtype=np.int64),
        order=np.arange(size),
        spot=np.arange(size),
        until=np.full(size, np.inf),
    )
