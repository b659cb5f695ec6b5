"""What the dialects share."""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from synthia_vllm.errors import RequestError
from synthia_vllm.prompt import (
    MAX_CLIENT_STOPS,
    MODEL_ALIASES,
    SAMPLING_DEFAULTS,
    STOP_STRINGS,
    SYSTEM_PROMPTS,
    MarkerPolicy,
    ReplyFilter,
    clean,
    escape_markers,
    find_marker,
)

_ROLES = ("system", "developer", "user", "assistant")
_TEXT_PARTS = ("text", "input_text", "output_text")


# Saves encoding anew what was not changed.
AS_IT_CAME: Sequence[dict[str, Any]] = [{}]


class Dialect(Protocol):
    """Makes the exchange of one request. Raises RequestError for what the contract has no form for."""

    def __call__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> "Exchange": ...


class Exchange:
    """One request and the filter of its reply. `request` is the JSON object that goes upstream, changed in place."""

    stop_field = "stop"
    length_fields: tuple[str, ...] = ("max_tokens",)

    def __init__(self, request: dict[str, Any], *, role_markers: MarkerPolicy) -> None:
        self.request = request
        self.defaulted_length = False  # the reply's length is our default, not the client's wish
        self.keep_leading = False
        self.stops: tuple[str, ...] = STOP_STRINGS  # what the reply's text is cut at
        self._role_markers = role_markers
        self._filters: dict[int, ReplyFilter] = {}

    def drop_fields(self) -> None:
        """Takes out what is ours to decide: a second BOS, another template or its variables would leave the format."""
        for field in ("add_special_tokens", "chat_template", "chat_template_kwargs", "priority"):
            self.request.pop(field, None)

    def drop_length(self) -> None:
        """Takes our default length back."""
        for field in self.length_fields:
            self.request.pop(field, None)

    def event(self, event: bytes) -> bytes:
        """One server-sent event of the reply, as it goes to the client; empty to drop it."""
        start = event.find(b"data:")
        data = event[start + 5 :].strip()
        if start < 0 or not data.startswith(b"{"):
            return event  # a comment, or [DONE]
        chunks = self.chunk(msgspec.json.decode(data))
        if chunks is AS_IT_CAME:
            return event
        return b"".join(event[:start] + b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)

    def chunk(self, chunk: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """The chunks to send for one chunk of upstream; AS_IT_CAME for that chunk unchanged."""
        raise NotImplementedError

    def whole(self, reply: dict[str, Any]) -> dict[str, Any]:
        """A reply that is not streamed."""
        return reply

    def filter(self, index: int = 0) -> ReplyFilter:
        """The filter of one of the reply's texts."""
        found = self._filters.get(index)
        if found is None:
            found = self._filters[index] = ReplyFilter(self.stops, keep_leading=self.keep_leading)
        return found

    def clean(self, text: str) -> str:
        return clean(text, self.stops, keep_leading=self.keep_leading)

    def add_defaults(self) -> None:
        """Sampling as the card does it, where the client says nothing."""
        for field in ("temperature", "top_p", "top_k"):
            if self.request.get(field) is None:
                self.request[field] = SAMPLING_DEFAULTS[field]
        if all(self.request.get(field) is None for field in self.length_fields):
            self.request[self.length_fields[0]] = SAMPLING_DEFAULTS["max_tokens"]
            self.defaulted_length = True

    def merge_stops(self) -> tuple[str, ...]:
        """Puts our stop strings beside the client's, and returns the client's."""
        field = self.stop_field
        own = self.request.get(field)
        own = [own] if isinstance(own, str) else own or []
        if not isinstance(own, list) or not all(isinstance(stop, str) and stop for stop in own):
            raise RequestError("stop strings are a text or a list of texts, none of them empty", param=field)
        if len(own) > MAX_CLIENT_STOPS:
            raise RequestError(f"{len(own)} stop strings; at most {MAX_CLIENT_STOPS} are possible", param=field)
        self.request[field] = [*own, *(stop for stop in STOP_STRINGS if stop not in own)]
        return tuple(own)

    def refuse_tools(self) -> None:
        if self.request.get("tools"):
            raise RequestError("Synthia's prompt format has no tools; send the request without them", param="tools")

    def preset(self) -> str | None:
        """The system prompt that the model's alias brings, for a request without one."""
        model = self.request.get("model")
        name = MODEL_ALIASES.get(model) if isinstance(model, str) else None
        return SYSTEM_PROMPTS[name] if name else None

    def check_messages(self, messages: Any, param: str) -> list[dict[str, Any]]:
        """Checks roles and contents, and applies the policy on role markers to what users wrote."""
        self.drop_fields()
        if not isinstance(messages, list) or not messages:
            raise RequestError(f"{param} is a list of at least one message", param=param)
        for index, message in enumerate(messages):
            where = f"{param}[{index}]"
            if not isinstance(message, dict):
                raise RequestError(f"{where} is an object with role and content", param=where)
            role = message.get("role")
            if role not in _ROLES:
                raise RequestError(f"{where}.role {role!r}: Synthia knows {', '.join(_ROLES)}", param=f"{where}.role")
            if message.get("tool_calls"):
                raise RequestError("Synthia's prompt format has no tool calls", param=f"{where}.tool_calls")
            message["content"] = self._check_content(message.get("content"), role, f"{where}.content")
        return messages

    def _check_content(self, content: Any, role: str, param: str) -> Any:
        if isinstance(content, str):
            return self._apply_policy(content, role, param)
        if not isinstance(content, list):
            raise RequestError(f"{param} is a text or a list of text parts", param=param)
        for index, part in enumerate(content):
            where = f"{param}[{index}]"
            if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise RequestError(f"{where}: Synthia reads text only, not {kind!r}", param=where)
            if not isinstance(part.get("text"), str):
                raise RequestError(f"{where}.text is a text", param=f"{where}.text")
            part["text"] = self._apply_policy(part["text"], role, f"{where}.text")
        return content

    def _apply_policy(self, text: str, role: str, param: str) -> str:
        if role != "user" or self._role_markers == "allow":
            return text
        if self._role_markers == "escape":
            return escape_markers(text)
        if marker := find_marker(text):
            raise RequestError(f"{param} holds the role marker {marker!r}, which this server refuses", param=param)
        return text
