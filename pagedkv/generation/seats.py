"""Which rows belong to caches that are open. Owns the list, and gives back the blocks of caches that are gone."""

from __future__ import annotations

from pagedkv.errors import ClosedError
from pagedkv.generation.rows import Rows


class Seats:
    """The rows of all open caches of one pool."""

    def __init__(self) -> None:
        self._rows: dict[int, Rows] = {}
        self._abandoned: list[Rows] = []
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether the pool is."""
        return self._closed

    @property
    def is_empty(self) -> bool:
        """Whether no cache is open."""
        return not self._rows

    def take(self, rows: Rows) -> Rows:
        """Open these rows; returns them."""
        self._rows[id(rows)] = rows
        return rows

    def check(self, rows: Rows) -> None:
        """Raise ``ClosedError`` unless the cache of these rows is open."""
        self.check_open()
        if id(rows) not in self._rows:
            raise ClosedError("the cache is closed: make a new one")

    def check_open(self) -> None:
        """Raise ``ClosedError`` when the pool is closed."""
        if self._closed:
            raise ClosedError("the pool of the cache is closed: make a new one")

    def leave(self, rows: Rows) -> None:
        """Close these rows and give their blocks back; nothing where they are closed already."""
        if self._rows.pop(id(rows), None) is not None:
            rows.release()

    def abandon(self, rows: Rows) -> None:
        """Note that the cache of these rows is gone. Safe in the garbage collector: blocks come back with ``reap``."""
        self._abandoned.append(rows)

    def reap(self) -> None:
        """Close what was abandoned."""
        while self._abandoned and not self._closed:
            self.leave(self._abandoned.pop())

    def close(self) -> None:
        """Close the pool; the blocks are gone with it."""
        self._closed = True
        self._rows.clear()
