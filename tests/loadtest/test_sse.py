from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.loadtest.sse import MAX_EVENT_BYTES, EventReader

STREAM = (
    b"\xef\xbb\xbfdata: first\n\n"
    b": a comment\r\n\r\n"
    b"event: message\r\nid: 7\r\ndata:no space\r\n\r\n"
    b"data: two\rdata:  lines\r\r"
    b"\n\n\n"
    b"data\ndata: \n\n"
    b"database: no\n\n"
    b"data: [DONE]"
)
EVENTS = [b"first", b"no space", b"two\n lines", b"\n", b"[DONE]"]


def read(chunks: list[bytes]) -> list[bytes]:
    reader = EventReader()
    events = [event for chunk in chunks for event in reader.feed(chunk)]
    return events + reader.end()


def test_reads_what_the_standard_allows() -> None:
    assert read([STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_it_does_not_matter_where_the_stream_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in pairwise(places)]
    assert read(pieces) == EVENTS


def test_byte_for_byte() -> None:
    assert read([bytes([each]) for each in STREAM]) == EVENTS


def test_an_event_is_given_as_soon_as_it_is_whole() -> None:
    reader = EventReader()
    assert reader.feed(b"data: a\n") == []
    assert reader.feed(b"\n") == [b"a"]
    assert reader.feed(b"data: b\n\ndata: c\n\nda") == [b"b", b"c"]


@pytest.mark.parametrize("line", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n"])
def test_a_line_or_an_event_without_end_is_refused(line: bytes) -> None:
    reader = EventReader()
    with pytest.raises(ValueError, match=f"more than {MAX_EVENT_BYTES} bytes"):
        for _ in range(MAX_EVENT_BYTES // 65536 + 1):
            reader.feed(line)


def test_many_small_events_are_not_too_large() -> None:
    reader = EventReader()
    block = b"data: x\n\n" * 10_000
    assert sum(len(reader.feed(block)) for _ in range(30)) == 300_000
    assert reader.end() == []
