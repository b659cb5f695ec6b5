"""The null tokenizer is a real one, and the null engine knows its ids without it."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.bench.null.tokenizer import null_tokenizer, write
from synthia_vllm.bench.null.tokens import (
    BOS,
    FIRST_OF_OTHERS,
    FIRST_OF_REPLIES,
    VOCABULARY,
    WORDS,
    difference,
    expected,
    ids_of,
    place_of,
    prompt_ids,
    seed_of,
    split,
    text_of,
    token_id,
    token_text,
)
from synthia_vllm.bench.prompts import LAST_ID
from synthia_vllm.engine.tokenizer import TextStream, Tokenizer
from synthia_vllm.prompt import render

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
SEED = st.integers(0, 2**32 - 1)


def test_a_folder_has_what_a_gateway_loads(tmp_path: Path) -> None:
    loaded = Tokenizer.load(write(tmp_path / "new" / "folder"))
    assert (loaded.bos, loaded.bos_id, loaded.size, loaded.lead) == ("<s>", BOS, VOCABULARY, "")
    assert loaded.encode_with_bos("orca") == null_tokenizer().encode_with_bos("orca") == prompt_ids("orca")


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path))
    assert tokenizer("Hallo, Wäl 🐋")["input_ids"] == prompt_ids("Hallo, Wäl 🐋")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@settings(deadline=None)
@given(TEXT)
def test_any_text_becomes_the_ids_that_the_engine_knows_and_comes_back(text: str) -> None:
    tokenizer = null_tokenizer()
    ids = prompt_ids(text)
    assert tokenizer.encode_with_bos(text) == ids
    assert tokenizer.encode(text) == ids[1:]
    assert max(ids) < FIRST_OF_OTHERS
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert text_of(ids) == tokenizer.decode(ids)


def test_ids_that_no_text_has_are_in_the_vocabulary() -> None:
    ids = [100, FIRST_OF_OTHERS, 1000, LAST_ID, FIRST_OF_REPLIES - 1, FIRST_OF_REPLIES]
    assert text_of(ids) == null_tokenizer().decode(ids) == "a<259><1000><30000><31999> 0000"


def test_special_tokens_in_a_text_are_what_they_say() -> None:
    assert null_tokenizer().encode("a<s></s>") == prompt_ids("a<s></s>", bos=False) == [100, 1, 2]


@settings(deadline=None)
@given(SEED, st.integers(0, 20_000))
def test_text_made_of_a_replys_ids_as_they_come_is_the_replys(seed: int, position: int) -> None:
    stream = TextStream(null_tokenizer(), prompt_ids("USER: Wäl 🐋"))
    stream.feed(token_id(seed, position))  # with the prompt's end
    assert stream.feed(token_id(seed, position + 1)) == token_text(seed, position + 1)


@settings(deadline=None)
@given(SEED, st.integers(0, len(WORDS) - 1))
def test_a_token_tells_where_it_stands(seed: int, position: int) -> None:
    assert place_of(seed, token_text(seed, position)) == position
    assert len({token_id(seed, at) for at in range(2000)}) == 2000


def test_no_word_is_no_place() -> None:
    assert [place_of(7, text) for text in (" word", " 12", "", " ffff", "12345")] == [None] * 5


@settings(deadline=None)
@given(st.lists(st.integers(0, FIRST_OF_REPLIES - 1), min_size=1), st.integers(0, 50))
def test_prompt_and_reply_so_far_are_told_apart(prompt: list[int], begun: int) -> None:
    seed = seed_of(prompt)
    assert split([*prompt, *(token_id(seed, at) for at in range(begun))]) == (seed, begun)


@settings(deadline=None)
@given(SEED, st.integers(0, 400), st.integers(1, 100))
def test_what_is_missing_or_doubled_is_named(seed: int, position: int, count: int) -> None:
    later = position + count
    at = position * len(token_text(seed, 0))
    assert difference(seed, at, token_text(seed, later)) == f"tokens {position} to {later - 1} are missing"
    again = max(0, position - count)
    if position:
        assert difference(seed, at, token_text(seed, again)) == f"token {again} comes again"


def test_a_chats_reply_is_its_rendered_prompts() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is an orca?"}]
    rendered = null_tokenizer().encode(render(messages, bos_token="<s>"))
    assert ids_of({"messages": messages}) == rendered
    assert expected({"messages": messages}, 3) == expected({"prompt": rendered}, 3)
    assert expected({"messages": messages[1:], "system": "Be kind."}, 3) == expected({"messages": messages}, 3)
    assert expected({"messages": messages}, 3) != expected({"messages": messages}, 3, style="script")
