from collections.abc import Sequence
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.api.text import Piece, SequenceText
from synthia_vllm.engine.port import Delta, Position, TokenLogprob
from synthia_vllm.prompt import STOP_STRINGS, clean


def position(text: str) -> Position:
    return Position(TokenLogprob(1, text, -0.5), ())


def fed(text: SequenceText, deltas: Sequence[Delta]) -> list[Piece]:
    return [text.feed(delta) for delta in deltas]


def deltas_of(parts: Sequence[str], *, finish: Any = "stop", stop: Any = None, logprobs: bool = False) -> list[Delta]:
    return [
        Delta(
            [number],
            part,
            finish if number == len(parts) - 1 else None,
            stop if number == len(parts) - 1 else None,
            logprobs=[position(part)] if logprobs else None,
        )
        for number, part in enumerate(parts)
    ]


def said(text: SequenceText, parts: Sequence[str], **ending: Any) -> tuple[str, Piece]:
    pieces = fed(text, deltas_of(parts, **ending))
    return "".join(piece.text for piece in pieces), pieces[-1]


letters = st.text("ab U\nSER:", max_size=4)
stops = st.lists(st.text("ab \nS:", min_size=1, max_size=4), max_size=3, unique=True)
split_texts = st.lists(letters, min_size=1, max_size=12)


@given(split_texts, stops, st.booleans())
def test_a_streamed_conversation_says_the_same_wherever_it_is_cut(parts: list[str], own: list[str], keep: bool) -> None:
    streamed, last = said(SequenceText.contract(own, keep_leading=keep), parts)
    whole, only = said(SequenceText.contract(own, keep_leading=keep), ["".join(parts)])
    assert streamed == whole == clean("".join(parts), (*own, *STOP_STRINGS), keep_leading=keep)
    assert (last.finish, last.stop, last.stop_reason) == (only.finish, only.stop, only.stop_reason)


@given(split_texts, stops)
def test_a_streamed_completion_says_the_same_wherever_it_is_cut(parts: list[str], own: list[str]) -> None:
    """The engine ends at the stop string that ends first, the first of the list where several do."""
    text = "".join(parts)
    ends = [(text.index(stop) + len(stop), order, stop) for order, stop in enumerate(own) if stop in text]
    end, _, stop = min(ends, default=(len(text), 0, None))
    lengths = [0]
    for part in parts:
        lengths.append(lengths[-1] + len(part))
    given = [
        text[start : min(start + len(part), end)] for start, part in zip(lengths, parts, strict=False) if start < end
    ]
    streamed, last = said(SequenceText.plain(own), given or [""], stop=stop)
    assert streamed == text[: end - len(stop or "")]
    assert (last.stop_reason, last.stop) == (stop, stop)


