"""The bytes that the null engine answers with: chunks and whole replies with vLLM 0.29's fields in its order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from synthia_vllm.bench.null.endings import Ending, ending, may_stop, words
from synthia_vllm.bench.null.tokens import logprob_of, split, token_id, token_text
from synthia_vllm.engine.port import Sampling


@dataclass(frozen=True)
class Told:
    """What an engine tells in its replies beside tokens."""

    text: str = " word"  # of each token of a reply that is not numbered
    max_model_len: int = 1 << 17
    reply_tokens: int | None = None  # EOS comes after so many, unless `ignore_eos`
    cached: int | None = None  # prompt tokens, as with `--enable-prompt-tokens-details`
    lie: int = 0  # so many tokens more than were generated


class AnyReply(Protocol):
    """The bytes of one reply."""

    tokens: int
    choices: int
    stream: bool
    prompt: int  # tokens
    begun: int  # tokens that another engine generated
    seed: int | None  # of numbered tokens
    deadly: int | None  # the token that the process dies of

    def first(self) -> bytes: ...
    def chunk(self, number: int, index: int) -> bytes: ...
    def last(self) -> bytes: ...
    def whole(self) -> bytes: ...


def sampling_of(given: Mapping[str, Any], most: int) -> Sampling:
    """What the null engine knows of a request's sampling. Raises ValueError, in vLLM's words where it has some."""
    known = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    if isinstance(known.get("stop"), str):
        known["stop"] = [known["stop"]]
    sampling = msgspec.convert({"max_tokens": most, **known}, Sampling, strict=False)
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {sampling.max_tokens}.")
    return sampling


_SAMPLING = ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos")


class Reply:
    """The bytes of one reply; what does not change from chunk to chunk is put together once."""

    def __init__(
        self, request: dict[str, Any], chat: bool, number: int, prompt: Sequence[int], told: Told | None = None
    ) -> None:
        told = told or Told()
        wanted = request.get("max_completion_tokens") or request.get("max_tokens")
        self.sampling = sampling_of({**request, "max_tokens": wanted or (1024 if chat else 16)}, 1)
        self.stream = bool(request.get("stream"))
        self.choices: int = request.get("n") or 1
        self.begun = 0
        self.deadly: int | None = None
        self.seed: int | None = None
        self._chat = chat
        self._text = told.text
        self._lie = told.lie
        self.prompt = len(prompt)
        self._prompt_ids = prompt
        self._ending = self._end(told)
        self.tokens = self._ending.count
        options = request.get("stream_options") or {}
        self._usage = bool(options.get("include_usage"))
        self._continuous = self._usage and bool(options.get("continuous_usage_stats"))
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        model = request.get("model", "null")
        self._head = {"id": f"{prefix}-{number:016x}", "object": kind, "created": 1_795_000_000, "model": model}
        self._events_head = {**self._head, "object": "chat.completion.chunk"} if chat else self._head
        self._details = b',"completion_tokens_details":null' if chat else b""
        self._request_logprobs = request.get("logprobs")
        self._bodies: list[bytes] = []
        self._prepare()

    def first(self) -> bytes:
        if not self._chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        chunks = ({**self._events_head, "choices": [{**choice, "index": index}]} for index in range(self.choices))
        tail = {"prompt_token_ids": self._told_prompt(), "prompt_text": None}
        return b"".join(self._event(chunk, 0, tail) for chunk in chunks)

    def chunk(self, number: int, index: int) -> bytes:
        if number == self.tokens:
            choice = {**self._choice, "index": index, "finish_reason": self._ending.finish, "stop_reason": None}
            return self._event({**self._events_head, "choices": [choice]}, number)
        if not self._continuous:
            return b"data: %b}\n\n" % self._bodies[index]
        told, prompt = (
            number + self._lie,
            self.prompt,
        )  # written out: `bench.ceiling` measures what is around this
        return b'data: %b,"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}}\n\n' % (
            self._bodies[index],
            prompt,
            prompt + told,
            told,
            self._details,
        )

    def last(self) -> bytes:
        if not self._usage:
            return b"data: [DONE]\n\n"
        chunk = {**self._events_head, "choices": [], "usage": self._count(self.tokens * self.choices)}
        return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"

    def whole(self) -> bytes:
        told = self._told_prompt()
        tail = {"prompt_token_ids": told} if self._chat and told is not None else {}
        choices = [{**self._whole_choice(), "index": index} for index in range(self.choices)]
        usage = self._count(self.tokens * self.choices)
        return msgspec.json.encode({**self._head, "choices": choices, "usage": usage, **tail})

    def _end(self, told: Told) -> Ending:
        """Words that are not numbered are no stop strings, and EOS has their text too."""
        return ending(partial(words, 0), self.sampling, self.sampling.max_tokens, told.reply_tokens, look=False)

    def _prepare(self) -> None:
        if self._chat:
            choice = {"index": 0, "delta": {"content": self._text}, "logprobs": None, "finish_reason": None}
        else:
            choice = {"index": 0, "text": self._text, "logprobs": None, "finish_reason": None, "stop_reason": None}
            choice["prompt_token_ids"] = None
        self._choice = {**choice, "token_ids": None}
        self._bodies = [
            msgspec.json.encode({**self._events_head, "choices": [{**self._choice, "index": index}]})[:-1]
            for index in range(self.choices)
        ]

    def _told_prompt(self) -> Sequence[int] | None:
        return None

    def _whole_choice(self) -> dict[str, Any]:
        text = self._text * self.tokens
        message: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": 0, "logprobs": None, "finish_reason": self._ending.finish} | message

    def _event(self, chunk: dict[str, Any], number: int, tail: dict[str, Any] | None = None) -> bytes:
        if self._continuous:
            details = {"completion_tokens_details": None} if self._details else {}
            chunk = {**chunk, "usage": self._count(number) | details}
        return b"data: " + msgspec.json.encode(chunk | (tail or {})) + b"\n\n"

    def _usage_bytes(self, number: int) -> bytes:
        number += self._lie
        return b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}' % (
            self.prompt,
            self.prompt + number,
            number,
            self._details,
        )

    def _count(self, number: int) -> dict[str, Any]:
        number += self._lie
        return {"prompt_tokens": self.prompt, "total_tokens": self.prompt + number, "completion_tokens": number}


class NumberedReply(Reply):
    """A reply whose tokens are numbered (`null_tokens`): what `return_token_ids` gets.

    Raises WrongResume if the prompt ends with tokens of a reply in any but their right order.
    """

    def chunk(self, number: int, index: int) -> bytes:
        at = self.begun + number - 1
        token, text = self._token(number)
        logprobs = (
            msgspec.json.encode(self._logprobs_of([(token, text, at)], self._offset)) if self._logprobs else b"null"
        )
        if index == self.choices - 1:
            self._offset += len(text)
        last = number == self.tokens
        finish = b'"%b"' % self._ending.finish.encode() if last else b"null"
        reason = msgspec.json.encode(self._ending.stop_reason) if last else b"null"
        if not self._chat:
            prompt = msgspec.json.encode(self._prompt_ids) if number == 1 else b"null"
            finish += b',"stop_reason":%b,"prompt_token_ids":%b' % (reason, prompt)
        elif last:
            finish += b',"stop_reason":' + reason
        usage = self._usage_bytes(number) if self._continuous else b""
        values = self._bodies[0], index, text.encode(), logprobs, finish, token, usage
        form = b'data: %b,"choices":[{"index":%d,"delta":{"content":"%b"},"logprobs":%b,"finish_reason":%b,'
        if not self._chat:
            form = b'data: %b,"choices":[{"index":%d,"text":"%b","logprobs":%b,"finish_reason":%b,'
        return (form + b'"token_ids":[%d]}]%b}\n\n') % values

    def _end(self, told: Told) -> Ending:
        self._offset = 0
        self._seed, self.begun = split(self._prompt_ids)
        self.seed = self._seed
        pieces = partial(words, self._seed, self.begun)
        ends_after = told.reply_tokens and max(0, told.reply_tokens - self.begun)
        return ending(pieces, self.sampling, self.sampling.max_tokens, ends_after, may_stop(self.sampling))

    def _token(self, number: int) -> tuple[int, str]:
        if number == self.tokens and self._ending.last is not None:
            (token,), text = self._ending.last
            return token, text
        at = self.begun + number - 1
        return token_id(self._seed, at), token_text(self._seed, at)

    def _prepare(self) -> None:
        self._logprobs = self._request_logprobs not in (None, False)
        self._bodies = [msgspec.json.encode(self._events_head)[:-1]]

    def _told_prompt(self) -> Sequence[int] | None:
        return self._prompt_ids

    def _whole_choice(self) -> dict[str, Any]:
        tokens = [(*self._token(number), self.begun + number - 1) for number in range(1, self.tokens + 1)]
        text = "".join(text for _, text, _ in tokens)
        choice: dict[str, Any] = {"index": 0}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice["logprobs"] = self._logprobs_of(tokens, 0) if self._logprobs else None
        choice |= {"finish_reason": self._ending.finish, "stop_reason": self._ending.stop_reason}
        choice["token_ids"] = [token for token, _, _ in tokens]
        return choice if self._chat else {**choice, "prompt_token_ids": self._prompt_ids}

    def _logprobs_of(self, tokens: Iterable[tuple[int, str, int]], offset: int) -> dict[str, Any]:
        """vLLM's shapes; the value tells the position. `text_offset` counts from where this request begins."""
        told = [(text, logprob_of(at)) for _, text, at in tokens]
        if self._chat:
            content = [
                {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                for text, value in told
            ]
            return {"content": content}
        offsets = []
        for text, _ in told:
            offsets.append(offset)
            offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [value for _, value in told],
            "tokens": [text for text, _ in told],
            "top_logprobs": [{text: value} for text, value in told],
        }
