"""From the chunks that clients saw to a model of the engine.

All sequences get a token a step, so the gaps of one reply are the engine's steps, and the other replies tell how many
sequences each step had and which prompts ended in it. Non-negative least squares on the duration of whole replies gives
the step time: monotone in the number of sequences, a straight line between knots, plus a time per prompt token. The
first tokens of requests that met an idle engine add what each request spends outside it. Noise is what is left of the
single gaps, as quantiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from synthia_vllm.bench.run_file import Measurement
from synthia_vllm.bench.sizing.engine_model import (
    DEFAULT_KV_TOKENS,
    DEFAULT_MAX_BATCHED_TOKENS,
    DEFAULT_MAX_SEQS,
    EngineModel,
)
from synthia_vllm.bench.sizing.simulator import ONE_REPLICA, Cluster, Outcome, run
from synthia_vllm.bench.sizing.traffic import of_measurement
from synthia_vllm.bench.summary import tokens_of, ttft

Floats = NDArray[np.float64]
_KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Steps without prompts so near a knot that they are no other's; with fewer it is left out.
_FEWEST_STEPS, _NEAR = 20, 1.15
_NOISE_QUANTILES = 1000
_NOISE_BOUNDS = 0.1, 20.0
_IDLE_WEIGHT = 3.0  # of a first token in the fit, against that of a whole reply
_SEEDS = 4  # of each simulation in the search: one alone is too noisy
_FINEST = 0.005  # moves of the pattern search, in steps of one sequence


@dataclass(frozen=True)
class Steps:
    """The gaps of one measurement's replies: one entry a gap."""

    reply: NDArray[np.int64]
    seconds: Floats
    sequences: Floats
    prompt_tokens: Floats  # of prompts that ended in the step
    tokens: Floats  # that came with the chunk


def calibrate(
    measurements: Sequence[Measurement],
    *,
    max_seqs: int = DEFAULT_MAX_SEQS,
    max_batched_tokens: int = DEFAULT_MAX_BATCHED_TOKENS,
    kv_tokens: int = DEFAULT_KV_TOKENS,
    cluster: Cluster = ONE_REPLICA,
) -> EngineModel:
    """Of one server with one replica, under several loads. Raises ValueError where no reply has two tokens."""
    steps = [found for measurement in measurements if (found := steps_of(measurement)) is not None]
    if not steps:
        raise ValueError("no reply with at least two chunks: nothing to calibrate on")
    knots = _knots(steps)
    decode_s, prompt_step_s, prefill_s, overhead_s = _fit(steps, _idle(measurements), knots)
    model = EngineModel(
        knots=tuple(float(knot) for knot in knots),
        decode_s=tuple(float(value) for value in decode_s),
        prefill_s=prefill_s,
        prompt_step_s=prompt_step_s,
        overhead_s=overhead_s,
        max_seqs=max_seqs,
        max_batched_tokens=max_batched_tokens,
        kv_tokens=kv_tokens,
    )
    model = replace(model, noise=_noise(steps, model))
    return refine(model, measurements, cluster)


def refine(model: EngineModel, measurements: Sequence[Measurement], cluster: Cluster) -> EngineModel:
    """Prompts of one length do not tell a prompt token's time from a prompt's or from that outside the engine.

    So the three are moved to where the simulated TTFTs come nearest to the measured ones, by pattern search.
    """
    loads = [(of_measurement(measurement), waits) for measurement in measurements if len(waits := _waits(measurement))]

    def distance(candidate: EngineModel) -> float:
        return sum(
            _distance(waits, [run(traffic, candidate, cluster, seed=seed) for seed in range(_SEEDS)])
            for traffic, waits in loads
        )

    prompt = float(np.median(np.concatenate([traffic.prompt for traffic, _ in loads]))) if loads else 1.0
    # Each by as much as changes a TTFT by a share of a step.
    scales = {
        "prefill_s": model.decode_s[0] / prompt,
        "prompt_step_s": model.decode_s[0],
        "overhead_s": model.decode_s[0],
    }
    best, step = distance(model), 0.2
    while step > _FINEST:
        moves = [{name: sign * step * scale} for name, scale in scales.items() for sign in (-1, 1)]
        moves += [{a: -step * scales[a], b: step * scales[b]} for a, b in permutations(scales, 2)]
        tried = [_moved(model, move) for move in moves]
        found = [distance(candidate) for candidate in tried]
        if min(found) < best:
            best, model = min(found), tried[int(np.argmin(found))]
        else:
            step /= 2
    return model


