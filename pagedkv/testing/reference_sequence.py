"""What one live sequence should be like; owned by a ``ReferenceManager``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagedkv.testing.reference_pool import Key, Space


@dataclass(slots=True)
class Twin:
    """One live sequence; ``space`` is None when it may not publish any more."""

    name: str
    space: Space | None
    tokens: list[int]
    tables: list[list[int]]
    reserved: int
    computed: int
    copy_pending: bool = False

    def sure(self, size: int) -> int:
        """Computed tokens that do not depend on a copy that may not have been made."""
        return self.computed // size * size if self.copy_pending else self.computed

    def copy(self) -> Twin:
        """One that shares all its blocks."""
        return replace(self, tokens=list(self.tokens), tables=[list(table) for table in self.tables])

    def start(self, size: int) -> Key | None:
        """What its first block is found by, if it is."""
        return None if self.space is None or self.computed < size else (self.space, tuple(self.tokens[:size]))
