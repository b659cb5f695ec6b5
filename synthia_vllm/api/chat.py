"""POST /v1/chat/completions: OpenAI's chat completions, with vLLM's additions to them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from synthia_vllm.api.base import Asker, Counts, Model, Prepared, decode
from synthia_vllm.api.conversation import Messages, Prompt, check_continued, conversation, refuse_tools, rendered
from synthia_vllm.api.errors import ErrorForm, openai_form
from synthia_vllm.api.openai_json import GAP, array, chat_logprobs, in_pieces, prompt_logprobs, whole
from synthia_vllm.api.openai_reply import Choice, OpenAIReply
from synthia_vllm.api.prepare import prepare_replies
from synthia_vllm.api.sampling import Count, Logprobs, SamplingFields
from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.engine.port import Delta
from synthia_vllm.errors import RequestError

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
    body: type[msgspec.Struct] = ChatRequest
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
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return prepare_replies(
            request,
            messages,
            prompt,
            model,
            asker,
            lambda texts, _: kind(request, model, asker, prompt, texts, echoed, logprobs),
            length=request.length,
            stops=(request.stop, "stop"),
            logprobs=logprobs,
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


class _Chat(OpenAIReply):
    """What both kinds of reply know of their request."""

    kind: ClassVar[str]

    def __init__(
        self,
        request: ChatRequest,
        model: Model,
        asker: Asker,
        prompt: Prompt,
        texts: Sequence[SequenceText],
        echoed: str,
        logprobs: int | None,
    ) -> None:
        super().__init__(request, model, asker, texts, name="chatcmpl", kind=self.kind, logprobs=logprobs)
        self.echoed = echoed
        self.prompt_ids = list(prompt.ids) if self.wants_ids and prompt.ids else None

    def logprobs(self, piece: Piece) -> bytes:
        if not self.wants_logprobs or not piece.logprobs:
            return b""
        return chat_logprobs(piece.logprobs, top=self.top, as_ids=self.as_ids)


class StreamedChat(_Chat):
    """`chat.completion.chunk` events. What is the same in every chunk is encoded once."""

    kind = "chat.completion.chunk"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._head = self.chunk_head()
        self._begun = [b'%b{"index":%d,"delta":{"content":' % (self._head, index) for index in range(len(self.texts))]
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
        return self.stream_end(self._head, counts)

    def _first(self, index: int, counts: Counts) -> bytes:
        """The chunk that tells the role, and the one that echoes the message that is continued."""
        ids = _encode(self.prompt_ids)
        first = (
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
            b'"prompt_token_ids":%b%b}\n\n' % (self._head, index, ids, self.usage_so_far(counts.prompt, 0))
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
            self.usage_so_far(counts.prompt, self._generated[index]),
        )


_USUAL_END = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'


class WholeChat(_Chat):
    """One `chat.completion`. Log-probabilities are encoded as they come, so that the end is short."""

    kind = "chat.completion"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._choices = [Choice(self.echoed) for _ in self.texts]
        self._logprobs: list[list[bytes]] = [[] for _ in self.texts]
        self._prompt_logprobs: list[bytes] | None = None

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        piece = self.texts[delta.sequence].feed(delta)
        self._choices[delta.sequence].add(piece)
        if logprobs := self.logprobs(piece):
            self._logprobs[delta.sequence].append(logprobs)
        if delta.prompt_logprobs is not None and delta.sequence == 0:
            self._prompt_logprobs = prompt_logprobs(delta.prompt_logprobs)
        return b""

    def end(self, counts: Counts) -> bytes | list[bytes]:
        told = {
            **self.whole_fields(counts),
            "prompt_logprobs": None if self._prompt_logprobs is None else GAP,
            "prompt_token_ids": self.prompt_ids,
        }
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return whole(told, choices, *([] if self._prompt_logprobs is None else [self._prompt_logprobs]))

    def _choice(self, index: int, choice: Choice) -> list[bytes]:
        told = {
            **choice.fields(index, with_ids=self.wants_ids),
            "message": {
                "role": "assistant",
                "content": "".join(choice.texts),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": {"content": GAP} if self.wants_logprobs else None,
        }
        return in_pieces(told, *([array(self._logprobs[index])] if self.wants_logprobs else []))
