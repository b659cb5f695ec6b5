"""OpenAI's responses API: POST /v1/responses.

Objects and events are those of `openai.types.responses`; fields beside them, and what is told where, are as vLLM's own
route has them (`vllm/entrypoints/openai/responses`), which the sampling fields are taken from, too.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from synthia_vllm.api.base import Asker, Counts, Model, Prepared, decode
from synthia_vllm.api.conversation import MAX_MESSAGES, Message, conversation, refuse_tools, rendered, text_of
from synthia_vllm.api.errors import ErrorForm, openai_form
from synthia_vllm.api.openai_json import chat_logprobs, entries, finite
from synthia_vllm.api.prepare import prepare_replies
from synthia_vllm.api.sampling import (
    Count,
    JsonSchema,
    Logprobs,
    Name,
    ResponseFormat,
    SamplingFields,
)
from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.engine.port import Delta, Position, Sampling
from synthia_vllm.errors import RequestError, SynthiaError

_LOGPROBS = "message.output_text.logprobs"
# OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
T = TypeVar("T")
_encode = msgspec.json.Encoder().encode
# What asks for something that is kept here between requests; nothing is.
_KEPT = ("previous_response_id", "conversation", "prompt", "background")


class TextFormat(msgspec.Struct, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None


class Item(msgspec.Struct, kw_only=True):
    """An item of the input, before it is known for a message; messages need not say that they are."""

    type: str | None = None
    status: str | None = None


class ResponsesRequest(SamplingFields, kw_only=True):
    """A request, as far as it is used here. None is *not given*, as `null` is."""

    format_param: ClassVar[str] = "text.format"

    # Items are read one by one, so that an error can say which one it is about.
    input: str | Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    metadata: Metadata | None = None
    include: Annotated[list[Name], Meta(max_length=64)] | None = None
    top_logprobs: Logprobs | None = None
    text: TextConfig | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    store: bool | None = None  # accepted, nothing is stored
    # A prompt that is too long is a 400 either way: cut from the front it would lose BOS and the system message.
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    @property
    def logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if _LOGPROBS in (self.include or ()) else None


class Responses:
    """POST /v1/responses. A GeneratingApi."""

    path = "/v1/responses"
    body: type[msgspec.Struct] = ResponsesRequest
    form: ErrorForm = staticmethod(openai_form)

    def decode(self, body: bytes) -> ResponsesRequest:
        request = decode(body, ResponsesRequest)
        refuse_tools(request.tools, request.tool_choice)
        for field in _KEPT:
            if getattr(request, field):
                raise RequestError(
                    f"{field} needs what is kept between requests, and nothing is here: send the whole input",
                    param=field,
                )
        # Fields of other routes, which mean nothing here.
        request.n = request.best_of = request.echo = request.prompt_logprobs = request.logprob_token_ids = None
        request.stream_options = None
        request.response_format = _response_format(request)
        return request

    def prepare(self, request: ResponsesRequest, model: Model, asker: Asker) -> Prepared:
        given, continued = _messages(request.input, model)
        messages = conversation(
            given, model_name=request.model or "", model=model, param="input", system=request.instructions or ""
        )
        prompt = rendered(messages, model, continue_final_message=continued, param="input")
        kind = ResponseStream if request.stream else WholeResponse

        def reply(texts: Sequence[SequenceText], sampling: Sampling) -> WholeResponse:
            return kind(asker.id, texts[0], _told(request, model, sampling, asker), logprobs=request.logprobs)

        return prepare_replies(
            request,
            messages,
            prompt,
            model,
            asker,
            reply,
            length=(request.max_output_tokens, "max_output_tokens"),
            stops=(request.stop, "stop"),
            logprobs=request.logprobs,
            continued=continued and bool(messages[-1]["content"]),
            prompt_param="input",
        )


class WholeResponse:
    """A reply that is not streamed: a `Response` with one message of one text. A Reply."""

    def __init__(self, request_id: str, text: SequenceText, told: bytes, *, logprobs: int | None) -> None:
        self._item = f"msg_{request_id}"
        self._text = text
        self._told = told  # what of the response does not change, as JSON without its closing brace
        self._top = logprobs  # so many of the likeliest beside each token; None: no log-probabilities
        self._texts: list[str] = []
        self._logprobs: list[bytes] = []  # encoded as they come, so that the end is short
        self._complete = True

    def start(self, counts: Counts) -> bytes:
        return b""

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        self._take(delta)
        return b""

    def end(self, counts: Counts) -> bytes:
        return b"".join(self._ended(self._message(self._part()), counts))

    def error(self, error: SynthiaError) -> bytes:
        return _encode(openai_form(error))

    def _take(self, delta: Delta) -> Piece:
        piece = self._text.feed(delta)
        if piece.text:
            self._texts.append(piece.text)
        if self._top is not None and piece.logprobs:
            self._logprobs.append(chat_logprobs(piece.logprobs, top=self._top, as_ids=False))
        if piece.finish is not None:
            self._complete = piece.finish != "length"
        return piece

    @property
    def _status(self) -> bytes:
        return b"completed" if self._complete else b"incomplete"

    def _part(self) -> bytes:
        return b'{"type":"output_text","text":%b,"annotations":[],"logprobs":[%b]}' % (
            _encode("".join(self._texts)),
            b",".join(self._logprobs),
        )

    def _message(self, part: bytes) -> list[bytes]:
        """An output item. As a response, it is a list of pieces that are joined once: both can be megabytes."""
        head = b'{"type":"message","id":%b,"role":"assistant","status":"%b","content":['
        return [head % (_encode(self._item), self._status), part, b"]}"]

    def _ended(self, message: list[bytes], counts: Counts) -> list[bytes]:
        incomplete = b"null" if self._complete else b'{"reason":"max_output_tokens"}'
        return self._response(self._status, output=message, incomplete=incomplete, usage=_usage(counts))

    def _response(
        self,
        status: bytes,
        *,
        output: Sequence[bytes] = (),
        incomplete: bytes = b"null",
        error: bytes = b"null",
        usage: bytes = b"null",
    ) -> list[bytes]:
        end = b'],"incomplete_details":%b,"error":%b,"usage":%b}' % (incomplete, error, usage)
        return [self._told, b',"status":"%b","output":[' % status, *output, end]


class ResponseStream(WholeResponse):
    """A streamed reply: `openai.types.responses.ResponseStreamEvent`s, numbered from 0. A Reply."""

    def __init__(self, request_id: str, text: SequenceText, told: bytes, *, logprobs: int | None) -> None:
        super().__init__(request_id, text, told, logprobs=logprobs)
        self._number = 0
        self._sent_logprobs: list[bytes] = []
        item = _encode(self._item)
        self._at = b'"item_id":%b,"output_index":0,"content_index":0' % item
        name = b"response.output_text.delta"
        self._delta = b'event: %b\ndata: {"type":"%b",%b,"sequence_number":' % (name, name, self._at)

    def start(self, counts: Counts) -> bytes:
        response = self._response(b"in_progress")
        item = b'{"type":"message","id":%b,"role":"assistant","status":"in_progress","content":[]}'
        part = b'{"type":"output_text","text":"","annotations":[],"logprobs":[]}'
        return b"".join(
            [
                *self._event(b"response.created", b'"response":', *response),
                *self._event(b"response.in_progress", b'"response":', *response),
                *self._event(b"response.output_item.added", b'"output_index":0,"item":', item % _encode(self._item)),
                *self._event(b"response.content_part.added", self._at, b',"part":', part),
            ]
        )

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        piece = self._take(delta)
        logprobs = b""
        if self._top is not None and piece.logprobs:
            logprobs = _logprobs(piece.logprobs, self._top)
            self._sent_logprobs.append(logprobs)
        elif not piece.text:
            return b""
        number = self._number
        self._number = number + 1
        return b'%b%d,"logprobs":[%b],"delta":%b}\n\n' % (
            self._delta,
            number,
            logprobs,
            _encode(piece.text),
        )

    def end(self, counts: Counts) -> bytes:
        text = _encode("".join(self._texts))
        logprobs = b",".join(self._sent_logprobs)
        part = self._part()
        message = self._message(part)
        ended = self._ended(message, counts)
        return b"".join(
            [
                *self._event(
                    b"response.output_text.done", self._at, b',"text":', text, b',"logprobs":[', logprobs, b"]"
                ),
                *self._event(b"response.content_part.done", self._at, b',"part":', part),
                *self._event(b"response.output_item.done", b'"output_index":0,"item":', *message),
                *self._event(b"response." + self._status, b'"response":', *ended),
            ]
        )

    def error(self, error: SynthiaError) -> bytes:
        """`error`, and the end of a response that has been told of: `response.failed`, whose codes are OpenAI's own."""
        begun = self._number > 0
        told = openai_form(error)["error"]
        fields = {"code": told["code"], "message": told["message"], "param": told["param"]}
        out = self._event(b"error", _encode(fields)[1:-1])
        if begun:
            limited = isinstance(error, RequestError) and error.status == 429
            why = {"code": "rate_limit_exceeded" if limited else "server_error", "message": told["message"]}
            response = self._response(b"failed", error=_encode(why))
            out += self._event(b"response.failed", b'"response":', *response)
        return b"".join(out)

    def _event(self, kind: bytes, *fields: bytes) -> list[bytes]:
        head = b'event: %b\ndata: {"type":"%b","sequence_number":%d,' % (kind, kind, self._number)
        self._number += 1
        return [head, *fields, b"}\n\n"]


