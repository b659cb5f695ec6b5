"""The bytes that the null engine answers with: chunks and whole replies with vLLM 0.29's fields in its order."""

from typing import Any

import msgspec

from benchmarks.null_tokens import POISON, count_of, prompt_ids, split, text_of, token_id, token_text


class Reply:
    """The bytes of one reply; what does not change from chunk to chunk is put together once."""

    def __init__(self, request: dict[str, Any], chat: bool, number: int, text: str, lie: int = 0) -> None:
        wanted = request.get("max_completion_tokens") or request.get("max_tokens")
        self.tokens: int = wanted or (1024 if chat else 16)
        self.stream = bool(request.get("stream"))
        self.choices: int = request.get("n") or 1
        self.deadly: int | None = None  # the token that the process dies of
        self._chat = chat
        self._text = text
        self._lie = lie
        given = given_ids(request)
        self.prompt = len(given) if given is not None else count_of(text_of(request))
        options = request.get("stream_options") or {}
        self._usage = bool(options.get("include_usage"))
        self._continuous = self._usage and bool(options.get("continuous_usage_stats"))
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        model = request.get("model", "null")
        self._head = {"id": f"{prefix}-{number:016x}", "object": kind, "created": 1_795_000_000, "model": model}
        self._events_head = {**self._head, "object": "chat.completion.chunk"} if chat else self._head
        self._details = b',"completion_tokens_details":null' if chat else b""
        self._bodies: list[bytes] = []
        self._prepare()

    def first(self) -> bytes:
        if not self._chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        chunks = ({**self._events_head, "choices": [{**choice, "index": index}]} for index in range(self.choices))
        tail = {"prompt_token_ids": self._told_prompt(), "prompt_text": None}
        return b"".join(self._event(chunk, 0, tail) for chunk in chunks)

    def chunk(self, number: int, index: int) -> bytes:
        if number == self.tokens:
            choice = {**self._choice, "index": index, "finish_reason": "length", "stop_reason": None}
            return self._event({**self._events_head, "choices": [choice]}, number)
        if not self._continuous:
            return b"data: %b}\n\n" % self._bodies[index]
        told, prompt = number + self._lie, self.prompt  # written out: `benchmarks.cost` measures what is around this
        return b'data: %b,"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}}\n\n' % (
            self._bodies[index],
            prompt,
            prompt + told,
            told,
            self._details,
        )

    def last(self) -> bytes:
        if not self._usage:
            return b"data: [DONE]\n\n"
        chunk = {**self._events_head, "choices": [], "usage": self._count(self.tokens * self.choices)}
        return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"

    def whole(self) -> bytes:
        told = self._told_prompt()
        tail = {"prompt_token_ids": told} if self._chat and told is not None else {}
        choices = [{**self._whole_choice(), "index": index} for index in range(self.choices)]
        usage = self._count(self.tokens * self.choices)
        return msgspec.json.encode({**self._head, "choices": choices, "usage": usage, **tail})

    def _prepare(self) -> None:
        if self._chat:
            choice = {"index": 0, "delta": {"content": self._text}, "logprobs": None, "finish_reason": None}
        else:
            choice = {"index": 0, "text": self._text, "logprobs": None, "finish_reason": None, "stop_reason": None}
            choice["prompt_token_ids"] = None
        self._choice = {**choice, "token_ids": None}
        self._bodies = [
            msgspec.json.encode({**self._events_head, "choices": [{**self._choice, "index": index}]})[:-1]
            for index in range(self.choices)
        ]

    def _told_prompt(self) -> list[int] | None:
        return None

    def _whole_choice(self) -> dict[str, Any]:
        text = self._text * self.tokens
        message: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": 0, "logprobs": None, "finish_reason": "length"} | message

    def _event(self, chunk: dict[str, Any], number: int, tail: dict[str, Any] | None = None) -> bytes:
        if self._continuous:
            details = {"completion_tokens_details": None} if self._details else {}
            chunk = {**chunk, "usage": self._count(number) | details}
        return b"data: " + msgspec.json.encode(chunk | (tail or {})) + b"\n\n"

    def _usage_bytes(self, number: int) -> bytes:
        number += self._lie
        return b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}' % (
            self.prompt,
            self.prompt + number,
            number,
            self._details,
        )

    def _count(self, number: int) -> dict[str, Any]:
        number += self._lie
        return {"prompt_tokens": self.prompt, "total_tokens": self.prompt + number, "completion_tokens": number}


