"""JSON that chat and completions share: usage, log-probabilities. Shapes and quirks are vLLM's own, by its 0.29."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from synthia_vllm.engine.port import Position, TokenLogprob

_LOWEST = -9999.0  # what stands for minus infinity, which JSON does not have
_GAP = b"\0"  # which JSON does not have: in a text it is escaped
GAP = msgspec.Raw(_GAP)  # stands for what `in_pieces` puts there
_ITEMS_A_PIECE = 512
_LONG_REPLY = 2**20  # bytes
_encode = msgspec.json.Encoder().encode


def usage(prompt: int, generated: int, cached: int | None = None) -> dict[str, Any]:
    """A usage object; without `cached` as it stands in the middle of a stream."""
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + generated,
        "completion_tokens": generated,
    }
    if cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    return found


def entries(position: Position) -> Iterator[TokenLogprob]:
    """The chosen token first, then the likeliest others: the order of vLLM's own."""
    yield position.chosen
    for token in position.top:
        if token.id != position.chosen.id:
            yield token


def token_name(token: TokenLogprob, *, as_id: bool) -> str:
    return f"token_id:{token.id}" if as_id else token.text


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def chat_logprobs(positions: Iterable[Position], *, top: int | None, as_ids: bool) -> bytes:
    """The items of a chat's `logprobs.content`, without brackets; `top` None is all that came."""
    return b",".join([_encode(_chat_position(position, top, as_ids)) for position in positions])


def _chat_position(position: Position, top: int | None, as_ids: bool) -> dict[str, Any]:
    chosen = position.chosen
    others = []
    if top != 0:
        for token in entries(position):
            name = token_name(token, as_id=as_ids)
            others.append({"token": name, "logprob": finite(token.logprob), "bytes": list(name.encode())})
            if len(others) == top:
                break
    return {
        "token": token_name(chosen, as_id=as_ids),
        "logprob": finite(chosen.logprob),
        "bytes": list(chosen.text.encode()),
        "top_logprobs": others,
    }


def prompt_logprobs(positions: Sequence[Position | None]) -> list[bytes]:
    """vLLM's `prompt_logprobs`, in pieces: a place a token of the prompt, null for the first."""
    return array([_encode(_prompt_position(position)) for position in positions])


def _prompt_position(position: Position | None) -> dict[int, Any] | None:
    if position is None:
        return None
    found: dict[int, Any] = {}
    # Prompts are long: this is the one place where a reply can cost a tenth of a second.
    for one in (position.chosen, *position.top):
        if one.id not in found:
            logprob = one.logprob if one.logprob > _LOWEST else _LOWEST
            found[one.id] = {"logprob": logprob, "rank": one.rank, "decoded_token": one.text}
    return found


def array(items: Sequence[bytes]) -> list[bytes]:
    """A JSON array of encoded items, in pieces."""
    starts = range(0, len(items), _ITEMS_A_PIECE)
    pieces = [(b"," if at else b"") + b",".join(items[at : at + _ITEMS_A_PIECE]) for at in starts]
    return [b"[", *pieces, b"]"]


def in_pieces(value: Any, *gaps: Iterable[bytes]) -> list[bytes]:
    """A value as JSON, with these pieces where it has a `GAP`, one after the other.

    A reply with log-probabilities has up to hundreds of megabytes: nothing in here copies them all at once, which would
    hold up everybody.
    """
    first, *others = _encode(value).split(_GAP)
    found = [first]
    for pieces, after in zip(gaps, others, strict=True):
        found += pieces
        found.append(after)
    return found


def whole(value: Any, choices: Iterable[Sequence[bytes]], *gaps: Iterable[bytes]) -> bytes | list[bytes]:
    """A reply whose `choices` are a `GAP`, the first; in pieces only where it is long."""
    listed = [b"["]
    for choice in choices:
        if len(listed) > 1:
            listed.append(b",")
        listed += choice
    listed.append(b"]")
    found = in_pieces(value, listed, *gaps)
    return found if sum(map(len, found)) > _LONG_REPLY else b"".join(found)
