"""How vLLM's `/inference/v1/generate` turns a reply into chunks, as far as a seam can show it.

Not a model: it says a fixed list of tokens of the null tokenizer.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.bench.null.tokens import BOS, EOS
from synthia_vllm.engine.tokenizer import TextStream

PROMPT = [BOS, 10, 20, 30]
GARBAGE = 42  # what an engine says that does not know where a reply with a state stands


class SimulatedVllm:
    """Says `script`; several tokens come in one chunk as `sizes` says.

    stateful   a request for the rest of a reply gets garbage: it has to be replayed
    """

    def __init__(self, script: Sequence[int], *, stateful: bool = False, prompt: Sequence[int] = PROMPT) -> None:
        self.script = list(script)
        self.prompt = list(prompt)
        self.stateful = stateful

    def chunks(self, body: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
        """The data of its events."""
        request = json.loads(body)
        sampling, prompt = request["sampling_params"], request["token_ids"]
        begun = len(prompt) - len(self.prompt)
        assert prompt == self.prompt + self.script[:begun]
        replayed = (sampling.get("extra_args") or {}).get("synthia_replay", [])
        assert replayed == self.script[: len(replayed)]
        script = self.script if not (begun and self.stateful) else [GARBAGE] * len(self.script)
        tokens = script[begun : begun + sampling["max_tokens"]]
        finishes = self._ends(tokens, prompt, sampling)
        wanted, size, pending = iter(sizes), 0, list[int]()
        size = next(wanted, 1)
        for number, token in enumerate(tokens, start=1):
            pending.append(token)
            finish = finishes if number == len(tokens) else None
            if len(pending) >= size or finish is not None:
                yield self._chunk(pending, finish, begun + number, sampling)
                size, pending = next(wanted, 1), []
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        usage["prompt_tokens_details"] = {"cached_tokens": len(prompt) - 1}
        yield json.dumps({"request_id": "1", "choices": [], "usage": usage}).encode()

    def _ends(self, tokens: list[int], prompt: Sequence[int], sampling: dict[str, Any]) -> str:
        """Cuts the tokens where the engine would end (`v1/engine/detokenizer.py`), and tells why."""
        stream, text = TextStream(null_tokenizer(), prompt), ""
        for number, token in enumerate(tokens, start=1):
            before, text = len(text), text + stream.feed(token)
            if token == EOS:
                del tokens[number:]
                return "stop"
            if number <= sampling.get("min_tokens", 0):
                continue
            if any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in sampling.get("stop", ())):
                del tokens[number:]
                return "stop"
        return "length"

    def _chunk(self, ids: list[int], finish: str | None, end: int, sampling: dict[str, Any]) -> bytes:
        logprobs = None
        if "logprobs" in sampling:
            places = range(end - len(ids), end)
            logprobs = {"content": [_entry(token, at) for token, at in zip(ids, places, strict=True)]}
        choice = {"index": 0, "logprobs": logprobs, "finish_reason": finish, "token_ids": ids}
        return json.dumps({"request_id": "1", "choices": [choice], "usage": None}).encode()


def _entry(token: int, at: int) -> dict[str, Any]:
    entry = {"token": f"token_id:{token}", "logprob": -float(at), "bytes": None}
    return {**entry, "top_logprobs": [entry, {**entry, "token": "token_id:7", "logprob": -at - 1.0}]}