class NumberedReply(Reply):
    """A reply whose tokens are numbered (`null_tokens`): what `return_token_ids` gets.

    Raises WrongResume if the prompt ends with tokens of a reply in any but their right order.
    """

    def __init__(
        self, request: dict[str, Any], chat: bool, number: int, lie: int = 0, poison: str | None = None
    ) -> None:
        super().__init__(request, chat, number, "", lie)
        given = given_ids(request)
        if given is None:
            text = text_of(request)
            given = prompt_ids(text, self.prompt)
            if poison is not None and poison in text:
                given[0] = POISON
        self.prompt_ids = given
        self._seed, self.begun = split(given)
        self._logprobs = request.get("logprobs") not in (None, False)
        self._offset = 0

    def chunk(self, number: int, index: int) -> bytes:
        at = self.begun + number - 1
        text = token_text(self._seed, at)
        logprobs = msgspec.json.encode(self._logprobs_of([at], self._offset)) if self._logprobs else b"null"
        if index == self.choices - 1:
            self._offset += len(text)
        finish = b'"length","stop_reason":null' if number == self.tokens else b"null"
        if not self._chat:
            finish = b'"length"' if number == self.tokens else b"null"
            prompt = msgspec.json.encode(self.prompt_ids) if number == 1 else b"null"
            finish += b',"stop_reason":null,"prompt_token_ids":' + prompt
        usage = self._usage_bytes(number) if self._continuous else b""
        values = self._bodies[0], index, text.encode(), logprobs, finish, token_id(self._seed, at), usage
        form = b'data: %b,"choices":[{"index":%d,"delta":{"content":"%b"},"logprobs":%b,"finish_reason":%b,'
        if not self._chat:
            form = b'data: %b,"choices":[{"index":%d,"text":"%b","logprobs":%b,"finish_reason":%b,'
        return (form + b'"token_ids":[%d]}]%b}\n\n') % values

    def _prepare(self) -> None:
        self._bodies = [msgspec.json.encode(self._events_head)[:-1]]

    def _told_prompt(self) -> list[int] | None:
        return self.prompt_ids

    def _whole_choice(self) -> dict[str, Any]:
        positions = range(self.begun, self.begun + self.tokens)
        text = "".join(token_text(self._seed, at) for at in positions)
        choice: dict[str, Any] = {"index": 0}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice["logprobs"] = self._logprobs_of(list(positions), 0) if self._logprobs else None
        choice |= {"finish_reason": "length", "stop_reason": None}
        choice["token_ids"] = [token_id(self._seed, at) for at in positions]
        return choice if self._chat else {**choice, "prompt_token_ids": self.prompt_ids}

    def _logprobs_of(self, positions: list[int], offset: int) -> dict[str, Any]:
        """vLLM's shapes; the value tells the position. `text_offset` counts from where this request begins."""
        tokens = [(token_text(self._seed, at), logprob_of(at)) for at in positions]
        if self._chat:
            content = [
                {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                for text, value in tokens
            ]
            return {"content": content}
        offsets = []
        for text, _ in tokens:
            offsets.append(offset)
            offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [value for _, value in tokens],
            "tokens": [text for text, _ in tokens],
            "top_logprobs": [{text: value} for text, value in tokens],
        }


def given_ids(request: dict[str, Any]) -> list[int] | None:
    """The prompt, if it came as token ids."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else None


def logprob_of(position: int) -> float:
    return -(1 + position % 64) / 64
