"""What one replica does with a load: the figures that calibration finds and the simulator runs on."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from synthia_vllm.bench.sizing.state import Engine

Floats = NDArray[np.float64]
# vLLM's own, where a server's command says nothing (CPU, vllm/engine/arg_utils.py 0.29).
DEFAULT_MAX_SEQS, DEFAULT_MAX_BATCHED_TOKENS, DEFAULT_KV_TOKENS = 128, 2048, 1_000_000


def _no_noise() -> Floats:
    return np.ones(1)


@dataclass(frozen=True)
class EngineModel:
    """A step with `n` sequences takes `decode_s` at n, between the knots on a straight line and so on past the last.

    `noise` are quantiles of a step's time over the time expected; their mean is 1. `overhead_s` is spent on each
    request outside the engine: network, gateway, tokenizer, client.
    """

    knots: tuple[float, ...]  # numbers of sequences, rising
    decode_s: tuple[float, ...]  # seconds of a step at each
    prefill_s: float  # a prompt token
    prompt_step_s: float = 0.0  # more for a step with any prompt tokens, however many
    overhead_s: float = 0.0
    noise: Floats = field(default_factory=_no_noise)
    max_seqs: int = DEFAULT_MAX_SEQS
    max_batched_tokens: int = DEFAULT_MAX_BATCHED_TOKENS
    kv_tokens: int = DEFAULT_KV_TOKENS

    def step_s(self, sequences: Floats) -> Floats:
        """Of decoding alone."""
        inside = np.interp(sequences, self.knots, self.decode_s)
        if len(self.knots) < 2:
            return np.asarray(inside)
        slope = (self.decode_s[-1] - self.decode_s[-2]) / (self.knots[-1] - self.knots[-2])
        return np.asarray(inside + slope * np.maximum(0.0, np.asarray(sequences) - self.knots[-1]))

    def rate(self, prompt_tokens: float, output_tokens: float) -> float:
        """Requests a second that a full replica serves."""
        held = max(1.0, min(self.max_seqs, self.kv_tokens / (prompt_tokens + output_tokens)))
        step = float(self.step_s(np.asarray([held]))[0])
        # In a steady state each request is in output_tokens steps, and adds its prompt to one of them.
        return 1.0 / (output_tokens * step / held + prompt_tokens * self.prefill_s + self.prompt_step_s)

    def compiled(self) -> Engine:
        """As the kernel takes it."""
        return Engine(
            decode_s=np.maximum(1e-6, self.step_s(np.arange(self.max_seqs + 1, dtype=np.float64))),
            noise=np.asarray(self.noise, dtype=np.float64),
            biased=_size_biased(np.asarray(self.noise, dtype=np.float64)),
            prompt_step_s=float(self.prompt_step_s),
            prefill_s=float(self.prefill_s),
            noise_sd=float(np.std(self.noise)),
            max_seqs=int(self.max_seqs),
            max_batched_tokens=int(self.max_batched_tokens),
            kv_tokens=int(self.kv_tokens),
        )


def _size_biased(noise: Floats) -> Floats:
    """Quantiles of the same values, each weighted by itself: what one meets at a moment (renewal theory)."""
    ordered = np.sort(noise)
    share = (np.cumsum(ordered) - ordered / 2) / ordered.sum()
    return np.asarray(np.interp((np.arange(len(ordered)) + 0.5) / len(ordered), share, ordered))