def _messages(given: str | Sequence[msgspec.Raw], model: Model) -> tuple[list[Message], bool]:
    """The input as messages, and whether the last one is to be continued.

    It is, as in vLLM's own route, where it is an assistant's whose status says that it was not finished.
    """
    if isinstance(given, str):
        return [Message(role="user", content=text_of(given, "user", model, "input"))], False
    messages = []
    item = Item()
    for index, raw in enumerate(given):
        where = f"input[{index}]"
        item = _read(raw, Item, where)
        if item.type not in (None, "message"):
            raise RequestError(f"{where}.type {item.type[:100]!r}: Synthia takes messages only", param=f"{where}.type")
        messages.append(_read(raw, Message, where))
    return messages, messages[-1].role == "assistant" and item.status in ("in_progress", "incomplete")


def _read(item: msgspec.Raw, kind: type[T], where: str) -> T:
    try:
        return decode(bytes(item), kind)
    except RequestError as error:
        param = f"{where}.{error.param}" if error.param != "body" else where
        raise RequestError(f"{param}: {error.message.removeprefix(f'{error.param}: ')}", param=param) from None


def _response_format(request: ResponsesRequest) -> ResponseFormat | None:
    """`text.format` as the routes that had it first call it."""
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if request.structured_outputs is not None:
        raise RequestError(
            "structured_outputs and text.format constrain the same text; send one of them", param="structured_outputs"
        )
    if wanted.type == "json_object":
        return ResponseFormat(type="json_object")
    for field in ("name", "schema"):
        if getattr(wanted, field) is None:
            raise RequestError(f"text.format.{field} is required", param=f"text.format.{field}")
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=wanted.name or "", schema=wanted.schema))


