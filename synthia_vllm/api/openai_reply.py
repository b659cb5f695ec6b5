"""What the replies of OpenAI's chat completions and completions have in common, by vLLM's 0.29."""

from collections.abc import Sequence
from typing import Any

import msgspec

from synthia_vllm.api.base import Asker, Counts, Model, event
from synthia_vllm.api.errors import openai_form
from synthia_vllm.api.openai_json import GAP, usage
from synthia_vllm.api.sampling import SamplingFields
from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.errors import SynthiaError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class OpenAIReply:
    """A Reply, but for what `feed` and `end` make of it. `logprobs` are those asked for beside each token, or None."""

    def __init__(
        self,
        request: SamplingFields,
        model: Model,
        asker: Asker,
        texts: Sequence[SequenceText],
        *,
        name: str,
        kind: str,
        logprobs: int | None,
    ) -> None:
        self.texts = texts
        self.wants_logprobs = logprobs is not None
        self.top = None if request.logprob_token_ids else logprobs  # None: all that come
        self.as_ids = bool(request.return_tokens_as_token_ids)
        self.wants_ids = bool(request.return_token_ids)
        self.wants_usage = request.wants_usage
        self.wants_continuous_usage = request.wants_continuous_usage
        # The model as vLLM names it, whichever of its names was asked for.
        about = {"id": f"{name}-{asker.id}", "object": kind, "created": asker.created, "model": model.names[0]}
        self._about: dict[str, Any] = about

    def start(self, counts: Counts) -> bytes:
        return b""

    def error(self, error: SynthiaError) -> bytes:
        return event(_encode(openai_form(error))) + DONE

    def chunk_head(self) -> bytes:
        """How each chunk of a stream begins, up to its choices."""
        return b"data: " + _encode({**self._about, "choices": []})[: -len(b"]}")]

    def usage_so_far(self, prompt: int, generated: int) -> bytes:
        """A chunk's usage, where each has its own."""
        return b',"usage":' + _encode(usage(prompt, generated)) if self.wants_continuous_usage else b""

    def stream_end(self, head: bytes, counts: Counts) -> bytes:
        if not self.wants_usage:
            return DONE
        told = _encode(usage(counts.prompt, counts.generated, counts.cached))
        return b'%b],"usage":%b}\n\n' % (head, told) + DONE

    def whole_fields(self, counts: Counts) -> dict[str, Any]:
        """The fields of a whole reply, its choices a gap."""
        return {
            **self._about,
            "choices": GAP,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(counts.prompt, counts.generated, counts.cached),
            "kv_transfer_params": None,
        }


class Choice:
    """One reply of several, as it grows."""

    def __init__(self, echoed: str = "") -> None:
        self.texts = [echoed]
        self.ids: list[int] = []
        self.finish = "stop"
        self.stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.ids += piece.ids
        if piece.finish is not None:
            self.finish, self.stop_reason = piece.finish, piece.stop_reason

    def fields(self, index: int, *, with_ids: bool) -> dict[str, Any]:
        return {
            "index": index,
            "finish_reason": self.finish,
            "stop_reason": self.stop_reason,
            "token_ids": self.ids if with_ids else None,
        }
