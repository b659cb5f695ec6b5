"""`POST /v1/completions`, of vLLM or of any other engine that speaks OpenAI's API.

It adds to a text what the tokenizer's own rule says. Where that is no BOS, which some models have all the same, a
conversation's prompt brings it along; a completion is what the client wrote.

vLLM tells token ids: text is made of them here where there is a tokenizer. Other engines send text alone, and the ids
of their tokens are -1. How many tokens a chunk of theirs has they don't tell: each counts as one, until the usage at
the end tells how many there were, and the last delta has what is missing.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from synthia_vllm.engine.port import Delta, Generation
from synthia_vllm.engine.rendered import Rendered
from synthia_vllm.engine.transcript import Transcript
from synthia_vllm.replicas.detect import COMPLETIONS, Endpoint
from synthia_vllm.replicas.logprobs import UNKNOWN as UNKNOWN_LOGPROB
from synthia_vllm.replicas.logprobs import Entry, named_positions
from synthia_vllm.replicas.reply import Chunk, Reply, check_end

UNKNOWN = -1  # the id of a token whose id is not told
# Tokens that vLLM sends without text may be the beginning of a character, four bytes at most: without a tokenizer they
# are kept until its text comes, so that a lost engine takes no part of it along.
_MAX_HELD = 4
_DEFAULTS = ("temperature", "top_p")  # sent always: OpenAI's, but engines have others
_VLLM_DEFAULTS = ("top_k", "min_p", "repetition_penalty")  # vLLM's come from the model's own files


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[msgspec.Raw] | None = None


class _Chunk(Chunk):
    choices: list[_Choice] | None = None


class CompletionsReply(Reply):
    """Of an engine that is sent text, or ids where it is vLLM and they are known here."""

    path = COMPLETIONS
    decoder = msgspec.json.Decoder(_Chunk)

    def __init__(self, generation: Generation, transcript: Transcript, replayed: Sequence[int] = ()) -> None:
        super().__init__(generation, transcript, replayed)
        self._held: list[int] = []
        self._unknown = False  # the engine tells no ids

    def body(self, endpoint: Endpoint) -> bytes:
        generation, sampling = self.generation, self.generation.sampling
        params: dict[str, Any] = msgspec.to_builtins(sampling)
        for name in (*_DEFAULTS, *(_VLLM_DEFAULTS if endpoint.vllm else ())):
            params[name] = getattr(sampling, name)
        by_ids = generation.text is None or (endpoint.vllm and generation.prompt)
        params |= {
            "model": endpoint.model(generation.model),
            "prompt": generation.prompt if by_ids else _text(generation, endpoint),
        }
        if (extra := params.pop("extra_args", None)) is not None:
            params["vllm_xargs"] = extra
        if endpoint.vllm:
            params |= {"return_token_ids": True, "include_stop_str_in_output": True}
            if self.with_logprobs and self.transcript.tokenizer is not None:
                params["return_tokens_as_token_ids"] = True
            if generation.salt is not None:
                params["cache_salt"] = generation.salt
        elif form := _response_format(sampling.structured_outputs):
            del params["structured_outputs"]
            params["response_format"] = form
        if sampling.prompt_logprobs is None:
            params |= {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(params)

    def add_choice(self, delta: Delta, chunk: Any) -> None:
        choice: _Choice = chunk.choices[0]
        if choice.prompt_token_ids is not None:
            self.prompt_ids = choice.prompt_token_ids
        if choice.prompt_logprobs is not None:
            self.prompt_logprobs = choice.prompt_logprobs
        if choice.token_ids is not None and self.transcript.tokenizer is not None:
            self.add_ids(delta, choice.token_ids, choice.finish_reason, _entries(choice.logprobs), None)
        else:
            self._add_text(delta, choice)

    def complete(self, delta: Delta) -> Delta:
        delta = super().complete(delta)
        if self._unknown and self.usage is not None and self.usage.completion_tokens is not None:
            counted = self.transcript.count - self.began_at
            missing = min(self.usage.completion_tokens, self.generation.sampling.max_tokens) - counted
            delta.ids = [*delta.ids, *[UNKNOWN] * missing]
        return delta

    def _add_text(self, delta: Delta, choice: _Choice) -> None:
        check_end(choice.finish_reason)
        text, ids, logprobs = choice.text or "", choice.token_ids, choice.logprobs
        if ids is None:
            self._unknown = True
            ids = [UNKNOWN] * (len(logprobs.tokens) if logprobs is not None else bool(text))
        ids = [*self._held, *ids]
        if not text and not choice.finish_reason and logprobs is None and len(ids) < _MAX_HELD:
            self._held = ids
            return
        self._held = []
        text, stop = self.transcript.take_text(text, len(ids))
        if logprobs is not None and self.with_logprobs:
            found = named_positions(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs or ())
            delta.logprobs = [*(delta.logprobs or ()), *found]
        delta.ids = [*delta.ids, *ids]
        delta.text += text
        self.end(delta, choice.finish_reason, stop or choice.stop_reason)


def _text(generation: Generation, endpoint: Endpoint) -> str:
    text = generation.text or ""
    return f"{endpoint.bos if isinstance(text, Rendered) else ''}{text}"


def _entries(found: _Logprobs | None) -> list[Entry]:
    """Tokens named by their ids, in the form of the chat route."""
    if found is None:
        return []
    top = found.top_logprobs or []
    return [
        Entry(
            token,
            UNKNOWN_LOGPROB if logprob is None else logprob,
            [Entry(name, value) for name, value in ((top[at] if at < len(top) else None) or {}).items()],
        )
        for at, (token, logprob) in enumerate(zip(found.tokens, found.token_logprobs, strict=False))
    ]


def _response_format(wanted: dict[str, Any] | None) -> dict[str, Any] | None:
    """Structured output as OpenAI's API has it; None where it has no words for it."""
    if not wanted:
        return None
    if wanted.get("json") is not None:
        return {"type": "json_schema", "json_schema": {"name": "reply", "schema": wanted["json"]}}
    return {"type": "json_object"} if wanted.get("json_object") else None
