"""Where in the caller's code a command was called, and where handles were given back. Knows frames and text, nothing of blocks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

_CORE = str(Path(__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_CALLERS = _PACKAGE + "testing" + os.sep  # callers like any other
_MOST_REMEMBERED = 2**16


def call_site() -> str:
    """``file:line`` of who called into ``pagedkv.core``; where the package itself did, also of who called the package."""
    inside, frame = "", _caller(sys._getframe(1), _CORE)
    if frame is not None and _is_in(frame, _PACKAGE):
        inside = f"pagedkv{os.sep}{_place(frame).removeprefix(_PACKAGE)}, called at "
        frame = _caller(frame, _PACKAGE)
    return inside + ("an unknown place" if frame is None else _place(frame))


class ReleaseLog:
    """Remembers where the last 65,536 handles were given back."""

    def __init__(self) -> None:
        self._sites: dict[tuple[str, int], str] = {}

    def note(self, kind: str, handles: Iterable[int]) -> None:
        """These handles of a kind are given back by the caller of now."""
        site = call_site()
        for handle in handles:
            self._sites[kind, handle] = site
            if len(self._sites) > _MOST_REMEMBERED:
                del self._sites[next(iter(self._sites))]

    def explain(self, error: Exception, kind: str, handles: Iterable[int]) -> None:
        """Note on an error where the first of these handles that was given back was, and where it is used now."""
        for handle in handles:
            site = self._sites.get((kind, handle))
            if site is not None:
                error.add_note(f"{kind} {handle} was released at {site} and is used at {call_site()}")
                return


def _caller(frame: FrameType | None, folder: str) -> FrameType | None:
    """The innermost frame that runs no code of that folder."""
    while frame is not None and _is_in(frame, folder):
        frame = frame.f_back
    return frame


def _is_in(frame: FrameType, folder: str) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(folder) and not name.startswith(_CALLERS)


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
