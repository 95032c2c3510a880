"""How many blocks sequences need, in each layer group. Owns no state.

In a group that keeps everything that grows with every token; in one with a window, a sequence that has what it reads and one block to write
into can go on for ever, be it with chunks no larger than what is free; unless its prompt has to be computed in one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.core import SequenceTable, Window
from pagedkv.plan import Int32Array, Int64Array

_NO_LIMIT = 2**31 - 1


class BlockNeeds:
    """Counts per layer group; a row of each answer is a group.

    What sequences share counts as held by each of them where it stays shared. Behind a window it goes, and in its place each needs one of
    its own: to be sure of the end, only what is held once can be reckoned with there.

    Args:
        table: of the manager.
        windows: how far back each group looks.
        in_chunks: whether a prompt may be computed in several steps.
    """

    def __init__(self, table: SequenceTable, windows: Sequence[Window | None], *, in_chunks: bool = True) -> None:
        self._table = table
        self._size = size = table.block_size
        self._windows = windows
        most = [window.most_blocks(size) if window is not None and in_chunks else _NO_LIMIT for window in windows]
        self.most = np.array(most, dtype=np.int64)[:, None]
        self.windowed = [group for group, window in enumerate(windows) if window is not None]

    def of_tokens(self, num_tokens: int) -> Int64Array:
        """``[G]`` int64 blocks that a sequence needs at once to come to so many tokens."""
        return self.of_blocks(np.array([-(-num_tokens // self._size)]))[:, 0]

    def of_blocks(self, num_blocks: Int32Array | Int64Array) -> Int64Array:
        """``[G, n]`` int64 the same for sequences whose tokens fill so many blocks."""
        needed: Int64Array = np.minimum(num_blocks, self.most)
        return needed

    def num_distinct(self, group: int, rows: Int64Array) -> int:
        """Blocks of one group that these rows hold, each counted once."""
        blocks = self._table.block_tables[group, rows]
        return len(np.unique(blocks[blocks > 0]))

    def held(self, rows: Int64Array) -> Int64Array:
        """``[G, n]`` int64 blocks that these rows hold."""
        table, size = self._table, self._size
        full = table.num_computed[rows] // size
        gone = [0 * full if window is None else window.num_dead_blocks(full, size) for window in self._windows]
        return table.num_blocks[rows].astype(np.int64) - np.array(gone)
