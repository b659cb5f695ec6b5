from hypothesis import example, given
from hypothesis import strategies as st

from synthia_vllm.prompt import STOP_STRINGS, ReplyFilter, clean, escape_markers, find_marker
from tests.card import card_answer

pieces = st.sampled_from(
    ["USER:", "USER", "US", "ER:", "SYSTEM:", "SYS", "\n", " ", "\t", "a", "Hello", "🐋", ":", "U", "\u3000"]
)
texts = st.lists(pieces, max_size=12)


def stream(parts: list[str], **options: bool) -> list[str]:
    reply = ReplyFilter(**options)
    return [*(reply.feed(part) for part in parts), reply.finish()]


@given(texts)
@example([" \n", "Hel", "lo", " US", "ER", ": x"])
def test_streamed_equals_whole_wherever_the_cuts_fall(parts: list[str]) -> None:
    assert "".join(stream(parts)) == clean("".join(parts))


@given(texts)
def test_reply_is_the_cards_answer_where_no_system_turn_follows(parts: list[str]) -> None:
    text = "".join(parts)
    generated = text.split("SYSTEM:")[0]
    assert clean(generated) == card_answer(generated)


@given(texts)
def test_no_delta_starts_or_ends_the_reply_with_white_space(parts: list[str]) -> None:
    deltas = [delta for delta in stream(parts) if delta]
    if deltas:
        assert deltas[0].lstrip() == deltas[0]
        assert deltas[-1].rstrip() == deltas[-1]


@given(texts)
def test_no_reply_holds_a_stop_string(parts: list[str]) -> None:
    reply = "".join(stream(parts))
    assert not any(stop in reply for stop in STOP_STRINGS)


def test_ordinary_text_is_not_held_back() -> None:
    assert stream(["Orcas", " are", " whales", "."])[:4] == ["Orcas", " are", " whales", "."]


def test_a_continued_message_keeps_its_first_blank() -> None:
    assert "".join(stream([" 42", " USER:"], keep_leading=True)) == " 42"


def test_escaped_markers_open_no_turn() -> None:
    escaped = escape_markers("see USER: and ASSISTANT: there")
    assert find_marker(escaped) is None
    assert escaped == "see USER : and ASSISTANT : there"