def steps_of(measurement: Measurement) -> Steps | None:
    """None where no reply has two chunks that can be used."""
    whole = [request for request in measurement.requests if request.chunk_s]
    several = [(n, request) for n, request in enumerate(whole) if len(request.chunk_s) > 1 and request.error is None]
    if not several:
        return None
    first = np.asarray([request.chunk_s[0] for request in whole])
    order = np.argsort(first)
    prompts = np.concatenate([[0.0], np.cumsum(np.asarray([request.prompt_tokens for request in whole])[order])])
    first = first[order]
    last = np.sort([request.chunk_s[-1] for request in whole])
    until = _complete_until(measurement)
    at = [np.asarray(request.chunk_s) for _, request in several]
    seconds = np.concatenate([np.diff(chunks) for chunks in at])
    ends = np.concatenate([chunks[1:] for chunks in at])
    # The same step's chunks reach different clients at slightly different times: half a gap is the tolerance.
    before, after = ends - seconds / 2, ends + seconds / 2
    began = np.searchsorted(first, after, side="right")
    steps = Steps(
        reply=np.concatenate([np.full(len(chunks) - 1, n) for (n, _), chunks in zip(several, at, strict=True)]),
        seconds=seconds,
        sequences=np.maximum(1.0, began - np.searchsorted(last, before, side="right")),
        prompt_tokens=prompts[began] - prompts[np.searchsorted(first, before, side="right")],
        tokens=np.concatenate(
            [
                np.full(len(request.chunk_s) - 1, (tokens_of(request) - 1) / (len(request.chunk_s) - 1))
                for _, request in several
            ]
        ),
    )
    kept = ends <= until
    if not kept.any():
        return None
    return Steps(*(getattr(steps, field.name)[kept] for field in fields(steps)))


def _complete_until(measurement: Measurement) -> float:
    """Until when the file has every request that ran.

    A closed loop that was ended early leaves out what was under way: from the first end that nothing followed, the
    others cannot be counted on.
    """
    if measurement.kind != "closed" or not measurement.streams:
        return float("inf")
    ends = sorted(request.done_s for request in measurement.requests)
    followed = len(ends) - measurement.streams
    return ends[followed] if 0 <= followed < len(ends) else float("inf")


def nnls(matrix: Floats, wanted: Floats, rounds: int = 3000) -> Floats:
    """Least squares with no negative weight, by coordinate descent: the matrices here have a dozen columns."""
    scale = np.sqrt((matrix**2).sum(axis=0))
    scale[scale == 0] = 1.0
    gram = (matrix / scale).T @ (matrix / scale)
    target = (matrix / scale).T @ wanted
    weights = np.zeros(matrix.shape[1])
    for _ in range(rounds):
        moved = 0.0
        for n in range(len(weights)):
            if gram[n, n] == 0:
                continue
            value = max(0.0, weights[n] + (target[n] - gram[n] @ weights) / gram[n, n])
            moved = max(moved, abs(value - weights[n]))
            weights[n] = value
        if moved < 1e-12:
            break
    return np.asarray(weights / scale)


def _knots(steps: Sequence[Steps]) -> Floats:
    """Those of the usual ones that were met often enough, and the ends of what was.

    In steps that decode only, if there are any: in numbers that a batch merely passes while its prompts are computed,
    it would be open how much of a step is the prompts'.
    """
    decoding = np.concatenate([one.sequences[one.prompt_tokens == 0] for one in steps])
    sequences = decoding if len(decoding) else np.concatenate([one.sequences for one in steps])
    highest = float(np.percentile(sequences, 99))
    near = [
        float(knot)
        for knot in _KNOTS
        if knot < highest and int(((sequences > knot / _NEAR) & (sequences < knot * _NEAR)).sum()) >= _FEWEST_STEPS
    ]
    return np.unique([max(1.0, float(sequences.min())), *near, highest])


