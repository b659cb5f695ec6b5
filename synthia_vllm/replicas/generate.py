"""vLLM's `POST /inference/v1/generate`: token ids in, token ids out, text made here.

Shapes and rules are vLLM 0.29's (`entrypoints/scale_out/token_in_token_out/`): a chunk has at least one token, the last
one its `finish_reason`; which stop string or token it was is not told; usage comes last, with cached tokens where the
engine runs with `--enable-prompt-tokens-details`; a prompt's log-probabilities come in whole replies alone.
"""

from typing import Any

import msgspec

from synthia_vllm.engine.port import Delta
from synthia_vllm.replicas.detect import GENERATE, Endpoint
from synthia_vllm.replicas.logprobs import Entry, wanted
from synthia_vllm.replicas.reply import Chunk, Reply


class _Logprobs(msgspec.Struct):
    content: list[Entry] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(Chunk):
    choices: list[_Choice] | None = None
    prompt_logprobs: list[msgspec.Raw] | None = None


class GenerateReply(Reply):
    """Of an engine that takes token ids."""

    path = GENERATE
    decoder = msgspec.json.Decoder(_Chunk)

    def body(self, endpoint: Endpoint) -> bytes:
        sampling, salt = self.generation.sampling, self.generation.salt
        params: dict[str, Any] = msgspec.to_builtins(sampling)
        # Else vLLM holds text back, and a lost engine takes it along.
        params["include_stop_str_in_output"] = True
        if not sampling.stop:
            params["detokenize"] = False  # nobody looks at the engine's text
        if self.with_logprobs:
            params["logprobs"] = wanted(sampling.logprobs, sampling.logprob_token_ids)
        body: dict[str, Any] = {"token_ids": self.generation.prompt, "sampling_params": params}
        if sampling.prompt_logprobs is None:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if salt is not None:
            body["cache_salt"] = salt
        return msgspec.json.encode(body)

    def add_choice(self, delta: Delta, chunk: Any) -> None:
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs
        choice: _Choice = chunk.choices[0]
        content = choice.logprobs.content if choice.logprobs is not None else None
        self.add_ids(
            delta, choice.token_ids or [], choice.finish_reason, content or (), self.generation.sampling.logprobs
        )
