"""POST /v1/completions: text or token ids go on as they are, without the conversation's format or its stop strings."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from synthia_vllm.api.affinity import prompt_affinity
from synthia_vllm.api.base import MAX_SEQUENCES, Asker, Counts, Model, Prepared, decode
from synthia_vllm.api.conversation import Prompt, check_size, estimate_tokens
from synthia_vllm.api.errors import ErrorForm, openai_form
from synthia_vllm.api.openai_json import GAP, array, finite, in_pieces, prompt_logprobs, token_name, whole
from synthia_vllm.api.openai_reply import Choice, OpenAIReply
from synthia_vllm.api.prepare import put_together
from synthia_vllm.api.sampling import (
    Logprobs,
    SamplingFields,
    TokenId,
    check_token_ids,
    client_stops,
    reply_length,
    sampling_of,
    sequences_of,
)
from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.engine.port import Delta, Position, Sampling, TokenLogprob
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.errors import RequestError

DEFAULT_LENGTH = 16  # OpenAI's, and vLLM's
MAX_PROMPT_ITEMS = 2**18  # prompts or token ids; what the context holds is checked later
_encode = msgspec.json.Encoder().encode

Ids = Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_ITEMS)]
# A text, texts, ids, or lists of ids; not mixed, which `_prompts` checks.
PromptField = str | Annotated[list[str | TokenId | Ids], Meta(max_length=MAX_PROMPT_ITEMS)]


class CompletionRequest(SamplingFields, kw_only=True):
    """A request's body. Fields that are not here are ignored."""

    prompt: PromptField | None = None
    logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None
    suffix: str | None = None
    prompt_embeds: Any = None

    @property
    def only_echo(self) -> bool:
        """The prompt alone is wanted. The engine generates a token all the same, which is not shown."""
        return bool(self.echo) and self.max_tokens == 0


class Completions:
    """Makes the generations of one or several prompts, and their reply."""

    path = "/v1/completions"
    body: type[msgspec.Struct] = CompletionRequest
    form: ErrorForm = staticmethod(openai_form)

    def decode(self, body: bytes) -> CompletionRequest:
        return decode(body, CompletionRequest)

    def prepare(self, request: CompletionRequest, model: Model, asker: Asker) -> Prepared:
        _check(request)
        prompts = _prompts(request, model)
        own = client_stops(request.stop, "stop")
        shared: dict[int, list[Sampling]] = {}  # by length: nothing else differs between prompts, and there are many
        asked = []
        for prompt in prompts:
            length = reply_length(
                1 if request.only_echo else request.max_tokens,
                DEFAULT_LENGTH,
                prompt.tokens,
                model,
                param="max_tokens",
                prompt_param="prompt",
            )
            if length not in shared:
                sampling = sampling_of(
                    request, max_tokens=length, stops=own, logprobs=request.logprobs, model=model, card_defaults=False
                )
                if request.echo and request.prompt_logprobs is None and request.logprobs is not None:
                    sampling = msgspec.structs.replace(sampling, prompt_logprobs=request.logprobs)
                shared[length] = sequences_of(sampling, request.replies)
            affinity = prompt_affinity(asker, prompt.text if prompt.text is not None else prompt.ids)
            as_ids = request.add_special_tokens is False and bool(prompt.ids)  # who is sent text adds BOS to it
            asked.append((prompt._replace(text=None) if as_ids else prompt, shared[length], affinity))
        include = bool(request.include_stop_str_in_output)
        texts = [SequenceText.plain(own, include_stop=include) for _ in range(len(prompts) * request.replies)]
        kind = StreamedCompletion if request.stream else WholeCompletion
        return put_together(request, asker, asked, kind(request, model, asker, prompts, texts))


def _check(request: CompletionRequest) -> None:
    if request.suffix:
        raise RequestError("the model can't fill in before a suffix; send the request without it", param="suffix")
    if request.prompt_embeds is not None:
        raise RequestError("embeddings are not taken for a prompt; send text or token ids", param="prompt_embeds")
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens is at least 1; 0 is for echo alone", param="max_tokens")
    if request.logprob_token_ids and (request.logprobs is None or request.only_echo):
        raise RequestError("logprob_token_ids needs logprobs, and tokens to generate", param="logprob_token_ids")


