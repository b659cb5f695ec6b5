"""The model's tokenizer as gateways need it: prompts to ids, ids to text while they come."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from synthia_vllm.errors import SetupError

_PROBE = "SYSTEM: a"
_INVALID_PREFIX = "Invalid prefix encountered"


class Tokenizer:
    """A fast tokenizer. Safe in threads: encoding lets go of the interpreter's lock."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str = "") -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos = bos  # its text; empty where the model has none
        self.bos_id: int | None = backend.token_to_id(bos) if bos else None
        self.size: int = backend.get_vocab_size(with_added_tokens=True)
        self.longest = max(map(len, backend.get_vocab()), default=1)  # characters of a token
        self.lead = self._lead()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a model's folder. Raises SetupError where it has no `tokenizer.json`."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SetupError(f"--tokenizer {folder}: there is no tokenizer.json in it")
        return cls(tokenizers.Tokenizer.from_file(str(path)), bos=_bos_of(path.parent))

    @classmethod
    def of(cls, tokenizer: Any) -> "Tokenizer":
        """A copy of one of transformers' fast tokenizers: vLLM's own threads use the original."""
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, bos=tokenizer.bos_token or "")

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it stands: no BOS is added, special tokens written in it are what they say."""
        return self._encode(text, add_special_tokens=False)

    def encode_with_bos(self, text: str) -> list[int]:
        """As the tokenizer's own `encode` does it: with the special tokens that it adds to a text."""
        return self._encode(text, add_special_tokens=True)

    def fewest(self, text: str) -> int:
        """The fewest tokens that a text can have, without encoding it: a bound for what is far too long."""
        return len(text) // (2 * self.longest)  # normalizing may shorten a text, not to half

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token: int) -> str:
        """The text of one token alone."""
        text: str = self.backend.decode([token], skip_special_tokens=False)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The batch form alone lets go of the interpreter's lock, and leaves out the offsets that nobody asks for.
        (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def _lead(self) -> str:
        """What must stand between BOS and the prompt so that a template gives the ids of the card's `tokenizer.encode`.

        `encode` lets SentencePiece tokenizers put their dummy blank before the first word. Where BOS is written as
        text, as templates do it, some (Metaspace with `prepend_scheme: first`) take BOS for the first word and leave
        the blank out: every prompt would begin with a token that the model was not trained on.
        """
        if self.bos_id is None:
            return ""
        wanted = [self.bos_id, *self.encode(_PROBE)]
        return next((lead for lead in ("", " ") if self.encode(self.bos + lead + _PROBE) == wanted), "")


class TextStream:
    """Makes text of a reply's ids as they come, up to the last whole character.

    The same as vLLM does (`v1/engine/detokenizer.py`, FastIncrementalDetokenizer): primed with the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer.backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=skip_special_tokens)

    def feed(self, token: int) -> str:
        """The text that one more token brings; empty in the middle of a character."""
        try:
            return self._stream.step(self._backend, token) or ""
        except (OverflowError, TypeError):
            return ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return self._stream.step(self._backend, token) or ""


def _bos_of(folder: Path) -> str:
    """The text of BOS, from whichever of the tokenizer's files tells it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        told = json.loads(path.read_text(encoding="utf-8")).get("bos_token")
        if isinstance(told, dict):
            told = told.get("content")
        if isinstance(told, str):
            return told
    return ""
