"""The port between gateways and engines: token ids in, deltas of token ids and text out.

Everything above it speaks APIs, everything below it speaks to vLLM in this process, to vLLM elsewhere, or to any
engine that completes text. Names of sampling are vLLM's (`vllm/sampling_params.py`), and so are their defaults: what
equals its default need not be sent.
"""

import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from synthia_vllm.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Capacity:
    """What an engine holds at once; None is unknown, and then unbounded."""

    tokens: int | None = None
    requests: int | None = None
    block: int = 1  # tokens are held in blocks of this size


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one sequence are chosen, and when it ends. Checked before it gets here.

    `stop` are strings that end the sequence; the engine leaves them in the text (`include_stop_str_in_output`), so that
    nothing is held back; whoever is above the port cuts them off.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None  # so many of the likeliest beside the chosen one; 0: the chosen one alone
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] | None = None
    # The fields of vLLM's StructuredOutputsParams: json, regex, choice, grammar, json_object, structural_tag, …
    structured_outputs: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None  # vLLM's `vllm_xargs`


class Affinity(NamedTuple):
    """What all requests of one conversation share, and whether an earlier one of it may have left its KV cache."""

    key: bytes
    continued: bool
    next: bytes | None = None  # the key that its next request will have, where that is another


Finish = Literal["stop", "length"]


class Said(NamedTuple):
    """A delta that was generated, and told, before: by another gateway."""

    ids: tuple[int, ...]
    finish: Finish | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sequence to generate. A request with `n` replies or several prompts is several of them."""

    id: str  # unique: the engine knows the sequence by it
    prompt: Sequence[int]  # token ids, BOS included; empty where no tokenizer is known here
    text: str | None = None  # the rendered prompt without BOS, for engines that are sent text
    sampling: Sampling
    model: str = ""  # the name that the client asked for
    salt: str | None = None  # of the prefix cache
    affinity: Affinity | None = None
    said: Sequence[Said] = ()  # what there is of it: told again first, with its text, and the engine goes on behind it
    # Called with a replica's name (empty: the engine in this process) each time an engine is asked for it; gives the
    # trace headers that go there.
    on_attempt: Callable[[str], Mapping[str, str]] = lambda replica: {}
    # Called where the iterator is left, with the number of tokens that were generated and not taken from it.
    on_untaken: Callable[[int], None] = lambda count: None


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token at one position, and the logarithm of its probability there."""

    id: int
    text: str  # as the tokenizer decodes it alone
    logprob: float
    rank: int | None = None  # 1 is the likeliest; None where the engine does not tell


class Position(msgspec.Struct, frozen=True, gc=False):
    """The log-probabilities at one position."""

    chosen: TokenLogprob
    top: Sequence[TokenLogprob]  # the likeliest as the engine orders them: vLLM puts the chosen one first


@dataclass(slots=True)
class Delta:
    """What an engine has newly generated of one sequence: at least one token, or an end, or a `note`."""

    ids: Sequence[int] = ()
    text: str = ""  # of these ids, up to the last whole character; a stop string that ended it is its end
    finish: Finish | None = None
    stop_reason: int | str | None = None  # the stop string or the stop token that ended it; None: EOS or length
    logprobs: Sequence[Position] | None = None  # one an id
    prompt_logprobs: Sequence[Position | None] | None = None  # with the first delta; one a prompt token, first is None
    cached: int | None = None  # prompt tokens that were in the prefix cache; once, where the engine tells
    prompt_tokens: int | None = None  # the engine's own count of the prompt; once, where no tokenizer is known here
    sequence: int = 0  # which of a request's sequences, set by who runs several
    replica: str = ""  # who generated it; empty: the engine in this process
    note: str = ""  # for the client of a stream that waits, no token is there yet
    again: bool = False  # of `Generation.said`


class Generates(Protocol):
    """What takes a sequence, and gives its deltas."""

    def generate(self, generation: Generation) -> AsyncGenerator[Delta, None]: ...


class Engine(Generates, Protocol):
    """Generates sequences.

    `generate` gives deltas until one has a `finish`. Leaving the iterator (`aclose`, cancellation) ends the sequence in
    the engine at once. Raises before the first delta: RequestError (400) for what the engine refuses, Overloaded (503),
    UpstreamLost (502), UpstreamTimeout (504); later: UpstreamLost or UpstreamTimeout. What raised before its first
    delta was never accepted: nothing was generated.
    """

    tokenizer: Tokenizer | None  # None: prompts go as text, and are counted by estimate
    context: int | None  # most tokens of prompt and reply together; None: unknown
    root: str | None  # the model's folder or its id on the hub; None: unknown

    async def models(self) -> Sequence[str]:
        """Names that the engine answers to, its own first. Raises UpstreamLost where it can't be asked."""
        ...

    async def ready(self) -> bool:
        """Whether a request would be answered now; may ask the engine for a token."""
        ...


def affinity_key(user: str, beginning: str) -> bytes:
    """The digest of a user's session or of a conversation's beginning. Users are kept apart."""
    return hashlib.blake2b(f"{user}\0{beginning}".encode(), digest_size=8).digest()