def _prompts(request: CompletionRequest, model: Model) -> list[Prompt]:
    """The prompts of a request, each once."""
    given = request.prompt
    if not given:
        raise RequestError("prompt is a text, a list of texts, token ids, or a list of lists of them", param="prompt")
    kinds = {str} if isinstance(given, str) else set(map(type, given))
    if len(kinds) > 1:
        raise RequestError("prompt mixes texts and token ids", param="prompt")
    several: list[Any] = [given] if isinstance(given, str) or kinds == {int} else list(given)
    if len(several) * request.replies > MAX_SEQUENCES:
        raise RequestError(
            f"{len(several)} prompts with n {request.replies} are more than {MAX_SEQUENCES} replies", param="prompt"
        )
    if kinds == {str}:
        return [_of_text(text, request, model) for text in several]
    return [_of_ids(ids, model) for ids in several]


def _of_text(text: str, request: CompletionRequest, model: Model) -> Prompt:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return Prompt((), text, estimate_tokens(text), exact=False)
    check_size(text, model, "prompt")
    ids = tokenizer.encode(text) if request.add_special_tokens is False else tokenizer.encode_with_bos(text)
    if not ids:
        raise RequestError("prompt: an empty text has no tokens to go on from", param="prompt")
    return Prompt(ids, text, len(ids), exact=True)


def _of_ids(ids: list[int], model: Model) -> Prompt:
    if not ids:
        raise RequestError("prompt: a list of token ids is empty", param="prompt")
    check_token_ids(ids, model, "prompt")
    return Prompt(ids, None, len(ids), exact=True)


class _Completion(OpenAIReply):
    """What both kinds of reply know of their request."""

    def __init__(
        self,
        request: CompletionRequest,
        model: Model,
        asker: Asker,
        prompts: Sequence[Prompt],
        texts: Sequence[SequenceText],
    ) -> None:
        super().__init__(request, model, asker, texts, name="cmpl", kind="text_completion", logprobs=request.logprobs)
        self.tokenizer = model.tokenizer
        self.prompts = [prompt for prompt in prompts for _ in range(request.replies)]
        self.one_prompt = len(prompts) == 1
        self.echoes = bool(request.echo)
        self.only_echo = request.only_echo
        # vLLM leaves the text of an echoed prompt out where its ids are told.
        self.echoed = [self._echoed(prompt) if self.echoes and not self.wants_ids else "" for prompt in prompts]
        self.echoed = [text for text in self.echoed for _ in range(request.replies)]

    def _echoed(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if self.tokenizer is None:
            raise RequestError("echo of token ids needs a tokenizer, which this gateway does not have", param="echo")
        return self.tokenizer.decode(prompt.ids, skip_special_tokens=False)

    def positions(self, index: int, delta: Delta, piece: Piece, *, first: bool) -> Iterable[Position | int]:
        """What log-probabilities are told of: the echoed prompt's tokens, the first by its id alone, and the new."""
        if first and self.echoes and delta.prompt_logprobs is not None:
            ids = self.prompts[index].ids
            first_id = ids[0] if ids else -1
            yield from (first_id if position is None else position for position in delta.prompt_logprobs)
        if not self.only_echo:
            yield from piece.logprobs


class StreamedCompletion(_Completion):
    """`text_completion` events. What is the same in every one is encoded once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._head = self.chunk_head()
        self._begun = [b'%b{"index":%d,"text":' % (self._head, index) for index in range(len(self.texts))]
        self._usual = not (self.wants_logprobs or self.wants_ids or self.wants_continuous_usage or self.echoes)
        self._first = [True] * len(self.texts)
        self._sent = [0] * len(self.texts)  # characters
        self._generated = [0] * len(self.texts)

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        index = delta.sequence
        piece = self.texts[index].feed(delta)
        if self._usual and piece.finish is None:
            return self._begun[index] + _encode(piece.text) + _USUAL_END if piece.text else b""
        return self._chunk(index, delta, piece, counts)

    def end(self, counts: Counts) -> bytes:
        return self.stream_end(self._head, counts)

    def _chunk(self, index: int, delta: Delta, piece: Piece, counts: Counts) -> bytes:
        self._generated[index] += len(piece.ids)
        first, self._first[index] = self._first[index], False
        text = "" if self.only_echo else piece.text
        if first:
            text = self.echoed[index] + text
        logprobs = None
        if self.wants_logprobs:
            logprobs = CompletionLogprobs(self.tokenizer, top=self.top, as_ids=self.as_ids, offset=self._sent[index])
            logprobs.add(self.positions(index, delta, piece, first=first))
        self._sent[index] += len(text)
        if not (text or (logprobs and logprobs.tokens) or piece.finish or (self.wants_ids and piece.ids)):
            return b""
        ids = self.prompts[index].ids if first and (self.echoes or self.wants_ids) else None
        prompt = counts.prompt if self.one_prompt else self.prompts[index].tokens
        return (
            b'%b%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b,"prompt_token_ids":%b,"token_ids":%b}]%b}\n\n'
            % (
                self._begun[index],
                _encode(text),
                _encode(None if logprobs is None else logprobs.told(msgspec.Raw(b"[%b]" % b",".join(logprobs.tops)))),
                _encode(piece.finish),
                _encode(piece.stop_reason),
                _encode(ids or None),
                _encode(piece.ids) if self.wants_ids else b"null",
                self.usage_so_far(prompt, self._generated[index]),
            )
        )


_USUAL_END = b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'


class _Choice(Choice):
    def __init__(self, echoed: str, logprobs: "CompletionLogprobs | None") -> None:
        super().__init__(echoed)
        self.logprobs = logprobs
        self.prompt_logprobs: list[bytes] | None = None
        self.first = True


class WholeCompletion(_Completion):
    """One `text_completion`."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._choices = [
            _Choice(
                echoed,
                CompletionLogprobs(self.tokenizer, top=self.top, as_ids=self.as_ids) if self.wants_logprobs else None,
            )
            for echoed in self.echoed
        ]

    def feed(self, delta: Delta, counts: Counts) -> bytes:
        choice = self._choices[delta.sequence]
        piece = self.texts[delta.sequence].feed(delta)
        first, choice.first = choice.first, False
        if self.only_echo:
            piece.text = ""
        choice.add(piece)
        if choice.logprobs is not None:
            choice.logprobs.add(self.positions(delta.sequence, delta, piece, first=first))
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs)
        return b""

    def end(self, counts: Counts) -> bytes | list[bytes]:
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return whole(self.whole_fields(counts), choices)

    def _choice(self, index: int, choice: _Choice) -> list[bytes]:
        logprobs, of_prompt = choice.logprobs, choice.prompt_logprobs
        told = {
            **choice.fields(index, with_ids=self.wants_ids),
            "text": "".join(choice.texts),
            "logprobs": None if logprobs is None else logprobs.told(GAP),
            "prompt_logprobs": None if of_prompt is None else GAP,
            "prompt_token_ids": (self.prompts[index].ids or None) if self.wants_ids else None,
        }
        gaps = [] if logprobs is None else [array(logprobs.tops)]
        return in_pieces(told, *gaps, *([] if of_prompt is None else [of_prompt]))


