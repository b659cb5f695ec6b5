"""Sampling: the fields that OpenAI's routes share, with vLLM's names and their bounds, and what the engine gets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from synthia_vllm.api.base import MAX_N, MAX_STOP_CHARACTERS, MAX_TOKENS, Model, check_depth
from synthia_vllm.engine.grammar import check_grammar, with_grammar_for_choice
from synthia_vllm.engine.port import Sampling
from synthia_vllm.errors import ContextTooLong, RequestError
from synthia_vllm.prompt import MAX_CLIENT_STOPS, SAMPLING_DEFAULTS, STOP_STRINGS

MAX_LOGPROBS = 20  # vLLM's `--max-logprobs` by default, and OpenAI's own bound
MAX_SCHEMA_BYTES = 256 * 1024
UNKNOWN_CONTEXT_LENGTH = 1024  # of a reply without a wish, where nobody knows how much room there is
_INT64_MAX = 2**63 - 1
# What of vLLM's `vllm_xargs` is not the client's: how engines hand caches on, who shares them, how replies are resumed.
_OWN_XARGS = ("kv_transfer", "ec_transfer", "cache_salt", "synthia")

Count = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
CountOrNone = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Temperature = Annotated[float, Meta(ge=0, le=2)]  # as vLLM and OpenAI bound it
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_TOKENS)]
Seed = Annotated[int, Meta(ge=-(2**63), le=_INT64_MAX)]
Name = Annotated[str, Meta(max_length=1024)]
Salt = Annotated[str, Meta(min_length=1, max_length=1024)]
# Their number and length are checked by `client_stops`.
Stops = str | list[str]
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]
XArg = Annotated[str, Meta(max_length=4096)] | Seed | float
XArgs = Annotated[dict[Name, XArg | Annotated[list[XArg], Meta(max_length=1024)]], Meta(max_length=64)]

# Fields that go to the engine as they are.
_AS_GIVEN = (
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs",
    "logit_bias",
)  # fmt: skip


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    name: Name
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's three kinds, and vLLM's `structural_tag` in its two forms."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: Any = None
    structures: list[Any] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, omit_defaults=True):
    """vLLM's StructuredOutputsParams."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=4096)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields of all APIs that generate. None is *not given*, as `null` is."""

    format_param: ClassVar[str] = "response_format"  # what this API calls it

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    max_tokens: CountOrNone | None = None
    min_tokens: CountOrNone | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=2**17)] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=256)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    prompt_logprobs: Logprobs | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Count | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Salt | None = None
    vllm_xargs: XArgs | None = None
    model: Name | None = None
    user: Name | None = None
    # What no engine of ours does: refused by `sampling_of` rather than left out in silence.
    use_beam_search: bool | None = None
    best_of: CountOrNone | None = None
    truncate_prompt_tokens: Seed | None = None
    repetition_detection: Any = None

    @property
    def replies(self) -> int:
        """How many replies a prompt gets."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


def sampling_of(
    request: SamplingFields,
    *,
    max_tokens: int,
    stops: Sequence[str],
    logprobs: int | None,
    model: Model,
    card_defaults: bool,
) -> Sampling:
    """The engine's sampling of a request; with `card_defaults` as the model card does it where nothing is given.

    Raises RequestError for what contradicts itself, is not done here, or names tokens that the model does not have.
    """
    _refuse_undone(request)
    _check_tokens(request, model)
    if (request.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens {request.min_tokens} is more than the {max_tokens} tokens that the reply can have",
            param="min_tokens",
        )
    if request.prompt_logprobs and request.stream:
        raise RequestError("prompt_logprobs come with whole replies only, not with stream", param="prompt_logprobs")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options need stream", param="stream_options")
    given: dict[str, Any] = {name: getattr(request, name) for name in _AS_GIVEN} | {
        "seed": None if request.seed == -1 else request.seed,  # vLLM's way of saying "none"
        "stop_token_ids": _unique(request.stop_token_ids),
        "logprobs": None if request.logprob_token_ids else logprobs,
        "logprob_token_ids": tuple(request.logprob_token_ids) if request.logprob_token_ids else None,
        "allowed_token_ids": _unique(request.allowed_token_ids),
        "bad_words": _unique(request.bad_words),
        "structured_outputs": structured_outputs(request),
        "extra_args": _extra_args(request.vllm_xargs),
    }
    if card_defaults:
        for field in ("temperature", "top_p", "top_k"):
            if given[field] is None:
                given[field] = SAMPLING_DEFAULTS[field]
    if given["top_k"] == -1:
        given["top_k"] = 0
    return Sampling(
        max_tokens=max_tokens, stop=tuple(stops), **{name: value for name, value in given.items() if value is not None}
    )


def sequences_of(sampling: Sampling, replies: int) -> list[Sampling]:
    """The sampling of each of a prompt's replies: a seed is a different one for each, as vLLM's `n` does it."""
    if sampling.seed is None or replies == 1:
        return [sampling] * replies
    seeds = [sampling.seed + index for index in range(replies)]
    return [msgspec.structs.replace(sampling, seed=seed if seed <= _INT64_MAX else seed - 2**64) for seed in seeds]


def reply_length(
    wanted: int | None, default: int | None, prompt: int, model: Model, *, param: str, prompt_param: str
) -> int:
    """The most tokens that a reply can have: what was asked for, or `default` (None: all that the prompt leaves).

    Raises ContextTooLong where that does not fit. `param` and `prompt_param` are the fields of length and prompt.
    """
    context = model.context
    if context is None:
        return wanted or default or UNKNOWN_CONTEXT_LENGTH
    left = context - prompt
    if model.tokenizer is None:
        left = context if wanted is not None else max(1, left)  # an estimate refuses nobody: the engine counts
    if left < 1 or (wanted is not None and wanted > left):
        raise ContextTooLong(prompt, wanted or 1, context, param=param, prompt_param=prompt_param)
    if wanted is not None:
        return wanted
    return left if default is None else min(default, left)


def client_stops(stop: Stops | None, param: str) -> tuple[str, ...]:
    """The client's own stop strings, each once, in its order. Raises RequestError that names `param`."""
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_CLIENT_STOPS:
        raise RequestError(f"{len(stops)} stop strings; at most {MAX_CLIENT_STOPS} are possible", param=param)
    for index, text in enumerate(stops):
        where = param if isinstance(stop, str) else f"{param}[{index}]"
        if not text:
            raise RequestError(f"{where} is empty; stop strings are a text or a list of texts, none empty", param=param)
        if len(text) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"{where} has {len(text)} characters; a stop string has at most {MAX_STOP_CHARACTERS}", param=param
            )
    return tuple(dict.fromkeys(stops))


