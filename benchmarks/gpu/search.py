"""Which options win: one after the other, each held against the best so far in repeated pairs (coordinate descent).

Knows nothing of servers: `compare` measures, so that the search can be tested without one.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]
# Best, candidate: for each pair the goodput of both. Empty: the candidate did not start.
Compare = Callable[[Options, Options], Sequence[tuple[float, float]]]

# In this order: what decides most about memory and steps comes first, for the later ones are tried on top of it.
KNOBS: Mapping[str, Sequence[Any]] = {
    "quantization": ("fp8",),
    "kv_cache_dtype": ("fp8",),
    "max_num_batched_tokens": (1024, 2048, 4096, 8192, 16384),
    "max_num_seqs": (64, 128, 256, 512),
    "max_cudagraph_capture_size": (128, 256, 1024),
}
# Only with real weights: what random ones say falls into loops, and loops are what n-grams guess best.
SPECULATION: Mapping[str, Sequence[Any]] = {
    "speculative_config": (
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
    ),
}
# Knobs for a look at the search where there is no GPU.
CPU_KNOBS: Mapping[str, Sequence[Any]] = {"max_num_seqs": (64,)}


@dataclass(frozen=True)
class Trial:
    """A candidate against the best so far. `ratios`: candidate / best, pair by pair."""

    knob: str
    value: Any
    pairs: list[tuple[float, float]]
    ratios: list[float]
    taken: bool

    def __str__(self) -> str:
        told = ", ".join(f"{ratio:.3f}" for ratio in self.ratios) or "did not start"
        return f"{self.knob} {self.value}: {told}: {'taken' if self.taken else 'left'}"


@dataclass
class Found:
    """What a search came to. Both goodputs are those of one pair; None: nothing was taken."""

    options: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)


def search(
    knobs: Mapping[str, Sequence[Any]],
    compare: Compare,
    *,
    start: Options | None = None,
    margin: float = 0.02,
    done: Callable[[Trial, dict[str, Any]], None] = lambda trial, best: None,
) -> Found:
    """Tries every value of every knob once; one is kept that wins by `margin` in the median and loses no pair.

    `done` gets each trial with the best options after it, so that an interruption loses one trial.
    """
    found = Found(dict(start or {}))
    for knob, values in knobs.items():
        for value in values:
            if found.options.get(knob) == value:
                continue
            pairs = list(compare(found.options, {**found.options, knob: value}))
            ratios = [round(ratio(best, candidate), 4) for best, candidate in pairs]
            taken = bool(ratios) and statistics.median(ratios) >= 1 + margin and min(ratios) >= 1
            found.trials.append(Trial(knob, value, pairs, ratios, taken))
            if taken:
                found.options[knob] = value
            done(found.trials[-1], dict(found.options))
    return found


def ratio(best: float, candidate: float) -> float:
    """Where the best meets the SLO at no rate at all, anything is better."""
    if best == 0:
        return 2.0 if candidate > 0 else 1.0
    return candidate / best
