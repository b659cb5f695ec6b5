"""How the users of one measurement were served: Sheng et al., *Fairness in Serving Large Language Models*, OSDI 2024.

Service is prompt tokens + 2 x generated tokens, over the user's weight. A prompt counts when its first token comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthia_vllm.bench.run_file import Measurement, Request
from synthia_vllm.bench.summary import Slo, Spread, gaps, spread, tokens_of, ttft

PROMPT_COST, GENERATED_COST = 1.0, 2.0
_POINTS = 200


@dataclass(frozen=True)
class User:
    """One user's share of a measurement."""

    name: str
    weight: float
    requests: int
    failed: int
    ttft: Spread
    itl: Spread
    attainment: float
    service: float


@dataclass(frozen=True)
class Fairness:
    """`gap` is the accumulated service gap at each of `times`: the most any user had more than any other."""

    users: list[User]
    times: NDArray[np.float64]
    services: dict[str, NDArray[np.float64]]
    gap: NDArray[np.float64]
    jain: float


def fairness(measurement: Measurement, slo: Slo) -> Fairness:
    by_user: dict[str, list[Request]] = {}
    for request in measurement.requests:
        by_user.setdefault(request.user, []).append(request)
    times = np.linspace(0.0, measurement.duration_s, _POINTS)
    services = {
        name: _service(requests, times) / measurement.weights.get(name, 1.0)
        for name, requests in sorted(by_user.items())
    }
    stacked = np.stack(list(services.values())) if services else np.zeros((1, len(times)))
    users = [
        _user(name, by_user[name], measurement.weights.get(name, 1.0), services[name][-1], slo) for name in services
    ]
    return Fairness(users, times, services, stacked.max(axis=0) - stacked.min(axis=0), jain(stacked[:, -1].tolist()))


def jain(shares: Sequence[float]) -> float:
    """1 where all have the same, 1/n where one has all (Jain, Chiu and Hawe, 1984). 1 where nobody has any."""
    values = np.asarray(shares, dtype=np.float64)
    squares = len(values) * float((values**2).sum())
    return float(values.sum()) ** 2 / squares if squares else 1.0


def _service(requests: Sequence[Request], times: NDArray[np.float64]) -> NDArray[np.float64]:
    at: list[float] = []
    cost: list[float] = []
    for request in requests:
        if request.chunk_s:
            each = GENERATED_COST * tokens_of(request) / len(request.chunk_s)  # a chunk may carry several tokens
            at += [request.chunk_s[0], *request.chunk_s]
            cost += [PROMPT_COST * request.prompt_tokens, *[each] * len(request.chunk_s)]
    order = np.argsort(at, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(cost)[order])]) if at else np.zeros(1)
    return np.asarray(sums[np.searchsorted(np.asarray(at)[order], times, side="right")] if at else np.zeros(len(times)))


def _user(name: str, requests: list[Request], weight: float, service: float, slo: Slo) -> User:
    whole = [request for request in requests if request.error is None]
    return User(
        name=name,
        weight=weight,
        requests=len(requests),
        failed=len(requests) - len(whole),
        ttft=spread(map(ttft, whole)),
        itl=spread(gap for request in whole for gap in gaps(request)),
        attainment=sum(map(slo.met_by, whole)) / len(requests),
        service=float(service),
    )
