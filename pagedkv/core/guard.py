"""Check levels: what is verified after a command. A guard looks at the state that a command left, and changes none of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from pagedkv.core import auditing, laws
from pagedkv.core.call_sites import ReleaseLog, call_site
from pagedkv.core.layer_group import Group
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.errors import ConfigError, InvariantError, StaleHandleError
from pagedkv.plan import BoolArray, Int32Array

CheckLevel = Literal["off", "step", "audit"]
"""How closely a manager watches itself, and the scheduler and engine over it.

``"off"``: the checks that every command makes of its arguments, and nothing else. ``"step"``: conservation laws after every command and
step, a fixed number of vector operations. ``"audit"``: every invariant after every command, freed blocks are poisoned, and a use after free
names where it was freed and where it is used; O(everything) each time, for tests and debugging.
"""

Pins = Mapping[int, tuple[Int32Array, ...]]

_MOST_NOTES = 4


def parse_check_level(value: str) -> CheckLevel:
    """The level of that name; raises ``ConfigError`` that lists those there are."""
    levels: tuple[CheckLevel, ...] = get_args(CheckLevel)
    for level in levels:
        if value == level:
            return level
    raise ConfigError(f"check is {value!r}: it must be one of {', '.join(levels)}")


class LawGuard:
    """Verifies the conservation laws, and remembers nothing: level ``"step"``."""

    def __init__(self, table: SequenceTable, groups: Sequence[Group], pins: Pins) -> None:
        self._table, self._groups, self._pins = table, groups, pins

    def after(self, command: str) -> None:
        """Verify the state that a command left; raises ``InvariantError``, with the command and its call site as a note."""
        try:
            laws.check(self._table, self._groups, self._pins)
        except InvariantError as error:
            error.add_note(f"found after {command} at {call_site()}")
            raise

    def note_release(self, kind: str, handles: Iterable[int]) -> None:
        """Nothing is remembered at this level."""

    def explain(self, error: StaleHandleError, kind: str, handles: Iterable[int]) -> None:
        """Nothing is known at this level."""

    def take_stale_blocks(self) -> tuple[Int32Array, ...]:
        """No block is followed at this level."""
        return tuple(np.zeros(0, dtype=np.int32) for _ in self._groups)


class AuditGuard:
    """Verifies everything, and remembers who let go of what: level ``"audit"``.

    Memory: about 10 bytes a block, and a text for each of the last handles given back and for every block that was ever freed.
    """

    def __init__(self, table: SequenceTable, groups: Sequence[Group], pins: Pins) -> None:
        self._table, self._groups, self._pins = table, groups, pins
        self._watches = [_BlockWatch(group) for group in groups]
        self._log = ReleaseLog()

    def after(self, command: str) -> None:
        """Verify the state that a command left, and note which blocks it let go of.

        Raises:
            InvariantError: with the command and its call site as a note; where a table lists a free block, also with the place where that
                was let go of.
        """
        site = f"{command} at {call_site()}"
        for watch in self._watches:
            watch.update(site)
        try:
            auditing.check(self._table, self._groups, self._pins)
        except InvariantError as error:
            error.add_note(f"found after {site}")
            for index, watch in enumerate(self._watches):
                for problem in watch.uses_after_free(self._table.block_tables[index])[:_MOST_NOTES]:
                    error.add_note(f"group {index}: {problem}")
            raise

    def note_release(self, kind: str, handles: Iterable[int]) -> None:
        """Remember where these handles were given back."""
        self._log.note(kind, handles)

    def explain(self, error: StaleHandleError, kind: str, handles: Iterable[int]) -> None:
        """Note on the error where the first stale one of these handles was given back, and where it is used now."""
        self._log.explain(error, kind, handles)

    def take_stale_blocks(self) -> tuple[Int32Array, ...]:
        """Per group the blocks that lost what they held since the last call and are free, or were handed out again: nothing valid is in
        them until the next step writes. The first call gives all free blocks."""
        return tuple(watch.take_stale() for watch in self._watches)


class _BlockWatch:
    """Which blocks of a group changed hands: found by comparing the pool with what it was after the last command; O(blocks) each."""

    def __init__(self, group: Group) -> None:
        self._pool = group.pool
        self._free, self._evictable = self._classes()
        self._stale = self._free.copy()
        self._freed_at: dict[int, str] = {}  # block to the command that let go of it last

    def update(self, site: str) -> None:
        free, evictable = self._classes()
        freed = free & ~self._free
        # An evicted block goes from one content to none without being free in between.
        self._stale |= freed | (self._evictable & ~evictable & ~self._pool.cached)
        self._free, self._evictable = free, evictable
        for block in freed.nonzero()[0].tolist():
            self._freed_at[block] = site

    def take_stale(self) -> Int32Array:
        stale = self._stale.nonzero()[0].astype(np.int32)
        self._stale[:] = False
        return stale

    def uses_after_free(self, block_tables: Int32Array) -> list[str]:
        """Freed blocks that more rows list than hold them, with the place where each was let go of last."""
        references, problems = self._pool.references, []
        listed = block_tables[(block_tables > 0) & (block_tables < len(references))]  # of the others, no place is known
        mentions = np.bincount(listed, minlength=len(references))
        for block in (mentions > references).nonzero()[0].tolist():
            if block in self._freed_at:
                rows = (block_tables == block).any(axis=1).nonzero()[0].tolist()
                problems.append(f"block {block}, which rows {rows} list, was let go of by {self._freed_at[block]}")
        return problems

    def _classes(self) -> tuple[BoolArray, BoolArray]:
        idle, cached = self._pool.references == 0, self._pool.cached
        idle[0] = False  # the null block belongs to no class
        return idle & ~cached, idle & cached
