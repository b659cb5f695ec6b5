"""OpenAI's chat completions, and vLLM's /tokenize in its chat form."""

from collections.abc import Sequence
from typing import Any

from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.dialects.base import AS_IT_CAME, Exchange
from synthia_vllm.prompt import MarkerPolicy


class ChatExchange(Exchange):
    """The messages of a request in OpenAI's chat form."""

    def prepare_messages(self) -> None:
        messages = self.check_messages(self.request.get("messages"), "messages")
        preset = self.preset()
        if preset and not any(message["role"] in ("system", "developer") for message in messages):
            messages.insert(0, {"role": "system", "content": preset})
        if self.request.get("continue_final_message"):
            if messages[-1]["role"] != "assistant":
                raise RequestError(
                    "continue_final_message needs a last message of role 'assistant'", param="continue_final_message"
                )
            self.request.setdefault("add_generation_prompt", False)
            self.keep_leading = True
        else:
            self.request.pop("add_generation_prompt", None)


class ChatCompletions(ChatExchange):
    """POST /v1/chat/completions."""

    length_fields = ("max_tokens", "max_completion_tokens")

    def __init__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> None:
        super().__init__(request, role_markers=role_markers)
        self.refuse_tools()
        self.prepare_messages()
        self.add_defaults()
        own = self.merge_stops()
        if request.get("min_tokens"):
            # The engine looks for stop strings from there on only: the client's are the engine's to cut.
            return
        if not request.get("include_stop_str_in_output"):
            self.stops = (*own, *self.stops)
        # We cut the text ourselves, so that the engine need not hold back the first characters of every reply.
        request["include_stop_str_in_output"] = True

    def chunk(self, chunk: dict[str, Any]) -> Sequence[dict[str, Any]]:
        changed = False
        kept = []
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            text = delta.get("content")
            finished = choice.get("finish_reason") is not None
            if text is None and not finished:
                kept.append(choice)
                continue
            reply = self.filter(choice["index"])
            passed = reply.feed(text or "") + (reply.finish() if finished else "")
            if finished and reply.stopped and choice["finish_reason"] == "length":
                choice["finish_reason"] = "stop"
                changed = True
            if passed != (text or ""):
                delta["content"] = passed
                choice["delta"] = delta
                changed = True
            if passed or finished or "role" in delta or choice.get("logprobs") or choice.get("token_ids"):
                kept.append(choice)
        if len(kept) == len(chunk.get("choices", ())):
            return (chunk,) if changed else AS_IT_CAME
        if not kept and not chunk.get("usage"):
            return ()
        chunk["choices"] = kept
        return (chunk,)

    def whole(self, reply: dict[str, Any]) -> dict[str, Any]:
        for choice in reply.get("choices", ()):
            message = choice["message"]
            text = message.get("content")
            if text is None:
                continue
            message["content"] = self.clean(text)
            if choice.get("finish_reason") == "length" and any(stop in text for stop in self.stops):
                choice["finish_reason"] = "stop"
        return reply


class Tokenize(ChatExchange):
    """POST /tokenize: the ids that a chat request would be sent to the engine with; a plain prompt is left alone."""

    def __init__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> None:
        super().__init__(request, role_markers=role_markers)
        if "messages" in request:
            self.refuse_tools()
            self.prepare_messages()
