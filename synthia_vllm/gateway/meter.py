"""The layer next to the engine: counts tokens as they come, by the engine's own figures."""

import re
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synthia_vllm.gateway.call import Call, call_of
from synthia_vllm.gateway.events import is_one_event, take_events
from synthia_vllm.gateway.intake import replay, without_body_headers
from synthia_vllm.gateway.replies import header

_CHAT_ROUTES = ("/v1/chat/completions", "/v1/completions")
# How vLLM 0.29 ends a chunk with usage. In a JSON text a quotation mark is escaped: this can't be something said.
_USAGE = re.compile(
    rb',"usage":\{"prompt_tokens":(\d+),"total_tokens":\d+,"completion_tokens":(\d+)(?:,"\w+":null)*\}(?=[,}])'
)
_USAGE_MARK = b',"usage":{'
_NO_CHOICES = b'"choices":[]'
# In the streams of the other APIs, what brings text. One event is one token or more; the end brings the exact number.
_DELTA_MARKS = (b"response.output_text.delta", b"content_block_delta")


class Meter:
    """Hands the request to the engine, and writes prompt and generated tokens into its call. A pure ASGI layer.

    Streams are asked for usage in every chunk (`stream_options`), so that the count is the engine's and right at any
    time, also when the stream is cut; what the client did not ask for is taken out again. Engines that know no
    `continuous_usage_stats` are counted by chunks until the last one tells. A reply that is not streamed tells at its
    end only: one that is cut is billed for its prompt.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope)
        if call is None:
            return await self.app(scope, receive, send)
        scope, receive = without_body_headers(scope), replay(call.encode, receive)
        if call.max_generated == 0:
            return await self.app(scope, receive, send)
        request = call.request
        if request is not None and request.get("stream") is True and call.route in _CHAT_ROUTES:
            options = request.get("stream_options")
            if options is None or isinstance(options, dict):  # all else is the engine's to refuse
                request["stream_options"] = {**(options or {}), "include_usage": True, "continuous_usage_stats": True}
                call.changed = True
        call.dispatch()
        return await self.app(scope, receive, MeteredReply(call, send))


class MeteredReply:
    """One reply: the `send` that upstream gets."""

    def __init__(self, call: Call, send: Send) -> None:
        self._call = call
        self._send = send
        self._buffer = bytearray()
        self._streaming = False
        self._ok = False
        self._by_choice: dict[int, int] = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._ok = message["status"] == 200
            self._streaming = header(message, b"content-type").startswith(b"text/event-stream")
        elif self._ok and message["type"] == "http.response.body":
            more = message.get("more_body", False)
            body = message.get("body", b"")
            if self._streaming:
                out = self._events(body)
                if not more:
                    out += bytes(self._buffer)
                    self._call.completed = True
                elif not out:
                    return
                if out is not body:
                    message = {"type": "http.response.body", "body": out, "more_body": more}
            else:
                self._buffer += body
                if not more:
                    self._whole()
        await self._send(message)

    def _events(self, body: bytes) -> bytes:
        if not self._buffer and is_one_event(body):
            return self._event(body)
        self._buffer += body
        return b"".join(map(self._event, take_events(self._buffer)))

    def _event(self, event: bytes) -> bytes:
        call = self._call
        at = event.rfind(_USAGE_MARK) if call.route in _CHAT_ROUTES else -1
        if at < 0:
            return self._event_of_others(event)
        found = _USAGE.match(event, at)
        if found is None or call.choices > 1:
            return self._unusual(event)
        call.prompt_tokens = int(found[1])
        call.prompt_counted = True
        call.add_tokens(int(found[2]) - call.generated)
        if event.find(_NO_CHOICES, 0, at) >= 0:
            return event if call.wants_usage else b""
        return event if call.wants_continuous_usage else event[:at] + event[found.end() :]

    def _event_of_others(self, event: bytes) -> bytes:
        """A chunk without usage, or an event of another API than OpenAI's completions."""
        call = self._call
        if b'"usage"' in event:  # the ends of the other APIs' streams, and `"usage":null`
            data = _data(event)
            self._take_usage(data if data is None or "usage" in data else data.get("response") or data.get("message"))
        elif call.route in _CHAT_ROUTES:
            if b'"content":"' in event or b'"text":"' in event:
                empty = b'"content":""' in event or b'"text":""' in event
                call.add_tokens(0 if empty else 1)
        elif any(mark in event for mark in _DELTA_MARKS):
            call.add_tokens(1)
        return event

    def _unusual(self, event: bytes) -> bytes:
        """A chunk whose usage is not as expected: several choices, or another engine's fields."""
        data = _data(event)
        if data is None:
            return event
        call = self._call
        choices = data.get("choices") or ()
        if not choices:
            self._take_usage(data)
            return event if call.wants_usage else b""
        usage = data.get("usage") or {}
        self._by_choice[choices[0].get("index", 0)] = usage.get("completion_tokens", 0)
        call.prompt_tokens = usage.get("prompt_tokens", call.prompt_tokens)
        call.add_tokens(sum(self._by_choice.values()) - call.generated)
        if call.wants_continuous_usage:
            return event
        del data["usage"]
        return b"data: " + msgspec.json.encode(data) + b"\n\n"

    def _whole(self) -> None:
        self._call.completed = True
        try:
            self._take_usage(msgspec.json.decode(self._buffer))
        except msgspec.DecodeError:
            return  # not ours to judge; the layer above passes it on

    def _take_usage(self, holder: Any) -> None:
        """The final figures, under OpenAI's or Anthropic's names. They replace what was counted."""
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if not isinstance(usage, dict):
            return
        call = self._call
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        generated = usage.get("completion_tokens", usage.get("output_tokens"))
        if isinstance(prompt, int) and prompt > 0:
            call.prompt_tokens = prompt
            call.prompt_counted = True
        if isinstance(generated, int):
            call.add_tokens(generated - call.generated)
            # Anthropic's first event tells of no tokens yet; an end that tells fewer than were counted is right.
            call.generated = generated


def _data(event: bytes) -> dict[str, Any] | None:
    start = event.find(b"data:")
    try:
        value = msgspec.json.decode(event[start + 5 :].strip())
    except msgspec.DecodeError:
        return None
    return value if isinstance(value, dict) else None
