"""vLLM's log-probabilities of prompts, made where they are read and not where they come in.

vLLM's output handler runs in our event loop and decodes each of their tokens by itself: half a second for a prompt of
8,192 tokens with 20 each. Private to vLLM; `tests/engine/test_late_logprobs.py` fails when it moves.
"""

from dataclasses import replace
from functools import cache, wraps
from typing import Any


class LateLogprobs:
    """What a request's first output has as `prompt_logprobs`: the engine's tensors, and who makes objects of them."""

    def __init__(self, processor: Any, update: Any) -> None:
        self.tensors: list[Any] = []
        self._processor = processor
        self._update = update

    def read(self) -> Any:
        """vLLM's own FlatLogprobs. Takes long: for a thread."""
        from vllm.logprobs import create_prompt_logprobs

        made = replace(self._processor, prompt_logprobs=create_prompt_logprobs(flat_logprobs=True))
        for each in self.tensors:
            self._update(made, each)
        return made.prompt_logprobs


@cache
def install() -> None:
    """Of requests with `flat_logprobs`, which are ours alone: those of vLLM's own routes stay as they are."""
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor

    update = LogprobsProcessor._update_prompt_logprobs

    @wraps(update)
    def later(self: Any, prompt_logprobs_tensors: Any) -> None:
        if isinstance(self.prompt_logprobs, FlatLogprobs):
            self.prompt_logprobs = LateLogprobs(self, update)
        if isinstance(self.prompt_logprobs, LateLogprobs):
            self.prompt_logprobs.tensors.append(prompt_logprobs_tensors)
        else:
            update(self, prompt_logprobs_tensors)

    LogprobsProcessor._update_prompt_logprobs = later
