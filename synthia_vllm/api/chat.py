"""POST /v1/chat/completions: OpenAI's chat completions, with vLLM's additions to them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from synthia_vllm.api.base import Asker, Counts, Model, Prepared, decode, event
from synthia_vllm.api.conversation import Messages, Prompt, check_continued, conversation, refuse_tools, rendered
from synthia_vllm.api.errors import ErrorForm, openai_form
from synthia_vllm.api.openai_json import GAP, array, chat_logprobs, in_pieces, prompt_logprobs, usage, whole
from synthia_vllm.api.prepare import prepare_replies
from synthia_vllm.api.sampling import Count, Logprobs, SamplingFields
from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import RequestError, SynthiaError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class ChatRequest(SamplingFields, kw_only=True):
    """A request's body. Fields that are not here are ignored: templates and `priority` are the server's own."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    audio: Any = None
    modalities: Any = None

    @property
    def length(self) -> tuple[int | None, str]:
        """What was asked for, and the field that did."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class ChatCompletions:
    """Makes a conversation's generations and its reply."""

    path = "/v1/chat/completions"
    form: ErrorForm = staticmethod(openai_form)

    def decode(self, body: bytes) -> ChatRequest:
        return decode(body, ChatRequest)

    def prepare(self, request: ChatRequest, model: Model, asker: Asker) -> Prepared:
        _check(request)
        messages = conversation(request.messages, model_name=request.model or "", model=model)
        continued = bool(request.continue_final_message)
        prompt = rendered(messages, model, continue_final_message=continued)
        echoed = messages[-1]["content"] if request.echo and continued else ""
        kind = StreamedChat if request.stream else WholeChat
        return prepare_replies(
            request,
            messages,
            prompt,
            model,
            asker,
            lambda texts, _: kind(request, model, asker, prompt, texts, echoed),
            length=request.length,
            stops=(request.stop, "stop"),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            continued=continued,
        )


def _check(request: ChatRequest) -> None:
    refuse_tools(request.tools, request.tool_choice)
    if request.functions:
        raise RequestError("Synthia's prompt format has no functions; send the request without them", param="functions")
    if request.audio or request.modalities not in (None, [], ["text"]):
        raise RequestError("Synthia speaks text only", param="audio" if request.audio else "modalities")
    check_continued(request.messages, request.continue_final_message, request.add_generation_prompt)
    if request.logprobs:
        return
    for field in ("top_logprobs", "logprob_token_ids"):
        if getattr(request, field):
            raise RequestError(f"{field} needs logprobs to be true", param=field)


class _Chat:
    """What both kinds of reply know of their request."""

    def __init__(
        self,
        request: ChatRequest,
        model: Model,
        asker: Asker,
        prompt: Prompt,
        texts: Sequence[SequenceText],
        echoed: str,
    ) -> None:
        self.id = f"chatcmpl-{asker.id}"
        self.created = asker.created
        self.model = model.names[0]  # as vLLM names it, whichever of its names was asked for
        self.texts = texts
        self.echoed = echoed
        self.wants_logprobs = bool(request.logprobs)
        self.top = None if request.logprob_token_ids else request.top_logprobs or 0
        self.as_ids = bool(request.return_tokens_as_token_ids)
        self.wants_ids = bool(request.return_token_ids)
        self.prompt_ids = list(prompt.ids) if self.wants_ids and prompt.ids else None
        self.wants_usage = request.wants_usage
        self.wants_continuous_usage = request.wants_continuous_usage

    def logprobs(self, piece: Piece) -> bytes:
        if not self.wants_logprobs or not piece.logprobs:
            return b""
        return chat_logprobs(piece.logprobs, top=self.top, as_ids=self.as_ids)

    def error(self, error: SynthiaError) -> bytes:
        return event(_encode(openai_form(error))) + DONE


