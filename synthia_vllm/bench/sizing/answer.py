"""The least number of replicas that holds an SLO under a load, by bisection."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from synthia_vllm.bench.sizing.engine_model import EngineModel
from synthia_vllm.bench.sizing.simulator import ONE_REPLICA, Cluster, Outcome, run
from synthia_vllm.bench.sizing.traffic import Traffic, poisson
from synthia_vllm.bench.summary import Slo

MOST_REPLICAS = 1000
MOST_REQUESTS = 1_000_000
# How long a load is simulated: queues that slowly grow must have the time to show.
_SECONDS, _FEWEST_REQUESTS = 300.0, 5_000
# The search itself is done on this share, the answer confirmed on all.
_SEARCH_REQUESTS = 100_000
_P99_SHARE = 0.01


@dataclass(frozen=True)
class Wanted:
    """Users, requests a second of all together, mean lengths and their coefficient of variation, and the SLO."""

    users: int
    rate: float
    prompt_tokens: float
    output_tokens: float
    slo: Slo
    spread: float = 0.0
    requests: int | None = None

    def warm_up_s(self, requests: int) -> float:
        """Until the number of running requests is what it stays."""
        return min(0.3 * requests / self.rate, 2 * self.output_tokens * self.slo.itl_s)

    @property
    def count(self) -> int:
        return min(MOST_REQUESTS, self.requests or max(_FEWEST_REQUESTS, math.ceil(self.rate * _SECONDS)))

    def traffic(self, requests: int) -> Traffic:
        return poisson(requests, self.rate, self.users, self.prompt_tokens, self.output_tokens, self.spread)


@dataclass(frozen=True)
class Trial:
    """What clients would see with so many replicas. Seconds; infinite where the simulation was given up as hopeless."""

    replicas: int
    requests: int
    holds: bool
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    attainment: float
    output_throughput: float
    mean_replicas: float


@dataclass(frozen=True)
class Answer:
    """`replicas` is None where not even the most hold the SLO.

    `scaled` is the same load with the autoscaler on, from that number of replicas.
    """

    replicas: int | None
    trials: list[Trial]
    scaled: Trial | None = None


def size(
    model: EngineModel,
    wanted: Wanted,
    cluster: Cluster = ONE_REPLICA,
    *,
    autoscale: bool = False,
    told: Callable[[Trial], None] = lambda trial: None,
) -> Answer:
    """`told` of each trial as it ends. An SLO holds where p99 TTFT and p99 ITL both do, as in `bench slo`."""
    trials: dict[tuple[int, int], Trial] = {}

    def attempt(replicas: int, requests: int) -> bool:
        key = replicas, requests
        if key not in trials:
            trials[key] = _trial(model, wanted, wanted.traffic(requests), replace(cluster, replicas=replicas))
            told(trials[key])
        return trials[key].holds

    few = min(wanted.count, _SEARCH_REQUESTS)
    # With fewer than this the load itself is more than what they can do.
    least = max(1, math.floor(wanted.rate / model.rate(wanted.prompt_tokens, wanted.output_tokens) * 0.9))
    found = _bisect(lambda replicas: attempt(replicas, few), least)
    while found is not None and not attempt(found, wanted.count):
        found = found + max(1, found // 100) if found < MOST_REPLICAS else None
        found = None if found is None else min(found, MOST_REPLICAS)
    scaled = None
    if autoscale and found is not None:
        most = min(MOST_REPLICAS, math.ceil(found * 1.5) + 1)
        scaled = _trial(
            model, wanted, wanted.traffic(wanted.count), replace(cluster, replicas=found, max_replicas=most)
        )
    return Answer(found, sorted(trials.values(), key=lambda trial: (trial.replicas, trial.requests)), scaled)


def _bisect(holds: Callable[[int], bool], least: int) -> int | None:
    low, high = 0, min(least, MOST_REPLICAS)
    while not holds(high):
        if high == MOST_REPLICAS:
            return None
        low, high = high, min(MOST_REPLICAS, max(high + 1, math.ceil(high * 1.25)))
    if low == 0 and high > 1:
        low = high // 2
        while low and holds(low):
            high, low = low, low // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _trial(model: EngineModel, wanted: Wanted, traffic: Traffic, cluster: Cluster) -> Trial:
    scaled = cluster.max_replicas is not None
    outcome = run(
        traffic,
        model,
        cluster,
        ttft_limit_s=wanted.slo.ttft_s,
        late_share=1.0 if scaled else _P99_SHARE,
        warm_up_s=wanted.warm_up_s(len(traffic)),
    )
    return _told(outcome, wanted.slo, cluster.replicas, len(traffic))


def _told(outcome: Outcome, slo: Slo, replicas: int, requests: int) -> Trial:
    if outcome.aborted:
        never = float("inf")
        return Trial(replicas, requests, False, never, never, never, never, float("nan"), float("nan"), replicas)
    waits, gaps = outcome.ttft(99), outcome.itl(99)
    return Trial(
        replicas=replicas,
        requests=requests,
        holds=waits <= slo.ttft_s and gaps <= slo.itl_s,
        ttft_p50=outcome.ttft(50),
        ttft_p99=waits,
        itl_p50=outcome.itl(50),
        itl_p99=gaps,
        attainment=outcome.attainment(slo),
        output_throughput=outcome.output_throughput,
        mean_replicas=outcome.mean_replicas,
    )
