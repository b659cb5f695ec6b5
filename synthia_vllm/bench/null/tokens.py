"""The null engine's token ids: each token of a reply says where in the reply to which prompt it stands.

The vocabulary, which `null_tokenizer` writes as a real tokenizer for whoever is in front of a null engine:

    0 to 2            <unk>, <s> (BOS), </s> (EOS)
    3 to 258          the bytes: all that prompts are made of which came as text
    259 to 31999      "<259>" to "<31999>": what prompts that came as ids may have besides, as `load.prompts` draws them
    32000 to 48383    the words " 0000" to " 3fff": all that replies are made of, and never prompts

A reply is a walk through the words: it starts at a word and goes in steps which are functions of the prompt's ids. The
steps are odd and the words are a power of two, so no token comes again before all words were there. So whoever reads a
reply can tell a token that is missing, doubled, or another stream's (`place_of`), and an engine that is handed prompt
and reply so far as ids knows where to go on, whichever engine began (`split`).
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from synthia_vllm.prompt import render

UNK, BOS, EOS = 0, 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")  # texts of the first ids
FIRST_OF_BYTES = len(SPECIAL)
FIRST_OF_OTHERS = FIRST_OF_BYTES + 256
FIRST_OF_REPLIES = 32_000
WORDS = tuple(f" {number:04x}" for number in range(1 << 14))
WORD_LENGTH = len(WORDS[0])
VOCABULARY = FIRST_OF_REPLIES + len(WORDS)
_MASK = len(WORDS) - 1
_NEAR = 512  # what is farther away than so many tokens is taken for another reply's
_SPECIALS = re.compile(f"({'|'.join(map(re.escape, SPECIAL))})")


class WrongResume(ValueError):
    """Ids handed over that this prompt's reply does not have there."""


def seed_of(prompt: Sequence[int]) -> int:
    """What ties a reply to its prompt."""
    return crc32(array("I", prompt).tobytes())


def walk_of(seed: int) -> tuple[int, int]:
    """The number of the word that a reply starts with, and its steps."""
    return seed & _MASK, seed >> 14 | 1


def token_id(seed: int, position: int) -> int:
    start, step = walk_of(seed)
    return FIRST_OF_REPLIES + (start + position * step & _MASK)


def token_text(seed: int, position: int) -> str:
    return WORDS[token_id(seed, position) - FIRST_OF_REPLIES]


def place_of(seed: int, text: str) -> int | None:
    """At which position (modulo the number of words) a reply has this word; None for what is no word."""
    try:
        number = int(text, 16)
    except ValueError:
        return None
    if not 0 <= number <= _MASK or WORDS[number].strip() != text.strip():
        return None
    start, step = walk_of(seed)
    return (number - start) * pow(step, -1, len(WORDS)) & _MASK


def difference(seed: int, at: int, text: str) -> str:
    """What is wrong with a text that stands at a character of this reply's text, and does not belong there."""
    position = -(-at // WORD_LENGTH)
    text = text[position * WORD_LENGTH - at :]
    for start in range(0, len(text), WORD_LENGTH):
        place = place_of(seed, text[start : start + WORD_LENGTH])
        if place is None:
            return "this is no token"
        ahead = (place - position) % len(WORDS)
        if ahead:
            if len(WORDS) - ahead <= min(position, _NEAR):
                return f"token {place} comes again"
            return f"tokens {position} to {place - 1} are missing" if ahead < _NEAR else "this is another stream's"
        position += 1
    return "a token is cut"


def split(ids: Sequence[int]) -> tuple[int, int]:
    """The seed of the original prompt, and how many tokens of its reply follow it.

    Raises WrongResume where what follows is not the beginning of that reply.
    """
    length = next((at for at, token in enumerate(ids) if token >= FIRST_OF_REPLIES), len(ids))
    seed = seed_of(ids[:length])
    for position, token in enumerate(ids[length:]):
        if token != token_id(seed, position):
            raise WrongResume(
                f"token {token} stands at {position} of the reply, where {token_id(seed, position)} belongs"
            )
    return seed, len(ids) - length


def prompt_ids(text: str, *, bos: bool = True) -> list[int]:
    """The ids of a text, as the null tokenizer encodes it: with BOS, as it stands without."""
    found = [BOS] if bos else []
    for part in _SPECIALS.split(text):
        if part in SPECIAL:
            found.append(SPECIAL.index(part))
        else:
            found.extend(FIRST_OF_BYTES + byte for byte in part.encode("utf-8", "replace"))
    return found


def other_text(token: int) -> str:
    """The text of an id that is neither a byte nor a word."""
    return f"<{token}>"


def text_of(ids: Sequence[int]) -> str:
    """The text of prompt and reply, without special tokens."""
    pieces = []
    for token in ids:
        if FIRST_OF_BYTES <= token < FIRST_OF_OTHERS:
            pieces.append(bytes((token - FIRST_OF_BYTES,)))
        elif FIRST_OF_OTHERS <= token < FIRST_OF_REPLIES:
            pieces.append(other_text(token).encode())
        elif FIRST_OF_REPLIES <= token < VOCABULARY:
            pieces.append(WORDS[token - FIRST_OF_REPLIES].encode())
    return b"".join(pieces).decode("utf-8", "replace")


def given_ids(request: Mapping[str, Any]) -> list[int] | None:
    """The prompt of a completion, or of `/inference/v1/generate`, if it came as token ids."""
    prompt = request.get("token_ids", request.get("prompt"))
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else None


def ids_of(request: Mapping[str, Any], **options: Any) -> list[int]:
    """The ids of a request's prompt: those given, a text's, or those of the rendered messages.

    Options are those of `synthia_vllm.prompt.render`. Raises ValueError for messages that it can't render.
    """
    given = given_ids(request)
    if given is not None:
        return given
    if "messages" not in request:
        prompt = request.get("prompt", "")
        return prompt_ids(prompt[0] if isinstance(prompt, list) and prompt else str(prompt))

    messages = request["messages"]
    if isinstance(request.get("system"), str):  # as Anthropic's API has it
        messages = [{"role": "system", "content": request["system"]}, *messages]
    options.setdefault("continue_final_message", bool(request.get("continue_final_message")))
    try:
        return prompt_ids(render(messages, **options))
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"these messages can't be rendered: {error}") from error


def expected(request: Mapping[str, Any], tokens: int, **options: Any) -> list[str]:
    """The texts of a reply's tokens, for one who asked this way. Options: as `ids_of` takes them."""
    seed = seed_of(ids_of(request, **options))
    return [token_text(seed, position) for position in range(tokens)]


def logprob_of(position: int) -> float:
    """Made up: it tells the position."""
    return -(1 + position % 64) / 64
