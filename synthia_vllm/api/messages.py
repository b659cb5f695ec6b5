"""Anthropic's messages API: POST /v1/messages and POST /v1/messages/count_tokens.

Objects and events are those of `anthropic.types`; vLLM's sampling fields are taken beside Anthropic's own.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from synthia_vllm.api.base import Asker, Counts, Model, Prepared, decode, event
from synthia_vllm.api.conversation import (
    MAX_PARTS,
    Message,
    Part,
    Prompt,
    conversation,
    refuse_tools,
    rendered,
    text_of,
)
from synthia_vllm.api.conversation import (
    Messages as Conversation,
)
from synthia_vllm.api.errors import ErrorForm, anthropic_form
from synthia_vllm.api.prepare import prepare_replies
from synthia_vllm.api.sampling import (
    Count,
    JsonSchema,
    Name,
    ResponseFormat,
    SamplingFields,
)
from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import RequestError, SynthiaError

# Claude Code's system prompt begins with a block that holds a hash of the request. It would defeat the prefix cache;
# vLLM's own route leaves it out, too.
_ATTRIBUTION = "x-anthropic-billing-header"
# A reply's reasoning, which Anthropic's clients send back with it: the model has none, and it is no part of the turn.
_THINKING = ("thinking", "redacted_thinking")
_encode = msgspec.json.Encoder().encode


class Typed(msgspec.Struct, kw_only=True):
    """An object of which only its kind matters."""

    type: str


class OutputFormat(msgspec.Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """What is counted. None is *not given*, as `null` is."""

    messages: Conversation
    system: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None
    model: Name | None = None
    tools: list[Any] | None = None
    tool_choice: Typed | None = None
    thinking: Typed | None = None


class MessagesRequest(SamplingFields, kw_only=True):
    """A request, as far as it is used here. None is *not given*, as `null` is."""

    format_param: ClassVar[str] = "output_config.format"

    messages: Conversation
    max_tokens: Count  # Anthropic's clients have to say it
    system: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None
    tools: list[Any] | None = None
    tool_choice: Typed | None = None
    thinking: Typed | None = None
    stop_sequences: list[str] | None = None
    output_config: OutputConfig | None = None


class Messages:
    """POST /v1/messages. A GeneratingApi."""

    path = "/v1/messages"
    body: type[msgspec.Struct] = MessagesRequest
    form: ErrorForm = staticmethod(anthropic_form)

    def decode(self, body: bytes) -> MessagesRequest:
        request = decode(body, MessagesRequest)
        _refuse(request)
        # Fields of other routes, which mean nothing here.
        request.n = request.best_of = request.echo = request.prompt_logprobs = request.logprob_token_ids = None
        request.stop = request.stream_options = None
        request.response_format = _response_format(request)
        return request

    def prepare(self, request: MessagesRequest, model: Model, asker: Asker) -> Prepared:
        messages, prompt, continues = _prompt(request, model)
        kind = MessageStream if request.stream else WholeMessage
        return prepare_replies(
            request,
            messages,
            prompt,
            model,
            asker,
            lambda texts, _: kind(asker.id, texts[0], model.names[0]),
            length=(request.max_tokens, "max_tokens"),
            stops=(request.stop_sequences, "stop_sequences"),
            logprobs=None,
            continued=continues,
        )


class CountTokens:
    """POST /v1/messages/count_tokens: the tokens of the prompt that the messages become. An AnsweringApi."""

    path = "/v1/messages/count_tokens"
    body: type[msgspec.Struct] = CountRequest
    form: ErrorForm = staticmethod(anthropic_form)

    def decode(self, body: bytes) -> CountRequest:
        request = decode(body, CountRequest)
        _refuse(request)
        return request

    def answer(self, request: CountRequest, model: Model) -> bytes:
        _, prompt, _ = _prompt(request, model)
        return _encode({"input_tokens": prompt.tokens})


def model_info(name: str, created: int, context: int | None) -> dict[str, Any]:
    """An `anthropic.types.ModelInfo`; `created` is Unix time."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def model_page(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of them on one page of Anthropic's `GET /v1/models`."""
    names = [one["id"] for one in models] or [None]
    return {"data": models, "has_more": False, "first_id": names[0], "last_id": names[-1]}


