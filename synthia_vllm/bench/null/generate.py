"""`POST /inference/v1/generate` as the null engine answers it: token ids in, token ids out, as vLLM 0.29 writes them.

From `vllm/entrypoints/scale_out/token_in_token_out/{protocol,serving}.py`.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec

from synthia_vllm.bench.null.endings import ending, may_stop, words
from synthia_vllm.bench.null.replies import Told, sampling_of
from synthia_vllm.bench.null.tokens import VOCABULARY, logprob_of, split, text_of, token_id

GENERATE = "/inference/v1/generate"
_CREATED = 1_795_000_000


class GenerateRequest(msgspec.Struct, kw_only=True):
    """The fields of vLLM's that the null engine reads."""

    token_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    sampling_params: dict[str, Any]
    request_id: str = ""
    model: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None
    priority: int = 0


def read(body: bytes) -> GenerateRequest:
    """Raises ValueError."""
    return msgspec.convert(msgspec.json.decode(body), GenerateRequest, strict=False)


class GenerateReply:
    """The bytes of one reply, numbered. Raises ValueError for what vLLM refuses, WrongResume for a wrong seam."""

    def __init__(self, request: GenerateRequest, request_id: str, told: Told) -> None:
        given = request.sampling_params
        self.prompt = len(request.token_ids)
        self.stream = bool(request.stream)
        self.choices: int = given.get("n") or 1
        self.deadly: int | None = None
        if self.prompt >= told.max_model_len:
            raise ValueError(
                f"The decoder prompt (length {self.prompt}) is longer than the maximum model length of "
                f"{told.max_model_len}. Make sure that `max_model_len` is no smaller than the number of text tokens."
            )
        if max(request.token_ids) >= VOCABULARY:
            raise ValueError(f"Token id {max(request.token_ids)} is out of vocabulary")
        room = told.max_model_len - self.prompt
        sampling = sampling_of(given, room)
        self._seed, self.begun = split(request.token_ids)
        self.seed: int | None = self._seed
        ends_after = told.reply_tokens and max(0, told.reply_tokens - self.begun)
        pieces = partial(words, self._seed, self.begun)
        self._ending = ending(pieces, sampling, min(sampling.max_tokens, room), ends_after, may_stop(sampling))
        self.tokens = self._ending.count
        self._prompt_ids = request.token_ids
        self._request_id = f"generate-tokens-{request_id}"
        self._model = request.model or "null"
        self._logprobs: int | None = given.get("logprobs")
        self._prompt_logprobs: int | None = given.get("prompt_logprobs")
        self._told = told
        options = request.stream_options or {}
        self._usage = bool(options.get("include_usage"))
        self._continuous = self._usage and bool(options.get("continuous_usage_stats"))
        self._head = b'data: {"request_id":%b,"choices":[{"index":' % json.dumps(self._request_id).encode()

    def first(self) -> bytes:
        return b""

    def chunk(self, number: int, index: int) -> bytes:
        token = self._token(number)
        logprobs = msgspec.json.encode(self._logprobs_of([number])) if self._logprobs is not None else b"null"
        finish = b'"%b"' % self._ending.finish.encode() if number == self.tokens else b"null"
        usage = msgspec.json.encode(self._counts(number)) if self._continuous else b"null"
        return (
            b'%b%d,"logprobs":%b,"finish_reason":%b,"token_ids":[%d],"routed_experts":null,"sampling_mask":null}],'
            b'"usage":%b}\n\n' % (self._head, index, logprobs, finish, token, usage)
        )

    def last(self) -> bytes:
        if not self._usage:
            return b"data: [DONE]\n\n"
        counts = self._final_counts()
        told = {"request_id": self._request_id, "choices": [], "usage": _without_nulls(counts)}
        return b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode(told)

    def whole(self) -> bytes:
        numbers = range(1, self.tokens + 1)
        choice = {
            "index": 0,
            "logprobs": self._logprobs_of(numbers) if self._logprobs is not None else None,
            "finish_reason": self._ending.finish,
            "token_ids": [self._token(number) for number in numbers],
            "routed_experts": None,
            "sampling_mask": None,
        }
        told = {
            "request_id": self._request_id,
            "model": self._model,
            "created": _CREATED,
            "choices": [{**choice, "index": index} for index in range(self.choices)],
            "usage": self._final_counts(),
            "prompt_logprobs": self._prompt_logprobs_of() if self._prompt_logprobs is not None else None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
        }
        return msgspec.json.encode(told)

    def _token(self, number: int) -> int:
        if number == self.tokens and self._ending.last is not None:
            return self._ending.last[0][0]
        return token_id(self._seed, self.begun + number - 1)

    def _counts(self, generated: int) -> dict[str, Any]:
        generated += self._told.lie
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + generated,
            "completion_tokens": generated,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }

    def _final_counts(self) -> dict[str, Any]:
        counts = self._counts(self.tokens * self.choices)
        if self._told.cached is not None:
            details = {"created_cache_tokens": None, "multimodal_tokens": None}
            counts["prompt_tokens_details"] = {"cached_tokens": min(self._told.cached, self.prompt), **details}
        return counts

    def _logprobs_of(self, numbers: Sequence[int]) -> dict[str, Any]:
        content = []
        for number in numbers:
            top = [
                {"token": f"token_id:{token}", "logprob": value, "bytes": None}
                for token, value in self._likeliest(self._token(number), self.begun + number - 1, self._logprobs or 1)
            ]
            content.append({**top[0], "top_logprobs": top})
        return {"content": content}

    def _prompt_logprobs_of(self) -> list[dict[str, Any] | None]:
        wanted = max(self._prompt_logprobs or 0, 1)
        told: list[dict[str, Any] | None] = [None]
        for at, given in enumerate(self._prompt_ids[1:], start=1):
            likeliest = enumerate(self._likeliest(given, at, wanted), start=1)
            told.append(
                {
                    str(token): {"logprob": value, "rank": rank, "decoded_token": text_of([token])}
                    for rank, (token, value) in likeliest
                }
            )
        return told

    def _likeliest(self, token: int, position: int, wanted: int) -> list[tuple[int, float]]:
        """Made up: the chosen one first, its neighbours after it."""
        return [((token + other) % VOCABULARY, logprob_of(position) - other) for other in range(wanted)]


def _without_nulls(told: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in told.items()
        if value is not None
    }