def _told(request: ResponsesRequest, model: Model, sampling: Sampling, asker: Asker) -> bytes:
    """What of a response is known from the start, as JSON without its closing brace.

    Written once, as it is sent up to three times, and can hold instructions as long as a body.
    """
    wanted = request.text.format if request.text is not None else None
    told = {
        "id": f"resp_{asker.id}",
        "object": "response",
        "created_at": asker.created,
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": sampling.max_tokens,
        "metadata": request.metadata or {},
        "model": model.names[0],  # as vLLM names it, whichever of its names was asked for
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": None,
        "service_tier": "default",
        "temperature": sampling.temperature,
        "text": {"format": wanted or {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
    return _encode(told)[:-1]


def _usage(counts: Counts) -> bytes:
    return _encode(
        {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
            "output_tokens": counts.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts.prompt + counts.generated,
        }
    )


def _logprobs(positions: Sequence[Position], top: int) -> bytes:
    """Positions as events have them, without brackets; an output text has them as chat does, with their bytes."""
    return b",".join(
        [
            _encode(
                {
                    "token": position.chosen.text,
                    "logprob": finite(position.chosen.logprob),
                    "top_logprobs": [
                        {"token": token.text, "logprob": finite(token.logprob)}
                        for token in islice(entries(position), top)
                    ],
                }
            )
            for position in positions
        ]
    )