@given(
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_logprobs_are_those_of_the_texts_tokens(parts: list[str], own: list[str]) -> None:
    pieces = fed(SequenceText.contract(own), deltas_of(parts, logprobs=True))
    sent = "".join(piece.text for piece in pieces)
    told = [one.chosen.text for piece in pieces for one in piece.logprobs]
    assert told == parts[: len(told)]
    begins = [sum(map(len, parts[:number])) for number in range(len(parts))]
    assert len(told) == sum(begin < len(sent) for begin in begins)
    grown, known = "", 0
    for piece in pieces:  # none is told before its text
        grown += piece.text
        known += len(piece.logprobs)
        assert all(begin < len(grown) for begin in begins[:known])


def test_logprobs_of_a_stop_string_over_several_tokens_are_left_out() -> None:
    parts = ["Hi", "\n", "US", "ER", ":"]
    pieces = fed(SequenceText.contract(()), deltas_of(parts, stop="\nUSER:", logprobs=True))
    assert [one.chosen.text for piece in pieces for one in piece.logprobs] == ["Hi"]
    assert [list(piece.ids) for piece in pieces] == [[0], [1], [2], [3], [4]]
    pieces = fed(SequenceText.plain(["\nUSER:"]), deltas_of(parts, stop="\nUSER:", logprobs=True))
    assert [one.chosen.text for piece in pieces for one in piece.logprobs] == ["Hi"]


def test_logprobs_of_held_text_wait_for_it() -> None:
    pieces = fed(SequenceText.contract(()), deltas_of(["a", " US", "A", ""], logprobs=True))
    assert [len(piece.logprobs) for piece in pieces] == [1, 0, 2, 1]


def test_logprobs_of_many_tokens_in_a_delta_are_cut_among_them() -> None:
    delta = Delta([1, 2, 3], "Hi END", "stop", "END", logprobs=[position("Hi"), position(" E"), position("ND")])
    for text in (SequenceText.contract(["END"]), SequenceText.plain(["END"])):
        assert [one.chosen.text for one in text.feed(delta).logprobs] == ["Hi", " E"]


@pytest.mark.parametrize(
    ("own", "ending", "expected"),
    [
        ((), {"stop": "\nUSER:"}, ("stop", None, "\nUSER:")),
        (("USER:",), {"stop": "USER:"}, ("stop", "USER:", "USER:")),
        ((), {"finish": "length"}, ("stop", None, "\nUSER:")),
        (("x\nUSER:",), {"finish": "length"}, ("stop", None, "\nUSER:")),
    ],
)
def test_a_stop_of_the_contract_is_not_the_clients(own: Any, ending: Any, expected: Any) -> None:
    text, last = said(SequenceText.contract(own), ["a\nUSER:"], **ending)
    assert text == "a"
    assert (last.finish, last.stop_reason, last.stop) == expected


def test_ends_without_a_stop_string_are_the_engines() -> None:
    for text in (SequenceText.contract(["END"]), SequenceText.plain(["END"])):
        assert said(text, ["a", " b"], finish="length")[1].finish == "length"
    _, last = said(SequenceText.contract(()), ["a"], stop=7)
    assert (last.finish, last.stop_reason, last.stop) == ("stop", 7, None)


def test_text_that_only_looked_like_a_stop_string_is_not_lost() -> None:
    assert said(SequenceText.contract(()), ["The ", "US", ""], finish="length")[0] == "The US"
    assert said(SequenceText.plain(["END"]), ["The ", "EN"], finish="length")[0] == "The EN"


def test_stop_strings_of_the_client_stay_where_it_asks_for_them() -> None:
    assert said(SequenceText.contract(["END"], include_stop=True), ["a END"], stop="END")[0] == "a END"
    assert said(SequenceText.contract(["END"], include_stop=True), ["a USER: b"])[0] == "a"
    assert said(SequenceText.plain(["END"], include_stop=True), ["a ", "END"], stop="END")[0] == "a END"


def test_before_min_tokens_a_stop_string_is_text() -> None:
    text, last = said(SequenceText.contract(["END"], min_tokens=3), ["a END", " b", " END"], stop="END")
    assert (text, last.stop_reason) == ("a END b", "END")
    assert said(SequenceText.contract(["END"], min_tokens=3), ["a END", " USER:", " END"])[0] == "a END"
    assert said(SequenceText.plain(["END"]), ["a END", " b", " END"], stop="END")[0] == "a END b "


def test_a_completion_keeps_its_white_space() -> None:
    assert said(SequenceText.plain(()), [" a ", "USER: ", "\n"])[0] == " a USER: \n"


def test_ordinary_text_is_not_held_back() -> None:
    pieces = fed(SequenceText.contract(["END"]), deltas_of(["Orcas", " are", " whales", "."]))
    assert [piece.text for piece in pieces] == ["Orcas", " are", " whales", "."]


def test_the_longest_stop_strings_take_no_longer() -> None:
    """A regular expression of all their beginnings held the event loop for seconds."""
    own = ["a" * size + "b" for size in range(240, 256)]
    began = process_time()
    text = SequenceText.contract(own)
    for _ in range(20_000):
        text.feed(Delta([1], "aaaa"))
    assert process_time() - began < 10  # of which it needs a tenth
