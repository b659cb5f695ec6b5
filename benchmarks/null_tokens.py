"""The null engine's token ids: each token of a reply says which prompt it answers and where in the reply it stands.

So whoever reads a reply can tell a token that is missing, doubled, or another stream's, and an engine that is handed
prompt and reply so far as ids knows where to go on, whichever engine began.
"""

from collections.abc import Sequence
from zlib import crc32

# Ids of replies, above all of prompts: a seed of the prompt, and the position from 0. Below 2**31, as vLLM's are.
FIRST_OF_REPLIES = 1 << 30
POISON = 99  # stands in a prompt for the poison's word
_POSITION_BITS, _SEEDS = 17, 1 << 12


class WrongResume(ValueError):
    """Ids handed over that this prompt's reply does not have there."""


def prompt_ids(text: str, count: int) -> list[int]:
    """So many ids for a text; the same text has the same ids everywhere."""
    width = -(-len(text) // count)
    return [1000 + crc32(text[at : at + width].encode()) % 1_000_000 for at in range(0, width * count, width)]


def seed_of(prompt: Sequence[int]) -> int:
    return crc32(b",".join(b"%d" % token for token in prompt)) % _SEEDS


def token_id(seed: int, position: int) -> int:
    return FIRST_OF_REPLIES | seed << _POSITION_BITS | position


def token_text(seed: int, position: int) -> str:
    return f" {seed:x}.{position}"


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


def text_of(request: dict[str, object]) -> str:
    """What a prompt is for the null engine: how its messages print."""
    return str(request.get("messages", request.get("prompt")))


def count_of(text: str) -> int:
    """Tokens that the null engine counts in a text."""
    return max(1, len(text) // 4)


def expected(request: dict[str, object], tokens: int) -> list[str]:
    """The texts of a reply's tokens, for one who asked with these messages or this text."""
    text = text_of(request)
    seed = seed_of(prompt_ids(text, count_of(text)))
    return [token_text(seed, position) for position in range(tokens)]
