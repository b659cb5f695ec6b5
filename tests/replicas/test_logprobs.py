"""Texts of single tokens, as vLLM writes them."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.engine.tokenizer import Tokenizer
from synthia_vllm.replicas.logprobs import Entry, TokenTexts, positions, wanted


def sentencepiece() -> Tokenizer:
    """A tokenizer of Llama's family: blanks are letters, bytes stand for what is in no word."""
    words = ["<unk>", "▁", "▁a", "b", "▁▁c"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return Tokenizer(backend)


class Theirs:
    """What vLLM's functions ask of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer.backend
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        return [self._tokenizer.backend.id_to_token(token) for token in ids]


@pytest.mark.parametrize(("tokenizer", "first", "size"), [(null_tokenizer(), 3, 256), (sentencepiece(), 5, 256)])
@given(text=st.text("ab é🙂中", max_size=6), data=st.data())
@settings(max_examples=150, deadline=None)
def test_texts_are_vllms(tokenizer: Tokenizer, first: int, size: int, text: str, data: st.DataObject) -> None:
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
    from vllm.v1.engine.logprobs import LogprobsProcessor

    ids = [first + byte for byte in text.encode()]
    ids += data.draw(st.lists(st.integers(0, first + size - 1), max_size=4))
    theirs = LogprobsProcessor(Theirs(tokenizer), None, None, None, None, None)
    texts = TokenTexts(tokenizer)
    for at, token in enumerate(ids):
        plain = convert_ids_list_to_tokens(Theirs(tokenizer), [token])
        (expected,) = theirs._verify_tokens(plain, [token], ids[max(0, at - 4) : at])
        assert texts.of(token, ids[:at]) == expected


def entry(token: int, logprob: float, *top: tuple[int, float]) -> Entry:
    return Entry(f"token_id:{token}", logprob, [Entry(f"token_id:{other}", value) for other, value in top])


def test_the_one_more_that_is_asked_for_goes_unless_the_chosen_has_its_place() -> None:
    texts = TokenTexts(null_tokenizer())
    assert [wanted(asked, None) for asked in (None, 0, 1, 19, 20)] == [None, 0, 2, 20, 20]
    among = entry(10, -0.5, (10, -0.5), (11, -1.0), (12, -2.0))
    below = entry(10, -9.0, (10, -9.0), (11, -0.1), (12, -0.2))
    (first, second) = positions([among, below], 2, texts, [])
    assert [one.id for one in first.top] == [10, 11]
    assert [one.id for one in second.top] == [10, 11, 12]
