"""Log-probabilities as engines send them, as the port has them."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec

from synthia_vllm.engine.port import Position, TokenLogprob
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.replicas.http import EngineRefused

UNKNOWN = -9999.0  # vLLM's for a probability of zero, or none
_UNFINISHED = "\ufffd"
_CONTEXT = 4  # tokens: no character has more
_ID_PREFIX = "token_id:"
# vLLM's own default of `--max-logprobs`; more is refused.
_MOST = 20


class Entry(msgspec.Struct):
    """One token in OpenAI's chat form."""

    token: str
    logprob: float = UNKNOWN
    top_logprobs: "list[Entry] | None" = None


class Prompted(msgspec.Struct):
    """One token of a prompt's log-probabilities, in vLLM's form."""

    logprob: float = UNKNOWN
    rank: int | None = None
    decoded_token: str | None = None


def wanted(logprobs: int | None, token_ids: Sequence[int] | None) -> int | None:
    """How many to ask `/inference/v1/generate` for.

    It leaves the least likely out where the chosen token is not among the likeliest: hence one more.
    """
    if token_ids is not None:
        return len(token_ids)
    return logprobs + 1 if logprobs is not None and 0 < logprobs < _MOST else logprobs


class TokenTexts:
    """The texts of single tokens, as vLLM writes them into log-probabilities (`v1/engine/logprobs.py`).

    Of a token that ends inside a character there is none, and of the one that completes it the whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._marker = _space_marker(tokenizer)
        self._alone = lru_cache(maxsize=1 << 16)(self._decode_alone)

    def of(self, token: int, before: Sequence[int]) -> str:
        """`before` are the ids that were chosen before it."""
        text = self._alone(token)
        return self._completed(token, before[-_CONTEXT:]) if text.endswith(_UNFINISHED) else text

    def _decode_alone(self, token: int) -> str:
        text = self._tokenizer.piece(token)
        if self._marker is None:
            return text
        raw = self._tokenizer.backend.id_to_token(token) or ""
        blanks = len(raw) - len(raw.lstrip(self._marker))  # the decoder strips them off the first of a text
        return " " * (blanks - (len(text) - len(text.lstrip(" ")))) + text

    def _completed(self, token: int, before: Sequence[int]) -> str:
        for size in range(1, len(before) + 1):
            context = before[-size:]
            whole = self._decode([*context, token])
            if whole.endswith(_UNFINISHED):
                continue
            clean = len(context)
            while clean and self._decode(context[clean - 1 : clean]).endswith(_UNFINISHED):
                clean -= 1
            known = self._decode(context[:clean]) if clean else ""
            shared = next((at for at, pair in enumerate(zip(known, whole, strict=False)) if pair[0] != pair[1]), None)
            return whole[min(len(known), len(whole)) if shared is None else shared :]
        return ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@lru_cache(maxsize=4)
def texts_of(tokenizer: Tokenizer) -> TokenTexts:
    """One for each tokenizer: it remembers."""
    return TokenTexts(tokenizer)


def positions(content: Sequence[Entry], asked: int | None, texts: TokenTexts, before: Sequence[int]) -> list[Position]:
    """Of tokens named `token_id:N`, the chosen one first among the likeliest, as vLLM has them.

    `asked` is what the client wants, `before` the ids before these tokens.
    """
    found: list[Position] = []
    ids = list(before[-_CONTEXT:])
    for entry in content:
        chosen = _entry(entry, texts, ids)
        top = [_entry(one, texts, ids) for one in entry.top_logprobs or ()] or [chosen]
        # One more was asked for than is wanted: it goes, unless the chosen token has its place.
        if asked and len(top) > asked and top[-1].logprob <= chosen.logprob:
            top.pop()
        found.append(Position(chosen, top))
        ids.append(chosen.id)
    return found


def named_positions(
    tokens: Sequence[str], logprobs: Sequence[float | None], top: Sequence[Mapping[str, float] | None]
) -> list[Position]:
    """Of the form of `/v1/completions`, whose tokens are named by their text."""
    found: list[Position] = []
    for number, token in enumerate(tokens):
        likeliest = (top[number] if number < len(top) else None) or {}
        logprob = logprobs[number] if number < len(logprobs) else None
        chosen = TokenLogprob(-1, token, UNKNOWN if logprob is None else logprob)
        others = [TokenLogprob(-1, text, value) for text, value in likeliest.items() if text != token]
        others.sort(key=lambda one: -one.logprob)
        found.append(Position(chosen, [chosen, *others]))
    return found


def prompt_positions(
    found: Sequence[msgspec.Raw], prompt: Sequence[int], texts: TokenTexts | None
) -> list[Position | None]:
    """Of vLLM's `prompt_logprobs`, each place still JSON: decoded one by one, so that a thread lets others run."""
    return [_prompted(raw, prompt[max(0, number - _CONTEXT) : number], texts) for number, raw in enumerate(found)]


_decode_prompted = msgspec.json.Decoder(dict[str, Prompted] | None).decode


def _prompted(raw: msgspec.Raw, before: Sequence[int], texts: TokenTexts | None) -> Position | None:
    place = _decode_prompted(raw)
    if not place:
        return None
    entries = [
        TokenLogprob(
            int(name),
            one.decoded_token if one.decoded_token is not None else texts.of(int(name), before) if texts else "",
            one.logprob,
            one.rank,
        )
        for name, one in place.items()
    ]
    return Position(entries[0], entries)


def _entry(entry: Entry, texts: TokenTexts, before: Sequence[int]) -> TokenLogprob:
    name = entry.token.removeprefix(_ID_PREFIX)
    if not name.isdecimal():
        raise EngineRefused(502, f"it sent log-probabilities of {entry.token[:40]!r}, which names no token id")
    token = int(name)
    return TokenLogprob(token, texts.of(token, before), entry.logprob)


def _space_marker(tokenizer: Tokenizer) -> str | None:
    """What a SentencePiece tokenizer writes a blank as, whose decoder strips the first one."""
    splitter = tokenizer.backend.pre_tokenizer
    if splitter is None:
        return None
    told = json.loads(splitter.__getstate__())
    parts = told.get("pretokenizers", []) if told.get("type") == "Sequence" else [told]
    return next((part.get("replacement", "▁") for part in parts if part.get("type") == "Metaspace"), None)
