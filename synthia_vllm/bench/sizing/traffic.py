"""Loads for the simulator: made up (Poisson), or those that a measurement really had."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthia_vllm.bench.run_file import Measurement, Request
from synthia_vllm.bench.sizing.state import NONE
from synthia_vllm.bench.summary import tokens_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """One entry a request. `follower` is what the same client sends `think` seconds after this one's end."""

    arrival: Floats  # seconds; infinite for one that follows another
    user: Ints
    prompt: Ints
    output: Ints
    follower: Ints
    think: Floats
    session: Ints
    cached: Ints
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.arrival)


def poisson(
    requests: int,
    rate: float,
    users: int,
    prompt_tokens: float,
    output_tokens: float,
    spread: float = 0.0,
    seed: int = 0,
) -> Traffic:
    """An open loop. `spread` is the coefficient of variation of both lengths (log-normal)."""
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1 / rate, requests))
    return Traffic(
        arrival,
        random.integers(0, users, requests),
        _lengths(random, requests, prompt_tokens, spread),
        _lengths(random, requests, output_tokens, spread),
        **_alone(requests),
        weights=(1.0,) * users,
    )


def of_measurement(measurement: Measurement) -> Traffic:
    """The same requests at the same times; in a closed loop, each stream's next one when the former has ended.

    Failed requests are left out: what they cost the server is not known.
    """
    whole = sorted((r for r in measurement.requests if r.error is None and r.chunk_s), key=lambda r: r.sent_s)
    names = sorted({request.user for request in whole})
    number = {name: n for n, name in enumerate(names)}
    arrival = np.asarray([request.sent_s for request in whole])
    parts = _alone(len(whole))
    if measurement.kind == "closed" and measurement.streams:
        _chain(whole, measurement.streams, arrival, parts["follower"], parts["think"])
    return Traffic(
        arrival,
        np.asarray([number[request.user] for request in whole], dtype=np.int64),
        np.asarray([max(1, request.prompt_tokens) for request in whole], dtype=np.int64),
        np.asarray([max(1, tokens_of(request)) for request in whole], dtype=np.int64),
        **parts,
        weights=tuple(measurement.weights.get(name, 1.0) for name in names),
    )


def _chain(requests: list[Request], streams: int, arrival: Floats, follower: Ints, think: Floats) -> None:
    """Which request began when which had ended: the earliest end frees the next start."""
    ends = sorted(range(len(requests)), key=lambda n: requests[n].done_s)
    free = iter(ends)
    for nth in range(min(streams, len(requests)), len(requests)):
        before = next(free)
        if requests[before].done_s > requests[nth].sent_s:
            continue  # it did not wait for that one: keep its own time
        follower[before] = nth
        think[before] = requests[nth].sent_s - requests[before].done_s
        arrival[nth] = np.inf


def _alone(requests: int) -> dict[str, Any]:
    """No request has to do with another."""
    return {
        "follower": np.full(requests, NONE),
        "think": np.zeros(requests),
        "session": np.full(requests, NONE),
        "cached": np.zeros(requests, dtype=np.int64),
    }


def _lengths(random: np.random.Generator, count: int, mean: float, spread: float) -> Ints:
    if not spread:
        return np.full(count, max(1, round(mean)), dtype=np.int64)
    sigma = np.sqrt(np.log1p(spread**2))
    drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.asarray(np.maximum(1, np.rint(drawn)), dtype=np.int64)
