"""Making computed full blocks findable, and swapping duplicates for the block that is findable already.

A windowed group's block becomes findable by way of the first group's, whose turn comes before. Owns no state but a count: it works on the
table and the groups for the ``KVCacheManager``, after a step has completed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.core.layer_group import Group, LayerGroup
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.plan import Int32Array, Int64Array


class Publication:
    """Publishes rows' full blocks up to given counts; about 1 microsecond a block."""

    def __init__(self, table: SequenceTable, groups: Sequence[Group], *, block_size: int) -> None:
        self._table = table
        self._groups = groups
        self._size = block_size
        self.num_deduplicated = 0

    def publish(self, rows: Int64Array, full: Int32Array) -> None:
        """Make the first ``full[i]`` blocks of each row findable; rows without a root may not publish and are left out."""
        roots = self._table.roots[rows]
        if np.count_nonzero(roots) < len(roots):
            rows, full, roots = rows[roots != 0], full[roots != 0], roots[roots != 0]
        first = self._table.num_published[rows]
        single = full - first == 1
        if np.count_nonzero(single) == len(single):
            self._publish_row_blocks(rows, first, roots)
        else:
            if np.count_nonzero(single):
                self._publish_row_blocks(rows[single], first[single], roots[single])
            for row, begin, end in zip(rows[~single].tolist(), first[~single].tolist(), full[~single].tolist(), strict=True):
                self._publish_chain(row, begin, end)
        self._table.num_published[rows] = full

    def publish_singles(self, cells: Int64Array, parents: list[list[int]], blocks: list[list[int]], roots: list[int]) -> list[list[int]]:
        """Make one full block of each of ``n`` rows findable, and leave it to the caller to count it as published.

        Args:
            cells: ``[n]`` int64 flat places of the blocks in a group's table.
            parents: per group, the ``n`` blocks before; the root where there is none.
            blocks: per group, the ``n`` blocks.
            roots: the rows' ``n`` namespace roots, none of them 0.

        Returns:
            Per group, the ``n`` blocks that stand in the table from now on.
        """
        contents = self._table.token_blocks.take(cells, axis=0)
        settled: list[list[int]] = []
        for tables, group, before, given in zip(self._table.flat_block_tables, self._groups, parents, blocks, strict=True):
            holders = group.publish(before, contents, given, roots) if isinstance(group, LayerGroup) else group.follow(settled[0], given)
            if holders != given:
                self.num_deduplicated += sum(holder != block for holder, block in zip(holders, given, strict=True))
                tables[cells] = holders
            settled.append(holders)
        return settled

    def _publish_row_blocks(self, rows: Int64Array, columns: Int32Array, roots: Int32Array) -> None:
        table = self._table
        cells = table.cells(rows, columns)
        parents, blocks = table.blocks_at(cells - 1, columns - 1, roots), table.blocks_at(cells, columns, roots)
        self.publish_singles(cells, parents, blocks, roots.tolist())

    def _publish_chain(self, row: int, begin: int, end: int) -> None:
        table, size = self._table, self._size
        root = int(table.roots[row])
        contents = table.token_ids[row, begin * size : end * size].reshape(end - begin, size)
        leading: list[int] = []
        for tables, group in zip(table.block_tables, self._groups, strict=True):
            blocks = tables[row, begin:end].copy()
            if isinstance(group, LayerGroup):
                parent = int(tables[row, begin - 1]) if begin else root
                holders = group.cache.publish_chain(parent, contents, blocks, root)
                leading = leading or holders.tolist()
            else:
                holders = np.array(group.cache.publish(leading, blocks.tolist()), dtype=np.int32)
            if group.settle(blocks, holders):
                self.num_deduplicated += int(np.count_nonzero(holders != blocks))
                tables[row, begin:end] = holders