class StreamedChat(_Chat):
    """`chat.completion.chunk` events. What is the same in every chunk is encoded once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        about = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [],
        }
        self._about = b"data: " + _encode(about)[: -len(b"]}")]
        self._begun = [b'%b{"index":%d,"delta":{"content":' % (self._about, index) for index in range(len(self.texts))]
        self._usual = not (self.wants_logprobs or self.wants_ids or self.wants_continuous_usage)
        self._generated = [0] * len(self.texts)

    def start(self, counts: Counts) -> bytes:
        return b"".join([self._first(index, counts) for index in range(len(self.texts))])

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        index = delta.sequence
        piece = self.texts[index].feed(delta)
        if self._usual and piece.finish is None:
            if not piece.text:
                return b""
            return self._begun[index] + _encode(piece.text) + _USUAL_END
        return self._chunk(index, piece, counts)

    def end(self, counts: Counts) -> bytes:
        if not self.wants_usage:
            return DONE
        told = _encode(usage(counts.prompt, counts.generated, counts.cached))
        return b'%b],"usage":%b}\n\n' % (self._about, told) + DONE

    def _first(self, index: int, counts: Counts) -> bytes:
        """The chunk that tells the role, and the one that echoes the message that is continued."""
        ids = _encode(self.prompt_ids)
        first = (
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
            b'"prompt_token_ids":%b%b}\n\n' % (self._about, index, ids, self._usage(index, counts))
        )
        if self.echoed:
            first += self._begun[index] + _encode(self.echoed) + _USUAL_END
        return first

    def _chunk(self, index: int, piece: Piece, counts: Counts) -> bytes:
        self._generated[index] += len(piece.ids)
        logprobs = self.logprobs(piece)
        if not (piece.text or logprobs or piece.finish or (self.wants_ids and piece.ids)):
            return b""
        return b'%b%b},"logprobs":%b,"finish_reason":%b%b,"token_ids":%b}]%b}\n\n' % (
            self._begun[index],
            _encode(piece.text),
            b'{"content":[%b]}' % logprobs if logprobs else b"null",
            _encode(piece.finish),
            b',"stop_reason":%b' % _encode(piece.stop_reason) if piece.finish else b"",
            _encode(piece.ids) if self.wants_ids else b"null",
            self._usage(index, counts),
        )

    def _usage(self, index: int, counts: Counts) -> bytes:
        if not self.wants_continuous_usage:
            return b""
        return b',"usage":' + _encode(usage(counts.prompt, self._generated[index]))


_USUAL_END = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'


class _Choice:
    """One reply of several, as it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[bytes] = []
        self.finish = "stop"
        self.stop_reason: int | str | None = None


class WholeChat(_Chat):
    """One `chat.completion`. Log-probabilities are encoded as they come, so that the end is short."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._choices = [_Choice() for _ in self.texts]
        self._prompt_logprobs: list[bytes] | None = None

    def start(self, counts: Counts) -> bytes:
        return b""

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        choice = self._choices[delta.sequence]
        piece = self.texts[delta.sequence].feed(delta)
        choice.texts.append(piece.text)
        if self.wants_ids:
            choice.ids.extend(piece.ids)
        if logprobs := self.logprobs(piece):
            choice.logprobs.append(logprobs)
        if delta.prompt_logprobs is not None and delta.sequence == 0:
            self._prompt_logprobs = prompt_logprobs(delta.prompt_logprobs)
        if piece.finish is not None:
            choice.finish, choice.stop_reason = piece.finish, piece.stop_reason
        return b""

    def end(self, counts: Counts) -> bytes | list[bytes]:
        told: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": GAP,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(counts.prompt, counts.generated, counts.cached),
            "prompt_logprobs": None if self._prompt_logprobs is None else GAP,
            "prompt_token_ids": self.prompt_ids,
            "kv_transfer_params": None,
        }
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return whole(told, choices, *([] if self._prompt_logprobs is None else [self._prompt_logprobs]))

    def _choice(self, index: int, choice: _Choice) -> list[bytes]:
        told = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": self.echoed + "".join(choice.texts),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": {"content": GAP} if self.wants_logprobs else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.ids if self.wants_ids else None,
        }
        return in_pieces(told, *([array(choice.logprobs)] if self.wants_logprobs else []))
