"""Server-sent events, however they are written and cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthia_vllm.replicas.sse import EventReader, EventTooLong

ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
VALUES = st.sampled_from([b"", b"{}", b" two blanks", b'{"a": "b: c"}', "ö 🙂".encode(), b"[DONE]", b"x" * 50])
LINES = st.one_of(
    st.builds(lambda blank, value: b"data:" + blank + value, st.sampled_from([b"", b" "]), VALUES),
    st.sampled_from(
        [b"data", b": a comment", b":", b"id: 7", b"event: message", b"retry: 3000", b"dataset: no", b"\xff"]
    ),
)


def by_the_standard(stream: bytes) -> list[bytes]:
    """The data of a stream's events, as WHATWG HTML 9.2.6 has it, from all of its bytes at once."""
    stream = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    *lines, _ = stream.split(b"\n")
    events, data = [], b""
    for line in lines:
        name, _, value = line.partition(b":")
        if not line:
            if data:
                events.append(data.removesuffix(b"\n"))
            data = b""
        elif name == b"data":
            data += (value[1:] if value.startswith(b" ") else value) + b"\n"
    return events


def read(stream: bytes, cuts: list[int]) -> list[bytes]:
    reader = EventReader()
    places = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [data for start, end in pairwise(places) for data in reader.feed(stream[start:end])]


@given(
    lines=st.lists(st.tuples(st.one_of(LINES, st.just(b"")), ENDS), max_size=30),
    bom=st.booleans(),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
)
@settings(max_examples=1000, deadline=None)
def test_any_stream_is_read_by_the_standard(lines: list[tuple[bytes, bytes]], bom: bool, cuts: list[int]) -> None:
    stream = b"\xef\xbb\xbf" * bom + b"".join(line + end for line, end in lines)
    assert read(stream, cuts) == by_the_standard(stream)
    assert read(stream, list(range(len(stream)))) == by_the_standard(stream)


@given(events=st.lists(VALUES, max_size=20), cuts=st.lists(st.integers(0, 2000), max_size=6))
@settings(max_examples=300, deadline=None)
def test_what_engines_send_is_read_wherever_it_is_cut(events: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(b"data: " + data + b"\n\n" for data in events)
    assert read(stream, cuts) == events


def test_an_event_that_the_end_cuts_off_is_none() -> None:
    assert EventReader().feed(b"data: whole\n\ndata: cut\n") == [b"whole"]


def test_data_in_several_lines_is_one() -> None:
    assert EventReader().feed(b'id: 1\r\ndata: {"a":\r\ndata: 1}\r\n\r\n') == [b'{"a":\n1}']


def test_a_cr_at_the_end_of_a_read_may_be_half_of_an_end() -> None:
    reader = EventReader()
    assert reader.feed(b"data: a\r") == []
    assert reader.feed(b"\n\r") == [b"a"]
    assert reader.feed(b"\ndata: b\n\n") == [b"b"]


@pytest.mark.parametrize("part", [b"data: " + b"x" * 60, b"data: x\n" * 12, b": " + b"x" * 99])
def test_an_event_without_end_is_not_kept_for_ever(part: bytes) -> None:
    reader = EventReader(limit=200)
    reader.feed(part)
    with pytest.raises(EventTooLong):
        list(map(reader.feed, [part] * 10))


def test_a_long_stream_is_no_long_event() -> None:
    reader = EventReader(limit=200)
    for end in (b"\n", b"\r\n"):
        for _ in range(100):
            assert len(reader.feed(b"data: " + b"x" * 100 + end * 2)) == 1