def contract_stops(own: tuple[str, ...]) -> tuple[str, ...]:
    """The stop strings of a conversation's reply: the client's own first, which decides where several match."""
    return (*own, *(stop for stop in STOP_STRINGS if stop not in own))


def structured_outputs(request: SamplingFields) -> dict[str, Any] | None:
    """The fields of vLLM's StructuredOutputsParams; `response_format` goes before `structured_outputs` as in vLLM.

    Raises RequestError where there is not exactly one kind, or it is too large or too deep. Whether a grammar can be
    compiled is the engine's to say.
    """
    given, response_format = request.structured_outputs, request.response_format
    fields: dict[str, Any] = {}
    param = "structured_outputs"
    if given is not None:
        for name in ("json", "structural_tag", "regex", "grammar"):
            value = getattr(given, name)
            if isinstance(value, str) and not value.strip():
                raise RequestError(f"{param}.{name} is empty", param=f"{param}.{name}")
        if given.json_object is False:
            raise RequestError(f"{param}.json_object is true or not given", param=f"{param}.json_object")
        fields = {name: value for name in given.__struct_fields__ if (value := getattr(given, name)) is not None}
    if response_format is not None and response_format.type != "text":
        param = request.format_param
        fields |= _of_response_format(response_format)
    if not fields and given is None:
        return None
    check_schema(fields, param)
    check_grammar(fields, param=param)
    if "choice" in fields:
        fields = with_grammar_for_choice(fields)
    return fields


def constraint_param(request: SamplingFields) -> str | None:
    """The field in which the client wrote its schema or grammar."""
    if request.response_format is not None and request.response_format.type != "text":
        return request.format_param
    return "structured_outputs" if request.structured_outputs is not None else None


def check_schema(value: Any, param: str) -> None:
    """Raises RequestError for a schema or grammar that is too deep or too large to be handed to an engine."""
    check_depth(value, param)
    try:
        size = len(msgspec.msgpack.encode(value))  # as it goes to the engine: integers have 64 bits
    except OverflowError:
        raise RequestError(f"{param} holds an integer of more than 64 bits", param=param) from None
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(f"{param} is over {MAX_SCHEMA_BYTES} bytes", param=param)


def _of_response_format(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "json_schema":
        schema = wanted.json_schema
        if schema is None:
            raise RequestError(
                "response_format of type json_schema needs json_schema", param="response_format.json_schema"
            )
        if schema.schema is None:
            param = "response_format.json_schema.schema"
            raise RequestError(f"{param} is required", param=param)
        return {"json": schema.schema}
    if wanted.format is not None:
        tag: dict[str, Any] = {"type": wanted.type, "format": wanted.format}
    elif wanted.structures is not None and wanted.triggers is not None:
        tag = {"type": wanted.type, "structures": wanted.structures, "triggers": wanted.triggers}
    else:
        raise RequestError(
            "response_format of type structural_tag needs format, or structures and triggers",
            param="response_format.format",
        )
    check_schema(tag, "response_format")
    return {"structural_tag": msgspec.json.encode(tag).decode()}


def _refuse_undone(request: SamplingFields) -> None:
    if request.use_beam_search:
        raise RequestError(
            "beam search is not done here; send the request without use_beam_search", param="use_beam_search"
        )
    if (request.best_of or 1) > request.replies:
        raise RequestError("best_of is not done here; ask for n replies and choose yourself", param="best_of")
    if request.truncate_prompt_tokens is not None:
        raise RequestError("prompts are not truncated here; send the part that counts", param="truncate_prompt_tokens")
    if request.repetition_detection is not None:
        raise RequestError("repetition_detection is not done here", param="repetition_detection")


def _check_tokens(request: SamplingFields, model: Model) -> None:
    """Raises RequestError for a token that the model does not have: the engine would notice it late."""
    for field in ("stop_token_ids", "logit_bias", "allowed_token_ids", "logprob_token_ids"):
        if ids := getattr(request, field):
            check_token_ids(ids, model, field)


def check_token_ids(ids: Iterable[int], model: Model, param: str) -> None:
    """Raises RequestError for an id that is over the tokenizer's size, where that is known."""
    highest = max(ids, default=0)
    if model.tokenizer is not None and highest >= model.tokenizer.size:
        raise RequestError(
            f"{param}: the model has no token {highest}, only 0 to {model.tokenizer.size - 1}", param=param
        )


def _unique(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return tuple(dict.fromkeys(values)) if values else None


def _extra_args(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    for name in given or ():
        if name.startswith(_OWN_XARGS):
            raise RequestError(f"vllm_xargs.{name} is the server's own", param="vllm_xargs")
    return dict(given) if given else None
