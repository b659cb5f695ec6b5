"""How vLLM turns tokens into chunks, as far as a seam can show it. Not a model: it says a fixed list of tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CHAT = "/v1/chat/completions"
PROMPT = [1, 2, 3]


class SimulatedVllm:
    """Says `script`, tokens as bytes; a token's id is 100 and its place in `vocabulary`.

    Text is held back while it ends inside a character, and several tokens come in one chunk as `sizes` says
    (`v1/engine/detokenizer.py`: `FastIncrementalDetokenizer`, `check_stop_strings`).
    """

    def __init__(self, script: Sequence[bytes]) -> None:
        self.script = script
        self.vocabulary = sorted(set(script))

    def id_of(self, token: bytes) -> int:
        return 100 + self.vocabulary.index(token)

    def stream(self, route: str, request: Mapping[str, Any], sizes: Sequence[int]) -> Iterator[bytes]:
        begun = 0
        prompt = PROMPT
        if isinstance(request.get("prompt"), list):
            prompt = request["prompt"]
            begun = len(prompt) - len(PROMPT)
            assert prompt == PROMPT + [self.id_of(token) for token in self.script[:begun]]
        most = request.get("max_tokens") or 16
        tokens = self.script[begun : begun + most]
        head = {"id": f"id-{begun}", "object": "chunk", "created": begun, "model": "m"}
        if route == CHAT:
            choice: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            yield self._event({**head, "choices": [{**choice, "finish_reason": None}], "prompt_token_ids": prompt})
        known, text, shown, stop = b"", "", 0, None
        pending: list[int] = []
        size = iter(sizes)
        wanted = next(size, 1)
        for number, token in enumerate(tokens, start=1):
            known += token
            pending.append(self.id_of(token))
            before, text = len(text), _whole(known, text)
            stop = _stop(text, before, request, number)
            last = stop is not None or number == len(tokens)
            if len(pending) < wanted and not last:
                continue
            wanted = next(size, 1)
            if stop is not None:
                end = text.find(stop, max(0, before - len(stop) + 1)) + len(stop)
                text = text[: end if request["include_stop_str_in_output"] else end - len(stop)]
            delta, shown = text[shown:], len(text)
            finish = None if not last else "stop" if stop is not None else "length"
            yield self._chunk(route, head, request, delta, pending, finish, stop, number)
            pending = []
            if stop is not None:
                break
        if (request.get("stream_options") or {}).get("include_usage"):
            yield self._event({**head, "choices": [], "usage": self._usage(len(prompt), number)})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        route: str,
        head: Mapping[str, Any],
        request: Mapping[str, Any],
        text: str,
        ids: list[int],
        finish: str | None,
        stop: str | None,
        number: int,
    ) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": text}} if route == CHAT else {"text": text}
        choice |= {"logprobs": None, "finish_reason": finish}
        if route != CHAT or finish:
            choice["stop_reason"] = stop
        if route != CHAT:
            choice["prompt_token_ids"] = request.get("prompt", PROMPT) if number == len(ids) else None
            if choice["prompt_token_ids"] == "text":
                choice["prompt_token_ids"] = PROMPT
        chunk = {**head, "choices": [{**choice, "token_ids": ids}]}
        if (request.get("stream_options") or {}).get("continuous_usage_stats"):
            chunk["usage"] = self._usage(len(PROMPT), number)
        return self._event(chunk)

    def _usage(self, prompt: int, number: int) -> dict[str, int]:
        return {"prompt_tokens": prompt, "total_tokens": prompt + number, "completion_tokens": number}

    def _event(self, chunk: Mapping[str, Any]) -> bytes:
        return b"data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def _whole(known: bytes, before: str) -> str:
    """The text so far; while the last token ends inside a character, that without the token."""
    text = known.decode(errors="replace")
    return before if text.endswith("\ufffd") else text


def _stop(text: str, before: int, request: Mapping[str, Any], number: int) -> str | None:
    if number <= (request.get("min_tokens") or 0):
        return None
    return next((s for s in request.get("stop") or () if text.find(s, max(0, before - len(s) + 1)) >= 0), None)
