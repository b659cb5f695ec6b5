"""Anthropic's messages API."""

from collections.abc import Sequence
from typing import Any

import msgspec

from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.dialects.base import AS_IT_CAME, Exchange
from synthia_vllm.prompt import STOP_STRINGS, MarkerPolicy


class CountTokens(Exchange):
    """POST /v1/messages/count_tokens: the tokens of the prompt in the Synthia format."""

    def __init__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> None:
        super().__init__(request, role_markers=role_markers)
        self.refuse_tools()
        system = request.get("system")
        if system is not None:
            request["system"] = self._check_content(system, "system", "system")
        messages = self.check_messages(request.get("messages"), "messages")
        if not system and (preset := self.preset()) and all(message["role"] != "system" for message in messages):
            request["system"] = preset


class Messages(CountTokens):
    """POST /v1/messages. A stop string of ours is the end of the turn to the client, no stop sequence of its own."""

    stop_field = "stop_sequences"

    def __init__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> None:
        super().__init__(request, role_markers=role_markers)
        if request.get("max_tokens") is None:
            raise RequestError("max_tokens is required by the messages API", param="max_tokens")
        self.add_defaults()
        self._own = self.merge_stops()

    def chunk(self, chunk: dict[str, Any]) -> Sequence[dict[str, Any]]:
        kind = chunk.get("type")
        if kind == "content_block_delta" and chunk["delta"].get("type") == "text_delta":
            text = chunk["delta"]["text"]
            passed = self.filter(chunk["index"]).feed(text)
            if passed == text:
                return AS_IT_CAME
            chunk["delta"]["text"] = passed
            return (chunk,) if passed else ()
        if kind == "message_delta":
            self._end_turn(chunk["delta"])
            return (chunk,)
        return AS_IT_CAME

    def event(self, event: bytes) -> bytes:
        if event.startswith(b"event: content_block_stop"):
            return self._rest(event) + event
        return super().event(event)

    def whole(self, reply: dict[str, Any]) -> dict[str, Any]:
        for block in reply.get("content") or ():
            if block.get("type") == "text":
                block["text"] = self.clean(block["text"])
        self._end_turn(reply)
        return reply

    def _rest(self, event: bytes) -> bytes:
        """What the filters still hold when a text ends, as one more delta."""
        out = b""
        for index, reply in self._filters.items():
            if rest := reply.finish():
                out += b"event: content_block_delta\n" + encode_delta(index, rest)
        return out

    def _end_turn(self, ending: dict[str, Any]) -> None:
        if ending.get("stop_sequence") in STOP_STRINGS and ending["stop_sequence"] not in self._own:
            ending["stop_reason"] = "end_turn"
            ending["stop_sequence"] = None


def encode_delta(index: int, text: str) -> bytes:
    """A text delta in Anthropic's stream, as the data line of an event."""
    delta = {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}
    return b"data: " + msgspec.json.encode(delta) + b"\n\n"
