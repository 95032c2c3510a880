"""How sequences get slots and give them back: growing tables, copying before a shared block is written, cutting.

Owns no state: it works on the table and the groups for the ``KVCacheManager``, which has validated everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.core.layer_group import Group
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.errors import OutOfBlocksError
from pagedkv.plan import Int32Array, Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """Reserved slots, in the order asked.

    Attributes:
        slot_mapping: ``[G, T]`` int64 slots, ``block_id * block_size + offset``.
        positions: ``[T]`` int32 positions of the tokens in their sequences.
        seq_lens: ``[S]`` int32 tokens with a slot in each sequence, these included.
        copies: per group, ``[C, 2]`` int32 (source, target) blocks to copy before anything is written.
    """

    slot_mapping: Int64Array
    positions: Int32Array
    seq_lens: Int32Array
    copies: tuple[Int32Array, ...]


class Reservations:
    """Grows and cuts rows of a table; takes and releases the blocks that go with it."""

    def __init__(self, table: SequenceTable, groups: Sequence[Group], *, block_size: int) -> None:
        self._table = table
        self._groups = groups
        self._size = block_size
        self.no_copies = (np.zeros((0, 2), dtype=np.int32),) * len(groups)
        self.num_copies = 0

    def grow_by_one(self, rows: Int64Array, start: Int32Array) -> Extension:
        """One more slot in each row, from position ``start``: the decode path, a fixed and small number of array operations."""
        columns = start // self._size
        offsets = start - columns * self._size
        cells = self._table.cells(rows, columns)
        fresh = (offsets == 0).nonzero()[0]  # a table holds exactly the blocks that its slots need, so only a full one grows
        writers = self._check_room(rows, len(fresh))
        with self._table.change:
            copies = self._copy_tails(rows, writers) if writers else self.no_copies
            if len(fresh):
                self.open_blocks(cells[fresh])
                self._table.num_blocks[rows[fresh]] = columns[fresh] + 1
            self._table.num_reserved[rows] = end = start + 1
            return Extension(self._slots(cells, offsets), start, end, copies)

    def grow(self, rows: Int64Array, start: Int32Array, end: Int32Array) -> Extension:
        """Slots from ``start`` to before ``end`` in each row; raises ``OutOfBlocksError`` before any change."""
        missing = self.missing_blocks(rows, end)
        total = int(missing.sum())
        counts = end - start
        positions = ranges(start, counts)
        columns, offsets = np.divmod(positions, self._size)
        cells = self._table.cells(np.repeat(rows, counts), columns)
        writers = self._check_room(rows, total)
        with self._table.change:
            copies = self._copy_tails(rows, writers) if writers else self.no_copies
            if total:
                self._append_blocks(rows, missing, total)
            self._table.num_reserved[rows] = end
            return Extension(self._slots(cells, offsets), positions, end, copies)

    def open_blocks(self, cells: Int64Array) -> list[Int32Array]:
        """Take a block for each of these flat places of every group's table; with several groups, the caller has checked that all can."""
        opened = []
        for tables, group in zip(self._table.flat_block_tables, self._groups, strict=True):
            ids = group.take(len(cells))
            tables[cells] = ids
            opened.append(ids)
        return opened

    def check_available(self, needed: list[int]) -> None:
        """Raise ``OutOfBlocksError`` unless every group has so many blocks to give."""
        for count, group in zip(needed, self._groups, strict=True):
            if count > group.pool.num_available:
                raise OutOfBlocksError(needed=count, available=group.pool.num_available)

    def missing_blocks(self, rows: Int64Array, end: Int32Array) -> Int32Array:
        """Blocks that each row's table lacks for ``end`` tokens, without copies."""
        missing: Int32Array = (end + (self._size - 1)) // self._size - self._table.num_blocks[rows]
        return missing

    def most_copies(self, rows: Int64Array) -> int:
        """Copies that writing on in these rows needs, in the group that needs most."""
        return max(map(len, self._tails_to_copy(rows))) if self._table.some_tail_shared else 0

    def cut(self, rows: Int64Array, num_computed: Int32Array) -> None:
        """Leave each row with so many computed tokens, no reservation, and just the blocks that those need."""
        table, size = self._table, self._size
        keep = (num_computed + (size - 1)) // size
        surplus = table.num_blocks[rows] - keep
        owners, columns = np.repeat(rows, surplus), ranges(keep, surplus)
        for index, group in enumerate(self._groups):
            group.pool.release(table.block_tables[index, owners, columns][::-1])
            table.block_tables[index, owners, columns] = 0
        table.num_blocks[rows] = keep
        table.num_reserved[rows] = table.num_computed[rows] = num_computed
        table.num_published[rows] = np.minimum(table.num_published[rows], num_computed // size)
        table.mark_tails_shared(rows[num_computed % size != 0])
        table.clear_copies(rows)

    def _check_room(self, rows: Int64Array, num_new_blocks: int) -> list[Int64Array]:
        """Check that all blocks can be had; returns per group the rows whose last block is to be copied, nothing where none is shared."""
        tails = self._tails_to_copy(rows) if self._table.some_tail_shared else []
        writers = [len(some) for some in tails] or [0] * len(self._groups)
        self.check_available([num_new_blocks + count for count in writers])
        return tails

    def _copy_tails(self, rows: Int64Array, tails: list[Int64Array]) -> tuple[Int32Array, ...]:
        copies = tuple(self._copy_group_tails(index, writers) for index, writers in enumerate(tails))
        self._table.unmark_tails(rows)  # copied, or found to be held by nobody else
        return copies

    def _tails_to_copy(self, rows: Int64Array) -> list[Int64Array]:
        """Per group, the rows that must copy their half-full last block before they write on in it."""
        suspects = rows[self._table.tail_shared[rows]]
        suspects = suspects[self._table.num_reserved[suspects] % self._size != 0]
        return [self._writers_to_copy(index, suspects) for index in range(len(self._groups))]

    def _writers_to_copy(self, index: int, rows: Int64Array) -> Int64Array:
        if not len(rows):
            return rows
        tails = self._table.block_tables[index, rows, self._table.num_blocks[rows] - 1]
        pool = self._groups[index].pool
        copying = pool.is_shared(tails)
        # Where all holders of an unpublished block write in this very call, the last of them may keep it.
        ids, inverse, counts = np.unique(tails, return_inverse=True, return_counts=True)
        kept = (counts == pool.references[ids]) & ~pool.cached[ids]
        last = np.zeros(len(ids), dtype=np.int64)
        last[inverse] = np.arange(len(rows))
        copying[last[kept]] = False
        return rows[copying]

    def _copy_group_tails(self, index: int, rows: Int64Array) -> Int32Array:
        if not len(rows):
            return self.no_copies[index]
        group, table = self._groups[index], self._table
        where = table.num_blocks[rows] - 1
        source = table.block_tables[index, rows, where]
        target = group.take(len(rows))
        table.block_tables[index, rows, where] = target
        group.pool.release(source)
        table.mark_copies(rows)
        table.num_published[rows] = np.minimum(table.num_published[rows], where)
        self.num_copies += len(rows)
        return np.stack([source, target], axis=1)

    def _append_blocks(self, rows: Int64Array, missing: Int32Array, total: int) -> None:
        table = self._table
        grow = missing > 0
        rows, missing = rows[grow], missing[grow]
        first = table.num_blocks[rows]
        columns = ranges(first, missing)
        owners = np.repeat(rows, missing)
        for index, group in enumerate(self._groups):
            table.block_tables[index, owners, columns] = group.take(total)
        table.num_blocks[rows] = first + missing

    def _slots(self, cells: Int64Array, offsets: Int32Array) -> Int64Array:
        slots = np.empty((len(self._groups), len(cells)), dtype=np.int64)
        for index, tables in enumerate(self._table.flat_block_tables):
            slots[index] = tables.take(cells)
        slots *= self._size
        slots += offsets
        return slots


def ranges(first: Int32Array, counts: Int32Array) -> Int32Array:
    """``first[i], first[i] + 1, ...`` for ``counts[i]`` numbers, one range after the other, int32."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.arange(total) + np.repeat(first - (ends - counts), counts)
    narrow: Int32Array = numbers.astype(np.int32)
    return narrow
