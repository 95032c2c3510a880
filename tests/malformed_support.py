"""What a case of malformed input is, and how one is held to its word."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pagedkv.errors import PagedKVError


@dataclass(frozen=True)
class Case:
    """A call that has to be refused: with this very error, and with words of the message that name the culprit."""

    name: str
    error: type[PagedKVError]
    words: str
    call: Callable[[Any], object]

    def hold(self, subject: object) -> None:
        with pytest.raises(self.error) as caught:
            self.call(subject)
        assert type(caught.value) is self.error, f"{type(caught.value).__name__}: {caught.value}"
        # As whole words: a setting is not named by another whose name contains its own.
        begin, end = (r"\b" if self.words[place].isalnum() else "" for place in (0, -1))
        assert re.search(begin + re.escape(self.words) + end, str(caught.value)), f"{self.words!r} is not in: {caught.value}"


class Unprintable:
    """Breaks whoever looks at it."""

    def __repr__(self) -> str:
        raise ValueError("cannot be printed")

    def __eq__(self, other: object) -> bool:
        raise ValueError("cannot be compared")

    def __hash__(self) -> int:
        raise ValueError("cannot be hashed")


def table(*rows: tuple[str, type[PagedKVError], str, Callable[[Any], object]]) -> list[Case]:
    cases = [Case(*row) for row in rows]
    assert len({case.name for case in cases}) == len(cases), "two cases of one name"
    return cases


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
