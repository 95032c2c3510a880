"""Stop strings over text that arrives in pieces.

It owns where the text ends and how much of it may be shown already. It does not own token-level stops, nor how text is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.sampling.checks import strings


class StopStrings:
    """Passes text through until one of the stop strings has appeared, and holds back what may be the beginning of one.

    The result does not depend on how the text was cut into pieces: the stop string that is complete first wins; of several that
    end with the same character the one that begins first, which is the longest.

    Args:
        stops: the strings, none of them empty; no strings at all passes everything through.
        include: whether the matched string stays in the text.

    Example:
        >>> stop = StopStrings(["END"])
        >>> stop.feed("good E"), stop.feed("ND more"), stop.matched
        ('good ', '', 'END')
    """

    __slots__ = ("_held", "_include", "_longest", "_matched", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = strings("stop", stops)
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text (the output's ``stop_reason``), or ``None``."""
        return self._matched

    @property
    def held(self) -> str:
        """Text that was fed and not shown yet, because a stop string may begin with it."""
        return self._held

    def feed(self, text: str, *, search: bool = True) -> str:
        """Take the next piece and return what may be shown now.

        Args:
            text: new text, may be empty.
            search: ``False`` while the output is shorter than ``min_tokens``: the piece passes and can be no part of a match.

        Returns:
            New text to show; nothing ever has to be taken back. After a match always empty.

        Cost: O(length of the piece and of the longest stop string), whatever came before.
        """
        if self._matched is not None:
            return ""
        if not search or not self._stops:
            shown, self._held = self._held + text, ""
            return shown
        window = self._held + text
        end, stop = self._first_complete(window)
        if stop:
            self._matched, self._held = stop, ""
            return window[:end] if self._include else window[: end - len(stop)]
        keep = self._beginning(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def finish(self) -> str:
        """The end of the text has come: return what was held back."""
        shown, self._held = self._held, ""
        return shown

    def _first_complete(self, window: str) -> tuple[int, str]:
        best_end, best = len(window) + 1, ""
        for stop in self._stops:
            start = window.find(stop)
            end = start + len(stop)
            if start >= 0 and (end < best_end or (end == best_end and len(stop) > len(best))):
                best_end, best = end, stop
        return best_end, best

    def _beginning(self, window: str) -> int:
        """Length of the longest end of the window that a stop string begins with."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            tail = window[len(window) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
