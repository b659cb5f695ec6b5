"""A logits processor for vLLM that makes an engine say again what another one has said, and then lets go.

A sequence whose replica died is generated again elsewhere: the same prompt and sampling, with the ids so far in
`SamplingParams.extra_args["synthia_replay"]`. They are forced one a step, as the first output tokens. Whatever has
state beyond the ids arrives where it was: grammar and penalties are told of the sampled tokens as of any others, and
the request's generator of random numbers is asked once a step.

Given to vLLM as `--logits-processors synthia_vllm.engine.replay:Replay`. An engine without it takes the same request
and generates what it likes: whoever replays has to compare the ids that come back.

Read in vLLM 0.29.0: it runs after the grammar's mask, `allowed_token_ids`, `bad_words`, `min_tokens` and `logit_bias`,
and before penalties, temperature, min-p, top-k and top-p (`v1/sample/sampler.py`), none of which brings back a token
whose logit is minus infinity. vLLM's own `trace_decode_token_ids` can't be had: it ends the sequence with the trace, is
refused beside a grammar, and is of the model runner for GPUs (V2) alone, which knows no custom processors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

ARGUMENT = "synthia_replay"  # in `SamplingParams.extra_args`: the ids, in order


class Replay(LogitsProcessor):  # type: ignore[misc]
    """Forces the tokens of the rows that replay. A batch in which none does costs two attribute look-ups a step."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._vocabulary: int = vllm_config.model_config.get_vocab_size()
        # By row of the batch: the ids to force, and the ids generated so far, a list that vLLM lets grow (with
        # placeholders where it does not know them yet).
        self._replays: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self._rows: torch.Tensor | None = None  # of this step; None: nobody replays
        self._ids: torch.Tensor | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError (vLLM: 400) for what is no list of token ids, or longer than the reply may be.

        The vocabulary is not known here. Ids outside it are not replayed.
        """
        ids = (sampling_params.extra_args or {}).get(ARGUMENT)
        if ids is None:
            return
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ValueError(f"{ARGUMENT} must be a list of token ids")
        if sampling_params.max_tokens is not None and len(ids) > sampling_params.max_tokens:
            raise ValueError(f"{ARGUMENT} has {len(ids)} ids, more than max_tokens {sampling_params.max_tokens}")

    def is_argmax_invariant(self) -> bool:
        return False  # greedy sequences are replayed too

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the rows of the batch, and looks up what to force in the step that begins."""
        process_dict_updates(self._replays, batch_update, self._begin)
        if not self._replays:
            self._rows = None
            return
        self._replays = {row: replay for row, replay in self._replays.items() if len(replay[1]) < len(replay[0])}
        forced = [ids[len(generated)] for ids, generated in self._replays.values()]
        self._rows = torch.tensor(list(self._replays), dtype=torch.int64).to(self._device) if forced else None
        self._ids = torch.tensor(forced, dtype=torch.int64).to(self._device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self._rows is not None:
            logits[self._rows] = -torch.inf
            logits[self._rows, self._ids] = 0.0
        return logits

    def _begin(
        self, params: SamplingParams, _prompt: list[int] | None, generated: list[int]
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        """The replay of a sequence that joins the batch, also again after it was preempted; None where it has none."""
        ids = params.extra_args.get(ARGUMENT) if params.extra_args else None
        if not ids or len(generated) >= len(ids) or max(ids) >= self._vocabulary:
            return None
        return ids, generated