class CompletionLogprobs:
    """OpenAI's four lists of a completion's log-probabilities; offsets are counted as vLLM counts them."""

    def __init__(self, tokenizer: Tokenizer | None, *, top: int | None, as_ids: bool, offset: int = 0) -> None:
        self.tokens: list[str] = []
        self._tokenizer = tokenizer
        self._top = top  # None: all that came
        self._as_ids = as_ids
        self._offset = offset
        self._offsets: list[int] = []
        self._logprobs: list[float | None] = []
        self.tops: list[bytes] = []  # encoded as they come, so that the end is short

    def add(self, positions: Iterable[Position | int]) -> None:
        """Adds tokens with their log-probabilities, or an id without: the first of a prompt has none."""
        for position in positions:
            if isinstance(position, int):
                token, logprob, top = self._name(position), None, None
            else:
                token = token_name(position.chosen, as_id=self._as_ids)
                logprob = finite(position.chosen.logprob)
                top = self._likeliest(position)
            self.tokens.append(token)
            self._offsets.append(self._offset)
            self._logprobs.append(logprob)
            self.tops.append(_encode(top))
            self._offset += len(token)

    def told(self, tops: msgspec.Raw) -> dict[str, Any]:
        return {
            "text_offset": self._offsets,
            "token_logprobs": self._logprobs,
            "tokens": self.tokens,
            "top_logprobs": tops,
        }

    def _likeliest(self, position: Position) -> dict[str, float]:
        """The chosen token and the likeliest others: one more than asked for where it is none of them."""
        chosen, top = position.chosen, [token for token in position.top if token.id != position.chosen.id]
        shown = top if self._top is None else top[: self._top]
        if self._as_ids:
            return {token_name(token, as_id=True): finite(token.logprob) for token in (chosen, *shown)}
        return {token.text: finite(token.logprob) for token in (chosen, *shown)}

    def _name(self, token: int) -> str:
        text = self._tokenizer.piece(token) if self._tokenizer is not None and not self._as_ids else ""
        return token_name(TokenLogprob(token, text, 0.0), as_id=self._as_ids)
