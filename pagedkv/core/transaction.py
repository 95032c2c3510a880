"""Whether a command was stopped between its first change and its last.

Owns one number. Undoes nothing: a command finds out before its first change whatever it may be refused for. What stops it behind that is no
refusal but an interrupt, a lack of memory or a bug, and it leaves something half done. Nobody may work on with that, so it is remembered.
"""

from __future__ import annotations

from types import TracebackType

from pagedkv.errors import InvariantError, PagedKVError


class Transaction:
    """``with`` it, a command makes its changes; it stays open when an exception ends them, and ``check`` refuses everything from then on.

    May be entered again inside: the outermost counts.

    Args:
        owner: whose state it is, in words.
        refusals: errors raised before any change although inside.

    Attributes:
        depth: how often it is entered and not left; between two commands, more than 0 means broken.
    """

    __slots__ = ("_owner", "_refusals", "depth")

    def __init__(self, owner: str, *, refusals: tuple[type[PagedKVError], ...] = ()) -> None:
        self._owner = owner
        self._refusals = refusals
        self.depth = 0

    def check(self) -> None:
        """Raise ``InvariantError`` if a command was stopped in the middle."""
        if self.depth:
            raise InvariantError(
                f"{self._owner} was stopped in the middle of a command by an exception that came from outside: what it has left cannot be "
                "trusted, make a new one"
            )

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, self._refusals):
            self.depth -= 1
