"""How a sequence goes on at another engine."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from synthia_vllm.engine.port import Generation, Sampling
from synthia_vllm.errors import UpstreamLost

ARGUMENT = "synthia_replay"  # that `synthia_vllm.engine.replay` reads
_NEEDS = "replays need --logits-processors synthia_vllm.engine.replay:Replay"
_GREEDY = 1e-5  # vLLM takes a lower temperature for none (`sampling_params.py`)


def stateful(sampling: Sampling) -> bool:
    """Whether the next token depends on more than the ids so far as a prompt.

    A grammar stands somewhere in its middle, a seeded generator has given some of its numbers, presence and frequency
    penalties and bad words look at the reply alone (`repetition_penalty` looks at the prompt as well), and what the
    client's own arguments do is not known.
    """
    return bool(
        sampling.structured_outputs
        or (sampling.seed is not None and sampling.temperature >= _GREEDY)
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.bad_words
        or sampling.extra_args
    )


class Replayed:
    """The ids that an engine has to say again before it goes on."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._said = 0

    def skip(self, ids: Sequence[int], *, ends: bool) -> int:
        """How many of an engine's next ids are these; `ends`: no more will come.

        Raises UpstreamLost where they are others, or end before all was said.
        """
        if self._said == len(self._ids):
            return 0
        known = self._ids[self._said : self._said + len(ids)]
        self._said += len(known)
        if list(known) != list(ids[: len(known)]) or (ends and self._said < len(self._ids)):
            raise UpstreamLost(f"the engine did not say again what its predecessor had said: {_NEEDS}")
        return len(known)


def resume(generation: Generation, prompt: Sequence[int], ids: Sequence[int], *, whole: bool = True) -> Generation:
    """The generation that gives the rest of a sequence after these ids of it; `prompt` are its ids, whoever told them.

    Where the ids are all that counts, they become a part of the prompt. Else everything is generated again, with the
    ids forced, so that whatever has a state arrives where it was: the same ids come first.

    `whole`: whether they end with a character. Where not, the engine is told of no stop strings, which are found here
    in any case: its own text would start with that of the whole prompt (`tokenizers.decoders.DecodeStream`), and the
    contract's stop strings are in there.
    """
    sampling = generation.sampling
    if stateful(sampling):
        extra = {**(sampling.extra_args or {}), ARGUMENT: list(ids)}
        return replace(generation, sampling=msgspec.structs.replace(sampling, extra_args=extra))
    rest = msgspec.structs.replace(
        sampling,
        max_tokens=sampling.max_tokens - len(ids),
        min_tokens=max(0, sampling.min_tokens - len(ids)),
        stop=sampling.stop if whole else (),
    )
    return replace(generation, prompt=[*prompt, *ids], text=None, sampling=rest)
