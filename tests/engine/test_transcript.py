"""The text of a sequence's ids, and where it ends."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.bench.null.tokenizer import null_tokenizer
from synthia_vllm.engine.port import Generation, Sampling
from synthia_vllm.engine.transcript import StopSearch, Transcript

STOPS = st.lists(st.text("abU:", min_size=1, max_size=4), min_size=1, max_size=4)
TEXTS = st.text("abU:", max_size=30)
BOS, EOS = 1, 2


def transcript(**sampling: object) -> Transcript:
    asked = Sampling(max_tokens=100, **sampling)  # type: ignore[arg-type]
    return Transcript(Generation(id="1", prompt=[BOS], sampling=asked), null_tokenizer())


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
@settings(max_examples=500)
def test_a_text_ends_where_the_first_stop_string_completes(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = [(at + len(stop), stops.index(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
    search, found, stop = StopSearch(stops), "", None
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        if stop is None:
            part, stop = search.feed(text[start:end])
            found += part
    if not ends:
        assert (found, stop) == (text, None)
    else:
        end, _, first = min(ends)
        assert (found, stop) == (text[:end], first)


@given(text=st.text("abU:", min_size=1, max_size=12), stops=STOPS, minimum=st.integers(0, 6), size=st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_where_vllm_finds_them(text: str, stops: list[str], minimum: int, size: int) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

    tokenizer = null_tokenizer()
    ids = tokenizer.encode(text)

    class Detokenizer(BaseIncrementalDetokenizer):  # type: ignore[misc]
        def decode_next(self, next_token_id: int) -> str:
            return tokenizer.piece(next_token_id)

    class Request:
        sampling_params = SamplingParams(stop=stops, min_tokens=minimum, include_stop_str_in_output=True, max_tokens=50)

    theirs, ours, said, stop = Detokenizer(Request()), transcript(stop=tuple(stops), min_tokens=minimum), "", None
    for at in range(0, len(ids), size):
        wanted = theirs.update(ids[at : at + size], stop_terminated=False)
        part, stop, _ = ours.take(ids[at : at + size])
        said += part
        assert stop == wanted
        assert said == theirs.output_text
        if stop is not None:
            break


def test_a_character_of_several_tokens_comes_whole() -> None:
    found = transcript()
    ids = null_tokenizer().encode("é🙂")
    assert [found.take([token])[0] for token in ids] == ["", "é", "", "", "", "🙂"]


def test_the_token_that_ends_it_is_no_part_of_the_text() -> None:
    colon = null_tokenizer().encode(":")[0]
    ids = null_tokenizer().encode("ab:")
    assert transcript(stop_token_ids=(colon,)).take(ids, stopped=True) == ("ab", colon, 3)
    assert transcript(skip_special_tokens=False).take([*ids, EOS], stopped=True) == ("ab:", None, 4)
    assert transcript(stop=("b:",)).take(ids, stopped=True) == ("ab:", "b:", 3)


def test_what_an_engine_says_behind_a_stop_string_is_none_of_the_sequence() -> None:
    found = transcript(stop=("b",))
    assert found.take(null_tokenizer().encode("abc")) == ("ab", "b", 2)
    assert found.count == 2


def test_text_of_an_engine_is_searched_too() -> None:
    found = transcript(stop=("USER:",), min_tokens=2)
    assert found.take_text("USER:", 1) == ("USER:", None)
    assert found.take_text(" US", 1) == (" US", None)
    assert found.take_text("ER: more", 1) == ("ER:", "USER:")
