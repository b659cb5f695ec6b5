"""What a client has of one streamed reply, and how another engine goes on from there.

The seam is exact by token ids: the next engine gets the prompt's ids and those of the reply so far as one prompt of
`/v1/completions`, and its chunks are put into the form of the first. Shapes and order of fields are vLLM 0.29's
(`entrypoints/openai/{chat_completion,completion}/serving.py`).
"""

import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from synthia_vllm.cluster.stops import StopCutter, StopWatch, stop_strings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DONE = b"data: [DONE]\n\n"
_IDS_MARK = b'"token_ids":['
_IDS = re.compile(rb'"token_ids":\[([\d,]*)\]')
_PROMPT_IDS = re.compile(rb'"prompt_token_ids":\[[\d,]*\]')
_EMPTY = {CHAT: b'"content":""', COMPLETIONS: b'"text":""'}
_NO_CHOICES = b'"choices":[]'
_UNFINISHED = b'"finish_reason":null'
# A character is four bytes at most, hence four tokens; what stays without text for longer is no cut character.
_MAX_HELD = 4
_CONTEXT_TOKENS = 8  # that a tokenizer may need before a token to know its text
_DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, OpenAI's and vLLM's
# What means the same on both routes and does not depend on what was generated before.
_CARRIED = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "allowed_token_ids", "bad_words", "logprob_token_ids", "return_tokens_as_token_ids", "cache_salt",
    "stream_interval", "user", "vllm_xargs",
)  # fmt: skip
# Fields whose state another engine can't take up: a grammar in its middle, beams, several texts, foreign caches.
_STATEFUL = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "use_beam_search",
    "best_of", "suffix", "prompt_embeds", "kv_transfer_params", "ec_transfer_params", "thinking_token_budget",
    "repetition_detection", "truncate_prompt_tokens",
)  # fmt: skip


def resumable(route: str, request: Mapping[str, Any]) -> bool:
    """Whether a stream can go on from token ids. The table in docs/cluster.md lists what can't."""
    if route not in (CHAT, COMPLETIONS) or request.get("stream") is not True:
        return False
    if (request.get("n") or 1) != 1 or any(request.get(name) for name in _STATEFUL):
        return False
    form = request.get("response_format")
    if isinstance(form, dict) and form.get("type") not in (None, "text"):
        return False
    prompt = request.get("prompt")
    # A list of texts, or of lists of ids, is several prompts.
    return not (isinstance(prompt, list) and any(not isinstance(token, int) for token in prompt))


@dataclass(slots=True)
class _Piece:
    """One chunk that brings tokens or an end. `raw` are the bytes to send where nothing in it has to change."""

    ids: list[int]
    blank: bool  # brings no text
    finish: str | None
    raw: bytes = b""
    text: str = ""
    stop: int | str | None = None  # vLLM's stop_reason
    logprobs: Any = None


