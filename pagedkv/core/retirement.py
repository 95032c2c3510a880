"""How sequences give back the blocks behind their windows, while they run.

Owns no state, and there is none: how many leading blocks of a sequence are gone follows from how many are full. So what a table must list
is known of every sequence at any time. It works on the table and the groups for the ``KVCacheManager``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.core.layer_group import Group, WindowedGroup
from pagedkv.core.reservations import ranges
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.plan import Int32Array, Int64Array


class Retirement:
    """Gives back blocks behind windows; a fixed number of array operations for each windowed group, where a sequence has filled a block."""

    def __init__(self, table: SequenceTable, groups: Sequence[Group], *, block_size: int) -> None:
        self._table = table
        self._windowed = [(index, group) for index, group in enumerate(groups) if isinstance(group, WindowedGroup)]
        self._size = block_size

    def give_back(self, rows: Int64Array, before: Int32Array, full: Int32Array) -> None:
        """Release what rows that had ``before[i]`` full blocks, and have ``full[i]`` now, do not read any more: the oldest block first."""
        table = self._table
        for index, group in self._windowed:
            first = group.window.num_dead_blocks(before, self._size)
            counts = group.window.num_dead_blocks(full, self._size) - first
            if np.count_nonzero(counts):
                tables = table.flat_block_tables[index]
                cells = table.cells(np.repeat(rows, counts), ranges(first, counts))
                group.pool.release(tables[cells])
                tables[cells] = 0

    def is_gone(self, before: Int32Array, full: Int32Array) -> bool:
        """Whether going back from ``before[i]`` full blocks to ``full[i]`` needs a block that was given back."""
        sizes = [(group.window, self._size) for _, group in self._windowed]
        return any(np.count_nonzero(window.num_dead_blocks(before, size) > window.num_dead_blocks(full, size)) for window, size in sizes)


def first_blocks(group: Group, num_computed: Int32Array, block_size: int) -> Int32Array:
    """``[n]`` int32 leading blocks that sequences of so many computed tokens do not hold any more in a group: 0 where it has no window."""
    if group.window is None:
        return np.zeros_like(num_computed)
    return group.window.num_dead_blocks(num_computed // block_size, block_size)