class WholeMessage:
    """A reply that is not streamed: a `Message` with one text. A Reply."""

    def __init__(self, request_id: str, text: SequenceText, model: str) -> None:
        self._id = f"msg_{request_id}"
        self._text = text
        self._model = model  # its own name, as vLLM tells it, whichever was asked for
        self._texts: list[str] = []
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def start(self, counts: Counts) -> bytes:
        return b""

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        piece = self._take(delta)
        if piece.text:
            self._texts.append(piece.text)
        return b""

    def end(self, counts: Counts) -> bytes:
        return self._message([{"type": "text", "text": "".join(self._texts)}], counts)

    def error(self, error: SynthiaError) -> bytes:
        return _encode(anthropic_form(error, ""))

    def _take(self, delta: Delta) -> Piece:
        """A stop string of the contract is the end of the turn to the client: it asked for none."""
        piece = self._text.feed(delta)
        if piece.finish is not None:
            if piece.finish == "length":
                self._stop_reason = "max_tokens"
            elif isinstance(piece.stop_reason, str):
                self._stop_reason, self._stop_sequence = "stop_sequence", piece.stop_reason
            else:
                self._stop_reason = "end_turn"
        return piece

    def _message(self, content: list[Any], counts: Counts) -> bytes:
        return _encode(
            {
                "id": self._id,
                "type": "message",
                "role": "assistant",
                "model": self._model,
                "content": content,
                "stop_reason": self._stop_reason,
                "stop_sequence": self._stop_sequence,
                "usage": _usage(counts),
            }
        )


class MessageStream(WholeMessage):
    """A streamed reply: `anthropic.types.RawMessageStreamEvent`s. A Reply."""

    def start(self, counts: Counts) -> bytes:
        return b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n%b' % (
            self._message([], counts),
            _BLOCK_START,
        )

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        text = self._take(delta).text
        return b"%b%b}}\n\n" % (_DELTA, _encode(text)) if text else b""

    def end(self, counts: Counts) -> bytes:
        ended = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        told = {"type": "message_delta", "delta": ended, "usage": _usage(counts)}
        return _BLOCK_STOP + event(_encode(told), b"message_delta") + _MESSAGE_STOP

    def error(self, error: SynthiaError) -> bytes:
        return event(super().error(error), b"error")


_BLOCK_START = event(
    b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}', b"content_block_start"
)
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
)
_BLOCK_STOP = event(b'{"type":"content_block_stop","index":0}', b"content_block_stop")
_MESSAGE_STOP = event(b'{"type":"message_stop"}', b"message_stop")


def _refuse(request: MessagesRequest | CountRequest) -> None:
    refuse_tools(request.tools, request.tool_choice.type if request.tool_choice is not None else None)
    if request.thinking is not None and request.thinking.type != "disabled":
        raise RequestError("Synthia does not think apart from its reply; send the request without", param="thinking")


def _prompt(request: MessagesRequest | CountRequest, model: Model) -> tuple[list[dict[str, str]], Prompt, bool]:
    """The conversation, its prompt, and whether the reply goes on in the middle of a text.

    A last message of the assistant's is continued (prefill).
    """
    system = request.system
    if isinstance(system, list):
        system = [part for part in system if not (part.text or "").startswith(_ATTRIBUTION)]
    messages = conversation(
        [_without_thinking(message) for message in request.messages],
        model_name=request.model or "",
        model=model,
        system=text_of(system, "system", model, "system"),
    )
    last: Message = request.messages[-1]
    prefilled = last.role == "assistant"
    prompt = rendered(messages, model, continue_final_message=prefilled)
    return messages, prompt, prefilled and bool(messages[-1]["content"])


def _without_thinking(message: Message) -> Message:
    if message.role != "assistant" or not isinstance(message.content, list):
        return message
    said = [part for part in message.content if part.type not in _THINKING]
    return message if len(said) == len(message.content) else msgspec.structs.replace(message, content=said)


def _response_format(request: MessagesRequest) -> ResponseFormat | None:
    """`output_config.format` as the routes that had it first call it."""
    wanted = request.output_config.format if request.output_config is not None else None
    if wanted is None:
        return None
    if request.structured_outputs is not None:
        raise RequestError(
            "structured_outputs and output_config.format constrain the same text; send one of them",
            param="structured_outputs",
        )
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name="output", schema=wanted.schema))


def _usage(counts: Counts) -> dict[str, int]:
    """The usage as Anthropic counts it: the prompt is `input_tokens`, and what was read from and written to the cache.

    So `anthropic.types.Message.usage` says, and so does vLLM's own route (`_build_anthropic_usage`). Nothing is told as
    written: no engine says what it kept.
    """
    return {
        "input_tokens": max(0, counts.prompt - counts.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.generated,
    }
