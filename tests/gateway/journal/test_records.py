"""Records and event ids: what is written is read again, and what nobody wrote is refused."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthia_vllm.engine.port import Delta, Said
from synthia_vllm.errors import RequestError
from synthia_vllm.gateway.journal.entry import Entry
from synthia_vllm.gateway.journal.records import MOST_UNKEPT, Position, position, record_of, said

STOPS = ("USER:", "\n.,~!/", "é")
IDS = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
ENDS = st.one_of(
    st.just((None, None)),
    st.just(("length", None)),
    st.tuples(st.just("stop"), st.one_of(st.none(), st.integers(0, 2**31), st.sampled_from(STOPS))),
)


@given(IDS, ENDS)
def test_a_record_is_read_as_it_was_written(ids: tuple[int, ...], end: tuple[str | None, int | str | None]) -> None:
    finish, reason = end
    record = record_of(Delta(ids, "text", finish, reason), STOPS)  # type: ignore[arg-type]
    assert said(record, STOPS) == Said(ids, finish, reason)  # type: ignore[arg-type]
    assert position(f"3.{record}".encode()) == Position(3, (record,))


@given(st.lists(st.tuples(IDS, ENDS), max_size=8), st.data())
def test_an_event_id_tells_how_much_there_is_whatever_is_in_the_journal(
    deltas: list[tuple[tuple[int, ...], tuple[str | None, int | str | None]]], data: st.DataObject
) -> None:
    records = [record_of(Delta(ids, "", *end), STOPS) for ids, end in deltas]  # type: ignore[arg-type]
    kept = data.draw(st.integers(0, len(records)))
    had = data.draw(st.integers(0, len(records)))
    told = position(_entry(records, kept).event_id(had).encode())
    assert (told.deltas, told.event, told.ended) == (had, 0, False)
    # Whatever is in the journal when the client comes back, at least what was there then:
    later = data.draw(st.integers(min(kept, had), len(records)))
    entry = _entry(records[:later], later)
    entry.extend(told)
    assert entry.records == records[: max(later, had)]


def test_what_the_journal_has_otherwise_is_refused() -> None:
    for told in (b"1.7", b"1.2.9", b"5"):
        with pytest.raises(RequestError, match="not of this reply"):
            _entry(["1", "2", "3"], 3).extend(position(told))


@given(st.one_of(st.binary(max_size=40), st.from_regex(rb"[0-9.,/lsi~!]{1,40}", fullmatch=True)))
def test_any_other_id_is_a_400(told: bytes) -> None:
    with contextlib.suppress(RequestError):  # a 400
        for record in position(told).more:
            with contextlib.suppress(ValueError):  # a stop string that is none of these
                told = said(record, STOPS)
                assert said(record_of(Delta(*_fields(told)), STOPS), STOPS) == told


def test_an_id_has_no_end() -> None:
    with pytest.raises(RequestError, match="more in it"):
        position(b"0" + b".1" * (MOST_UNKEPT + 1))


def test_a_client_is_told_where_it_could_not_go_on() -> None:
    """An empty id, by which its last one goes (WHATWG HTML, 9.2.6)."""
    entry = _entry(["1"] * (MOST_UNKEPT + 1), 0)
    assert (entry.event_id(MOST_UNKEPT + 1), entry.event_id(MOST_UNKEPT)) == ("", "0" + ".1" * MOST_UNKEPT)
    entry.add(Delta((-1,), "of an engine that tells no ids"))
    assert entry.lost
    assert entry.event_id(1) == ""


def _fields(told: Said) -> tuple[Any, ...]:
    return told.ids, "", told.finish, told.stop_reason


def _entry(records: list[str], kept: int) -> Entry:
    return Entry("name", "owner", "owner", 0, "digest", STOPS, records, kept)
