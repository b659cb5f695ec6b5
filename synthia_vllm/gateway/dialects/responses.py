"""OpenAI's responses API."""

from collections.abc import Sequence
from typing import Any

from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.dialects.base import Exchange
from synthia_vllm.prompt import MarkerPolicy


class Responses(Exchange):
    """POST /v1/responses."""

    length_fields = ("max_output_tokens",)

    def __init__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> None:
        super().__init__(request, role_markers=role_markers)
        self.refuse_tools()
        self._prepare_input()
        self.add_defaults()
        own = self.merge_stops()
        if not request.get("include_stop_str_in_output"):
            self.stops = (*own, *self.stops)
        request["include_stop_str_in_output"] = True
        self._dropped = 0  # events that were not sent on: later sequence numbers move up

    def _prepare_input(self) -> None:
        given = self.request.get("input")
        has_system = bool(self.request.get("instructions"))
        if isinstance(given, str):
            self.drop_fields()
            self.request["input"] = self._check_content(given, "user", "input")
        else:
            if isinstance(given, list):
                for index, item in enumerate(given):
                    kind = item.get("type", "message") if isinstance(item, dict) else "message"
                    if kind != "message":
                        raise RequestError(
                            f"input[{index}].type {kind!r}: Synthia takes messages only", param=f"input[{index}].type"
                        )
            messages = self.check_messages(given, "input")
            has_system = has_system or any(message["role"] in ("system", "developer") for message in messages)
            self.keep_leading = messages[-1]["role"] == "assistant"
        if not has_system and (preset := self.preset()):
            self.request["instructions"] = preset

    def chunk(self, chunk: dict[str, Any]) -> Sequence[dict[str, Any]]:
        kind = chunk.get("type")
        out = [chunk]
        if kind == "response.output_text.delta":
            chunk["delta"] = self.filter().feed(chunk["delta"])
            if not chunk["delta"]:
                out = []
        elif kind == "response.output_text.done":
            chunk["text"] = self.clean(chunk["text"])
            if rest := self.filter().finish():
                delta = {key: value for key, value in chunk.items() if key != "text"}
                delta |= {"type": "response.output_text.delta", "delta": rest}
                out = [delta, chunk]
        elif kind == "response.content_part.done":
            self._clean_part(chunk["part"])
        elif kind == "response.output_item.done":
            self._clean_item(chunk["item"])
        elif "response" in chunk:
            self._clean_response(chunk["response"])
        number = chunk["sequence_number"] - self._dropped
        for offset, sent in enumerate(out):
            sent["sequence_number"] = number + offset
        self._dropped += 1 - len(out)
        return out

    def event(self, event: bytes) -> bytes:
        # The event's name is given twice, in `event:` and in `type`: an added delta must have its own.
        out = super().event(event)
        return out.replace(
            b'event: response.output_text.done\ndata: {"type":"response.output_text.delta"',
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta"',
        )

    def whole(self, reply: dict[str, Any]) -> dict[str, Any]:
        self._clean_response(reply)
        return reply

    def _clean_response(self, response: dict[str, Any]) -> None:
        for item in response.get("output") or ():
            self._clean_item(item)

    def _clean_item(self, item: dict[str, Any]) -> None:
        for part in item.get("content") or ():
            self._clean_part(part)

    def _clean_part(self, part: dict[str, Any]) -> None:
        if part.get("type") == "output_text":
            part["text"] = self.clean(part["text"])