def _ramps(sequences: Floats, knots: Floats) -> Floats:
    """A column of ones, then for each stretch between knots how much of it lies below: 0 to 1."""
    columns = [np.ones_like(sequences)]
    for low, high in pairwise(knots):
        columns.append(np.clip((sequences - low) / (high - low), 0.0, 1.0))
    return np.stack(columns, axis=1)


def _fit(steps: Sequence[Steps], idle: Floats, knots: Floats) -> tuple[Floats, float, float, float]:
    """Step times at the knots, more for a step with prompts, a prompt token's, and a request's outside the engine."""
    rows, wanted = [], []
    for one in steps:
        features = np.column_stack([_ramps(one.sequences, knots), one.prompt_tokens > 0, one.prompt_tokens])
        features[:, :-2] *= one.tokens[:, None]  # several tokens in a chunk are as many steps
        order, begins = np.unique(one.reply, return_index=True)
        sums = np.add.reduceat(features, begins, axis=0)
        seconds = np.add.reduceat(one.seconds, begins)
        keep = seconds > 0
        weight = np.sqrt(np.bincount(one.reply)[order][keep]) / seconds[keep]
        rows.append(np.column_stack([sums[keep], np.zeros(keep.sum())]) * weight[:, None])
        wanted.append(seconds[keep] * weight)
    if len(idle):
        alone = np.column_stack([_ramps(np.ones(len(idle)), knots), np.ones(len(idle)), idle[:, 0], np.ones(len(idle))])
        weight = _IDLE_WEIGHT / idle[:, 1]
        rows.append(alone * weight[:, None])
        wanted.append(idle[:, 1] * weight)
    weights = nnls(np.concatenate(rows), np.concatenate(wanted))
    return np.cumsum(weights[:-3]), float(weights[-3]), float(weights[-2]), float(weights[-1])


def _idle(measurements: Sequence[Measurement]) -> Floats:
    """(prompt tokens, TTFT) of requests that had the engine for themselves until their first token."""
    found = []
    for measurement in measurements:
        requests = sorted((r for r in measurement.requests if r.chunk_s), key=lambda r: r.sent_s)
        busy_until = -1.0
        for n, request in enumerate(requests):
            following = requests[n + 1].sent_s if n + 1 < len(requests) else float("inf")
            if request.sent_s >= busy_until and following >= request.chunk_s[0] and request.error is None:
                found.append((float(request.prompt_tokens), ttft(request)))
            busy_until = max(busy_until, request.done_s)
    return np.asarray(found).reshape(-1, 2)


def _noise(steps: Sequence[Steps], model: EngineModel) -> Floats:
    """Each quantile is the median over the measurements: one that the machine disturbed does not decide."""
    share = (np.arange(_NOISE_QUANTILES) + 0.5) / _NOISE_QUANTILES
    found = []
    for one in steps:
        expected = model.step_s(one.sequences) * one.tokens + model.prefill_s * one.prompt_tokens
        expected += model.prompt_step_s * (one.prompt_tokens > 0)
        found.append(np.quantile(one.seconds / expected, share))
    quantiles = np.clip(np.median(found, axis=0), *_NOISE_BOUNDS)
    return np.asarray(quantiles / quantiles.mean())


def _moved(model: EngineModel, move: Mapping[str, float]) -> EngineModel:
    """Never below zero."""
    return replace(model, **{name: max(0.0, getattr(model, name) + more) for name, more in move.items()})


def _waits(measurement: Measurement) -> Floats:
    return np.asarray([ttft(r) for r in measurement.requests if r.error is None and r.chunk_s])


def _distance(waits: Floats, outcomes: Sequence[Outcome]) -> float:
    """Squared logarithms of the ratios of median and p90 TTFT; the median counts more."""
    simulated = np.concatenate([outcome.ttft_s for outcome in outcomes])
    marks = [50, 90]
    ratios = np.percentile(simulated, marks) / np.percentile(waits, marks)
    return float(np.asarray([1.0, 0.5]) @ np.log(ratios) ** 2)
