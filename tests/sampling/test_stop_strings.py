from __future__ import annotations

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedkv.sampling.stop
from pagedkv.errors import InvalidRequestError
from pagedkv.sampling import StopStrings


def expected_text(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: letter by letter, the first stop string complete ends the text; the longest of several."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_any_cut_of_the_text_equals_the_definition(pieces: list[str], stops: list[str], include: bool) -> None:
    expected, matched = expected_text("".join(pieces), stops, include)
    stop, shown = StopStrings(stops, include=include), ""
    for piece in pieces:
        shown += stop.feed(piece)
        assert expected.startswith(shown), "something was shown that is no part of the result"
        assert stop.matched or len(stop.held) < max(map(len, stops))
    shown += stop.finish()
    assert (shown, stop.matched) == (expected, matched)


def test_stop_after_match_shows_nothing() -> None:
    stop = StopStrings("END")
    assert stop.feed("aEND b") == "a"
    assert stop.feed("more") == ""
    assert stop.finish() == ""


def test_stop_not_searched_passes_through_and_is_no_part_of_a_match() -> None:
    stop = StopStrings(["ab"])
    assert stop.feed("xaba", search=False) == "xaba"
    assert stop.feed("b") == "b"
    assert stop.feed("cab") == "c"
    assert stop.matched == "ab"


def test_stop_held_beginning_is_shown_at_the_end() -> None:
    stop = StopStrings(["\n\nUser"])
    assert stop.feed("hi\n\nUs") == "hi"
    assert stop.held == "\n\nUs"
    assert stop.finish() == "\n\nUs"


def test_stop_none_given_passes_through_and_empty_one_raises() -> None:
    assert StopStrings([]).feed("abc") == "abc"
    with pytest.raises(InvalidRequestError, match="stop"):
        StopStrings([""])


def test_stop_doctest_runs() -> None:
    assert doctest.testmod(pagedkv.sampling.stop).failed == 0
