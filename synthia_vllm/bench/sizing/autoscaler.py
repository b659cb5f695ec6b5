"""The autoscaler of the simulator: `synthia_vllm.cluster.autoscaling` with the delays of Ray Serve around it.

A test holds `wanted_replicas` against the policy itself.
"""

import math
from typing import NamedTuple

from numba import njit

from synthia_vllm.bench.sizing.state import (
    DRAINING,
    OFF,
    QUEUED,
    QUEUED_TOKENS,
    REPLICA_SECONDS,
    ROOM_REQUESTS,
    ROOM_TOKENS,
    STARTING,
    UP,
    UP_COUNT,
    Array,
    Replicas,
)

_SPARE = 0.15
TICK_S = 1.0
# Indices into `scaling`.
TARGET, MORE_SINCE, LESS_SINCE, PEAK = range(4)


class Autoscaler(NamedTuple):
    """Its settings. With `least` and `most` the same, nothing is scaled."""

    least: int
    most: int
    target_load: float
    upscale_delay_s: float
    downscale_delay_s: float
    startup_s: float


@njit(cache=True)
def wanted_replicas(
    tokens: float, queued_tokens: float, requests: float, per_replica: int, current: int, target_load: float
) -> int:
    if requests == 0:
        return 0
    needed = (tokens + queued_tokens) / (per_replica * target_load)
    enough = max(1, math.ceil(needed))
    if enough >= current:
        return enough
    return min(current, max(1, math.ceil(needed / (1 - _SPARE))))


@njit(cache=True)
def tick(replicas: Replicas, settings: Autoscaler, kv_tokens: int, totals: Array, scaling: Array, now: float) -> None:
    """Once a second: what has started is up, what has drained is gone, and the target follows the load."""
    alive = 0
    for r in range(len(replicas.state)):
        if replicas.state[r] == STARTING and replicas.ready_at[r] <= now:
            replicas.state[r] = UP
            totals[UP_COUNT] += 1
        elif replicas.state[r] == DRAINING and replicas.in_flight[r] == 0:
            replicas.state[r] = OFF
        alive += replicas.state[r] != OFF
    totals[REPLICA_SECONDS] += alive * TICK_S
    scaling[PEAK] = max(scaling[PEAK], alive)
    if settings.least == settings.most:
        return
    target = int(scaling[TARGET])
    wanted = wanted_replicas(
        totals[ROOM_TOKENS],
        totals[QUEUED_TOKENS],
        totals[ROOM_REQUESTS] + totals[QUEUED],
        kv_tokens,
        target,
        settings.target_load,
    )
    if totals[UP_COUNT] < target:
        wanted = max(wanted, target)
    wanted = min(settings.most, max(settings.least, wanted))
    if wanted <= target:
        scaling[MORE_SINCE] = now
    if wanted >= target:
        scaling[LESS_SINCE] = now
    if now - scaling[MORE_SINCE] >= settings.upscale_delay_s or now - scaling[LESS_SINCE] >= settings.downscale_delay_s:
        resize(replicas, totals, wanted - target, now + settings.startup_s)
        scaling[TARGET] = wanted
        scaling[MORE_SINCE] = scaling[LESS_SINCE] = now


@njit(cache=True)
def resize(replicas: Replicas, totals: Array, change: int, ready_at: float) -> None:
    """Starts replicas, or lets those drain that came last."""
    for r in range(len(replicas.state)):
        if change > 0 and replicas.state[r] == OFF:
            replicas.state[r], replicas.ready_at[r] = STARTING, ready_at
            change -= 1
    for n in range(len(replicas.state)):
        r = len(replicas.state) - 1 - n
        if change < 0 and replicas.state[r] == UP:
            replicas.state[r] = DRAINING
            totals[UP_COUNT] -= 1
            change += 1
