"""What a request may take of the engine, as far as it shows before the engine sees it: for limits and the queue."""

import asyncio
from collections.abc import Callable
from typing import Any

from synthia_vllm.gateway.call import Call
from synthia_vllm.prompt import SAMPLING_DEFAULTS

TokenCounter = Callable[[str], int]

# Route: (fields that hold the prompt, fields that bound the reply, bound without them).
_GENERATING: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "/v1/chat/completions": (
        ("messages",),
        ("max_completion_tokens", "max_tokens"),
        int(SAMPLING_DEFAULTS["max_tokens"]),
    ),
    "/v1/completions": (("prompt",), ("max_tokens",), 16),  # OpenAI's default, and vLLM's
    "/v1/responses": (("instructions", "input"), ("max_output_tokens",), int(SAMPLING_DEFAULTS["max_tokens"])),
    "/v1/messages": (("system", "messages"), ("max_tokens",), int(SAMPLING_DEFAULTS["max_tokens"])),
}
_TOKENS_A_MESSAGE = 6  # the role's marker and the line's end
_BYTES_A_TOKEN = 3  # English has four and more, other scripts less
# Longer texts are counted in a thread: a tokenizer reads about a megabyte a second.
_INLINE_CHARACTERS = 8192


def estimate_tokens(text: str) -> int:
    """For engines whose tokenizer is not known here. The engine's own count replaces it when the reply comes."""
    return len(text.encode()) // _BYTES_A_TOKEN + 1


class Demand:
    """Fills in `prompt_tokens` and `max_generated` of a call.

    `context`, if known, is the model's in tokens: no reply can be longer than what the prompt leaves of it.
    Wrong types are left for the engine to refuse: they count as the default.
    """

    def __init__(self, count: TokenCounter = estimate_tokens, context: int | None = None) -> None:
        self._count = count
        self._context = context

    async def measure(self, call: Call) -> None:
        fields = _GENERATING.get(call.route)
        request = call.request
        if fields is None or request is None:
            return
        prompt_fields, length_fields, length = fields
        prompts = 1
        if call.route == "/v1/completions":
            prompts = _number_of_prompts(request.get("prompt"))
        texts: list[str] = []
        tokens = sum(_collect(request.get(field), texts) for field in prompt_fields)
        text = "\n".join(texts)
        if len(text) <= _INLINE_CHARACTERS:
            tokens += self._count(text)
        else:
            tokens += await asyncio.to_thread(self._count, text)
        for field in length_fields:
            if _is_count(request.get(field)):
                length = request[field]
                break
        call.prompt_tokens = max(1, tokens)
        if self._context is not None:
            length = min(length, max(1, self._context - call.prompt_tokens // prompts))
        choices = request["n"] if _is_count(request.get("n")) else 1
        # At least one, also with max_tokens 0: reading a prompt is work as well.
        call.choices = max(1, min(choices, 128)) * prompts
        call.max_generated = max(1, length) * call.choices
        options = request.get("stream_options")
        if request.get("stream") is True and isinstance(options, dict):
            call.wants_usage = bool(options.get("include_usage"))
            call.wants_continuous_usage = call.wants_usage and bool(options.get("continuous_usage_stats"))


def _collect(value: Any, texts: list[str]) -> int:
    """Puts the texts in a prompt, messages or parts into `texts`; returns the tokens that are no text."""
    if isinstance(value, str):
        texts.append(value)
        return 0
    if isinstance(value, dict):
        extra = _TOKENS_A_MESSAGE if "role" in value else 0
        return extra + sum(_collect(value.get(field), texts) for field in ("content", "text"))
    if isinstance(value, list):
        return sum(1 if isinstance(item, int) else _collect(item, texts) for item in value)
    return 0


def _number_of_prompts(prompt: Any) -> int:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
