"""What the APIs prepare alike: those of conversations nearly all, completions how its sequences are put together."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from synthia_vllm.api.affinity import conversation_affinity
from synthia_vllm.api.base import Asker, Model, Prepared, Reply
from synthia_vllm.api.conversation import Prompt
from synthia_vllm.api.sampling import (
    SamplingFields,
    Stops,
    client_stops,
    contract_stops,
    reply_length,
    sampling_of,
    sequences_of,
)
from synthia_vllm.api.text import SequenceText
from synthia_vllm.engine.port import Affinity, Generation, Sampling
from synthia_vllm.prompt import SAMPLING_DEFAULTS

_DEFAULT_LENGTH = int(SAMPLING_DEFAULTS["max_tokens"])


def prepare_replies(
    request: SamplingFields,
    messages: Sequence[Mapping[str, str]],
    prompt: Prompt,
    model: Model,
    asker: Asker,
    reply: Callable[[list[SequenceText], Sampling], Reply],
    *,
    length: tuple[int | None, str],
    stops: tuple[Stops | None, str],
    logprobs: int | None,
    continued: bool,
    prompt_param: str = "messages",
) -> Prepared:
    """One reply, or `n`, to a conversation, under the contract; `reply` makes it of the sequences' texts.

    `length` and `stops` are what was asked for, each with the name of its field. `continued`: the reply goes on in the
    middle of a text. Raises RequestError.
    """
    wanted, field = length
    most = reply_length(wanted, _DEFAULT_LENGTH, prompt.tokens, model, param=field, prompt_param=prompt_param)
    own = client_stops(*stops)
    sampling = sampling_of(
        request, max_tokens=most, stops=contract_stops(own), logprobs=logprobs, model=model, card_defaults=True
    )
    if request.echo and request.prompt_logprobs is None:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=logprobs or 0)
    include = bool(request.include_stop_str_in_output)
    texts = [
        SequenceText.contract(own, keep_leading=continued, include_stop=include, min_tokens=sampling.min_tokens)
        for _ in range(request.replies)
    ]
    asked = prompt, sequences_of(sampling, request.replies), conversation_affinity(asker, messages)
    return put_together(request, asker, [asked], reply(texts, sampling))


def put_together(
    request: SamplingFields, asker: Asker, asked: Sequence[tuple[Prompt, list[Sampling], Affinity]], reply: Reply
) -> Prepared:
    """A request for all of these prompts, each with the sampling of its replies."""
    salt = asker.salt(request.cache_salt)
    each = [(prompt, sampling, affinity) for prompt, samplings, affinity in asked for sampling in samplings]
    sequences = [
        Generation(
            id=f"{asker.id}-{number}" if len(each) > 1 else asker.id,
            prompt=prompt.ids,
            text=prompt.text,
            sampling=sampling,
            model=request.model or "",
            salt=salt,
            affinity=affinity,
            on_attempt=asker.on_attempt,
        )
        for number, (prompt, sampling, affinity) in enumerate(each)
    ]
    return Prepared(
        sequences=sequences,
        reply=reply,
        streamed=bool(request.stream),
        prompt_tokens=sum(prompt.tokens for prompt, _, _ in asked),
        max_generated=sum(sampling.max_tokens for _, sampling, _ in each),
        exact=all(prompt.exact for prompt, _, _ in asked),
        replies=request.replies,
    )