class Progress:
    """One resumable stream. Feed it the engine's events; what it returns goes to the client.

    Chunks that bring tokens and no text are held until text follows: the tokens may be the first bytes of a character
    (an emoji is several tokens), whose text a lost engine takes with it. Held tokens are generated again elsewhere, so
    that the text, the ids and the count that the client has never disagree.
    """

    def __init__(self, route: str, request: Mapping[str, Any]) -> None:
        self.ids: list[int] = []  # of the reply, as far as the client has it
        self.prompt: list[int] | None = None  # ids, once the engine has told them
        self.finished = False  # a finish_reason went out; an engine that goes on is not needed any more
        self.done = False  # and so did all that follows it
        self.cut_short = False  # finished by us: the engine would go on
        self._route = route
        self._request = request
        self._stops = stop_strings(request)
        self._head: dict[str, Any] = {}  # id, object, created, model of the first chunk
        self._held: deque[_Piece] = deque()
        self._legs = 0
        self._wants_ids = bool(request.get("return_token_ids"))
        options = request.get("stream_options") or {}
        self._wants_usage = bool(options.get("include_usage"))
        self._usage_sent = False
        self._wants_continuous_usage = self._wants_usage and bool(options.get("continuous_usage_stats"))
        # The engine is asked to leave stop strings in, since what it holds back of a text is lost with it.
        cuts = bool(self._stops) and not request.get("include_stop_str_in_output")
        self._cutter = StopCutter(self._stops) if cuts else None
        self._watch: StopWatch | None = None  # after a seam
        self._wants_logprobs = _wants_logprobs(request)
        self._takes_apart = cuts or self._wants_logprobs
        self._length = self._seam_length = 0  # characters the engines have sent; as many at the last seam
        self._recent: deque[_Piece] = deque(maxlen=max(map(len, self._stops), default=1))  # the last with text

    def first_request(self) -> dict[str, Any]:
        """The client's request, with what makes it resumable."""
        self._legs = 1
        request = {**self._request, "return_token_ids": True}
        if self._cutter is not None:
            request["include_stop_str_in_output"] = True
        return request

    def next_request(self, context: int | None) -> dict[str, Any] | None:
        """What another engine is asked for the rest; None where there is none left and `close` is due.

        `context` is the most that prompt and reply can have in all, for requests without a length of their own.
        """
        assert self.prompt is not None
        left = self._tokens_left(context)
        if self.finished or (left is not None and left <= 0):
            return None
        request = self._request
        found = {name: request[name] for name in _CARRIED if request.get(name) is not None}
        found |= {
            "prompt": self.prompt + self.ids,
            "stream": True,
            "return_token_ids": True,
            "add_special_tokens": False,
            "include_stop_str_in_output": True,
            "min_tokens": max(0, (request.get("min_tokens") or 0) - len(self.ids)),
        }
        if left is not None:
            found["max_tokens"] = left
        if (seed := request.get("seed")) is not None:
            found["seed"] = seed + len(self.ids)  # or the same random numbers would come again
        if self._wants_logprobs:
            wanted = request["logprobs"]
            found["logprobs"] = (request.get("top_logprobs") or 0) if wanted is True else wanted
        if bias := self._bias():
            found["logit_bias"] = bias
        return found

    def lost(self) -> None:
        """The engine is lost, and with it what is held."""
        self._held.clear()
        self._legs += 1
        self._seam_length = self._length
        if self._stops:
            self._watch = StopWatch(self._stops, "".join(map(self._text_of, self._recent)))

    def drop(self, tokens: int) -> None:
        """Takes back the last tokens, whose text never came."""
        if tokens:
            del self.ids[-tokens:]
            del self._recent[-1].ids[-tokens:]

    def last_tokens(self) -> tuple[int, list[int]]:
        """How many tokens the last chunk with text brought, and their ids after some that came before.

        Where there is more than one, the last ones can be the beginning of a character.
        """
        size = len(self._recent[-1].ids) if self._recent else 0
        return size, [*(self.prompt or []), *self.ids][-size - _CONTEXT_TOKENS :]

    def feed(self, event: bytes) -> bytes:
        """One event of the engine, as it goes to the client; empty to send nothing (yet)."""
        if self._legs > 1 or self._takes_apart:
            return self._convert(event)
        return self._pass(event)

    def close(self) -> bytes:
        """The end of the stream, as far as the client does not have it yet."""
        out = b""
        if not self.finished:
            out = self._take(_Piece([], blank=False, finish="length"))
        if not self.done:
            self.done = True
            if self._wants_usage and not self._usage_sent:
                out += _data({**self._head, "choices": [], "usage": self._usage()})
            out += DONE
        return out

    def _pass(self, event: bytes) -> bytes:
        """An event of the first engine, with as little work as possible."""
        if self.prompt is None:
            event = self._begin(event)
        at = event.rfind(_IDS_MARK)
        if at < 0 or (found := _IDS.match(event, at)) is None:
            self.done = self.done or event.startswith(DONE)
            self._usage_sent = self._usage_sent or _NO_CHOICES in event
            return event
        ids = [int(digits) for digits in found[1].split(b",")] if found[1] else []
        if not self._wants_ids:
            event = event[:at] + b'"token_ids":null' + event[found.end() :]
        finish = None if _UNFINISHED in event else "ended"
        return self._take(_Piece(ids, _EMPTY[self._route] in event, finish, event))

    def _convert(self, event: bytes) -> bytes:
        """An event that has to be taken apart: of a later engine, or with a stop string to cut, or with logprobs."""
        if self.prompt is None:
            begun = self._begin(event)
            if self._route == CHAT or self.prompt is None:
                return begun
        if event.startswith(DONE):
            return self.close() if self.finished else b""
        chunk = _decode(event)
        if chunk is None or not chunk.get("choices") or self.finished:
            return b""  # comments, and usage, which we tell ourselves
        choice = chunk["choices"][0]
        delta = choice.get("delta")
        text = (delta.get("content") if delta is not None else choice.get("text")) or ""
        finish = choice.get("finish_reason")
        logprobs = choice.get("logprobs")
        if logprobs and self._legs > 1:
            logprobs = self._logprobs(logprobs)
        self._length += len(text)
        ids = choice.get("token_ids") or []
        return self._take(_Piece(ids, not text, finish, text=text, stop=choice.get("stop_reason"), logprobs=logprobs))

    def _begin(self, event: bytes) -> bytes:
        """The first chunk tells the prompt's ids, and what all later ones start with."""
        chunk = _decode(event)
        if chunk is None or not chunk.get("choices"):
            return event
        self._head = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
        prompt = chunk.get("prompt_token_ids") or chunk["choices"][0].get("prompt_token_ids")
        if prompt is None:
            return event
        self.prompt = prompt
        return event if self._wants_ids else _PROMPT_IDS.sub(b'"prompt_token_ids":null', event, count=1)

    def _take(self, piece: _Piece) -> bytes:
        if piece.blank and piece.ids and piece.finish is None:
            self._held.append(piece)
            out = b""
            while sum(len(held.ids) for held in self._held) > _MAX_HELD:
                out += self._emit(self._held.popleft())
            return out
        out = b"".join(map(self._emit, self._held)) if self._held else b""
        self._held.clear()
        self._recent.append(piece)
        return out + self._emit(piece) if out else self._emit(piece)

    def _emit(self, piece: _Piece) -> bytes:
        self.ids += piece.ids
        if piece.finish is not None:
            self.finished = True
        if piece.raw:
            return piece.raw
        text = piece.text
        if self._watch is not None and len(self.ids) > (self._request.get("min_tokens") or 0):
            text, stop = self._watch.feed(text)
            if stop is not None:
                piece.finish, piece.stop, self.finished = "stop", stop, True
                self.cut_short = True
        if self._cutter is not None:
            text = self._cutter.finish(text, piece.stop) if piece.finish else self._cutter.feed(text)
        return self._render(text, piece)

    def _render(self, text: str, piece: _Piece) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": text}} if self._route == CHAT else {"text": text}
        choice |= {"logprobs": piece.logprobs, "finish_reason": piece.finish}
        if self._route == COMPLETIONS or piece.finish:
            choice["stop_reason"] = piece.stop
        if self._route == COMPLETIONS:
            first = self._wants_ids and len(self.ids) == len(piece.ids)
            choice["prompt_token_ids"] = self.prompt if first else None
        choice["token_ids"] = piece.ids if self._wants_ids else None
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._wants_continuous_usage:
            chunk["usage"] = self._usage()
        return _data(chunk)

    def _usage(self) -> dict[str, Any]:
        prompt, generated = len(self.prompt or ()), len(self.ids)
        return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}

    def _tokens_left(self, context: int | None) -> int | None:
        request = self._request
        most = request.get("max_completion_tokens") or request.get("max_tokens")
        if most is None and self._route == COMPLETIONS:
            most = _DEFAULT_COMPLETION_TOKENS
        if most is None and context is not None:
            most = context - len(self.prompt or ())
        return None if most is None else most - len(self.ids)

    def _bias(self) -> dict[str, float]:
        """The client's own logit_bias, and what the reply's tokens so far cost by presence and frequency penalty.

        To the next engine they are a part of the prompt, which these two penalties do not count (OpenAI's API
        reference). A token that occurs again after the seam pays for its presence twice.
        """
        bias: dict[str, float] = dict(self._request.get("logit_bias") or {})
        presence = self._request.get("presence_penalty") or 0.0
        frequency = self._request.get("frequency_penalty") or 0.0
        if presence or frequency:
            for token, count in Counter(self.ids).items():
                bias[str(token)] = bias.get(str(token), 0.0) - presence - frequency * count
        return bias

    def _logprobs(self, found: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of `/v1/completions` in the form of the client's route."""
        if self._route == COMPLETIONS:
            return {**found, "text_offset": [offset + self._seam_length for offset in found["text_offset"]]}
        rows = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        wanted = self._request.get("top_logprobs") or 0
        return {"content": [_chat_logprob(token, logprob, top or {}, wanted) for token, logprob, top in rows]}

    def _text_of(self, piece: _Piece) -> str:
        if not piece.raw:
            return piece.text
        chunk = _decode(piece.raw)
        assert chunk is not None
        choice = chunk["choices"][0]
        return (choice["delta"].get("content") if self._route == CHAT else choice["text"]) or ""


def _wants_logprobs(request: Mapping[str, Any]) -> bool:
    """As vLLM takes it: a number on /v1/completions, 0 included; on the chat route only with `top_logprobs`."""
    wanted = request.get("logprobs")
    if wanted is True:
        return request.get("top_logprobs") is not None or bool(request.get("logprob_token_ids"))
    return wanted is not None and wanted is not False


def _chat_logprob(token: str, logprob: float, top: Mapping[str, float], wanted: int) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", errors="replace"))}

    best = sorted(top.items(), key=lambda pair: -pair[1])[:wanted]
    return {**entry(token, logprob), "top_logprobs": [entry(*pair) for pair in best]}


def _decode(event: bytes) -> dict[str, Any] | None:
    """The JSON object of a data event; None for comments and [DONE]."""
    if not event.startswith(b"data: {"):
        return None
    found: dict[str, Any] = msgspec.json.decode(event[6:])
    return found


def _data(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
