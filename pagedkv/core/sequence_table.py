"""Block tables, lengths and tokens of every live sequence, as arrays: a sequence is a row.

Owns the rows and their handles. Does not own a block's lifetime (``BlockPool``); its only writer is the ``KVCacheManager``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.checks import integer
from pagedkv.core.arguments import as_handles
from pagedkv.core.report import SequenceSnapshot
from pagedkv.core.transaction import Transaction
from pagedkv.errors import InvalidRequestError, StaleHandleError, UnknownHandleError
from pagedkv.plan import Int32Array, Int64Array

_ROW_BITS = 32
_ROW_MASK = 2**_ROW_BITS - 1


class SequenceTable:
    """Rows for up to ``max_num_seqs`` live sequences.

    A handle is ``generation << 32 | row``; a row's generation grows with each release, so an old handle never reaches a new sequence.
    The columns of tables and tokens grow by doubling up to the limit, so short sequences stay cheap.

    Args:
        max_num_seqs: rows.
        num_groups: layer groups, each with a block table of its own.
        block_size: tokens in a block.
        max_blocks: the longest block table, in blocks.

    Raises:
        ConfigError: a size that is not an integer of at least 1.

    Attributes:
        block_tables: ``[G, R, M]`` int32, null block where a table has ended.
        token_ids: ``[R, M * B]`` int32 known tokens.
        flat_block_tables: per group ``[R * M]`` int32, the same memory as ``block_tables``; see ``cells``.
        flat_token_ids, token_blocks: ``[R * M * B]`` and ``[R * M, B]`` int32, the same memory as ``token_ids``.
        num_tokens: ``[R]`` int32 known tokens.
        num_reserved: ``[R]`` int32 tokens that have a slot; the scheduled ones included.
        num_computed: ``[R]`` int32 tokens whose K/V is stored.
        num_blocks: ``[R]`` int32 blocks in the table, the same in every group.
        num_published: ``[R]`` int32 leading blocks that are findable.
        roots: ``[R]`` int32 namespace roots; 0 for a row that may not publish any more.
        tail_shared: ``[R]`` bool, the last block may be held by others too, so look before writing into it.
        copy_pending: ``[R]`` bool, the last block is a copy that the current step has still to make.
        change: open while a command changes the table or the blocks that it names; nobody may go on when it is open between commands.
    """

    def __init__(self, max_num_seqs: int, *, num_groups: int, block_size: int, max_blocks: int) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("num_groups", num_groups),
            ("block_size", block_size),
            ("max_blocks", max_blocks),
        ):
            integer(name, value, least=1, most=_ROW_MASK)
        self.change = Transaction("the manager")
        self._block_size = block_size
        self._max_blocks = max_blocks
        columns = min(max_blocks, 16)
        self._lay_out(
            np.zeros((num_groups, max_num_seqs, columns), dtype=np.int32), np.zeros((max_num_seqs, columns * block_size), dtype=np.int32)
        )
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_reserved = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_published = np.zeros(max_num_seqs, dtype=np.int32)
        self.roots = np.zeros(max_num_seqs, dtype=np.int32)
        self.tail_shared = np.zeros(max_num_seqs, dtype=np.bool_)
        self.copy_pending = np.zeros(max_num_seqs, dtype=np.bool_)
        # Whether any row may be marked; spares the decode path a look at each.
        self.some_tail_shared = False
        self.some_copy_pending = False
        self._handles = np.zeros(max_num_seqs, dtype=np.int64)  # 0: no live sequence in this row
        self._generations = np.ones(max_num_seqs, dtype=np.int64)
        self._mark = np.zeros(max_num_seqs, dtype=np.int64)
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._epoch = 0  # counts openings and closings of rows
        self._last_seqs: Int64Array | None = None
        self._last_rows = np.zeros(0, dtype=np.int64)
        self._last_epoch = -1

    @property
    def max_num_seqs(self) -> int:
        """Rows in all."""
        return len(self._handles)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def max_tokens(self) -> int:
        """The longest sequence that a row can hold."""
        return self._max_blocks * self._block_size

    @property
    def num_free_rows(self) -> int:
        """Rows without a sequence."""
        return len(self._free)

    @property
    def num_live_rows(self) -> int:
        """Rows with a sequence, counted."""
        return int(np.count_nonzero(self._handles))

    @property
    def live_rows(self) -> Int64Array:
        """Rows with a sequence, ascending."""
        return self._handles.nonzero()[0]

    def handles_of(self, rows: Int64Array) -> Int64Array:
        """The live handles in these rows."""
        handles: Int64Array = self._handles[rows]
        return handles

    def cells(self, rows: Int64Array, columns: Int32Array) -> Int64Array:
        """Flat places of ``(row, column)`` in a group's block table, and of a block's tokens in ``token_ids`` cut into blocks.

        One flat look-up costs half of a two-dimensional one, and the places serve several arrays.
        """
        places: Int64Array = rows * self.block_tables.shape[2]
        places += columns
        return places

    def blocks_at(self, cells: Int64Array, columns: Int32Array, roots: Int32Array) -> list[list[int]]:
        """Per group, the blocks in these flat places, which are in these columns; the row's root where the column is before the first."""
        # A place before the first column may lie before the table as well; what is read there is replaced by the root.
        blocks = self.block_tables.reshape(len(self.block_tables), -1)[:, np.maximum(cells, 0)]
        chosen: list[list[int]] = np.where(columns < 0, roots, blocks).tolist()
        return chosen

    def recognises(self, seqs: object) -> bool:
        """Whether this is the frozen array of the last look-up, whose handles are all as live as they were then."""
        return seqs is self._last_seqs and self._last_epoch == self._epoch

    def rows_of(self, seqs: Sequence[int] | Int64Array) -> Int64Array:
        """Rows of distinct live handles; a fixed number of array operations, one comparison for the frozen array of the last call.

        Raises:
            UnknownHandleError, StaleHandleError: naming the first wrong handle.
            InvalidRequestError: a handle is given twice, or what is given are no integers.
        """
        if self.recognises(seqs):
            return self._last_rows
        if not isinstance(seqs, np.ndarray) or seqs.dtype != np.int64 or seqs.ndim != 1:
            seqs = as_handles(seqs)
        rows: Int64Array = seqs & _ROW_MASK
        # A row beyond the last is taken for the last, whose handle is another. An empty row's handle is 0, which no sequence has.
        live = (self._handles.take(rows, mode="clip") == seqs) & (seqs != 0)
        if np.count_nonzero(live) != len(rows):
            self._refuse(seqs)
        if len(rows) > 1:
            order = np.arange(len(rows))
            self._mark[rows] = order
            if not (self._mark[rows] == order).all():
                raise InvalidRequestError("a sequence is given twice in one call")
        if not seqs.flags.writeable and seqs.base is None:
            # The step path passes the same frozen array step after step: it stays valid until a row is opened or closed. A frozen view
            # is not trusted: whoever holds the array behind it can still write.
            self._last_seqs, self._last_rows, self._last_epoch = seqs, rows, self._epoch
        return rows

    def mark_tails_shared(self, rows: Int64Array) -> None:
        """Note that the last blocks of these rows may be held by others too."""
        if len(rows):
            self.tail_shared[rows] = True
            self.some_tail_shared = True

    def unmark_tails(self, rows: Int64Array) -> None:
        """Note that the last blocks of these rows are their own."""
        self.tail_shared[rows] = False
        self.some_tail_shared = bool(self.tail_shared.any())

    def mark_copies(self, rows: Int64Array) -> None:
        """Note that the last blocks of these rows are copies still to be made."""
        self.copy_pending[rows] = True
        self.some_copy_pending = True

    def clear_copies(self, rows: Int64Array) -> None:
        """Note that the copies of these rows are made, or called off."""
        self.copy_pending[rows] = False
        self.some_copy_pending = bool(self.copy_pending.any())

    def open_rows(self, count: int) -> tuple[Int64Array, Int64Array]:
        """Take ``count`` empty rows; returns rows and handles. The caller has checked ``num_free_rows``."""
        rows = np.array([self._free.pop() for _ in range(count)], dtype=np.int64)
        self._epoch += 1
        self._handles[rows] = (self._generations[rows] << _ROW_BITS) | rows
        return rows, self._handles[rows]

    def close_rows(self, rows: Int64Array) -> None:
        """Empty rows; their handles are stale from now on."""
        self._epoch += 1
        self._handles[rows] = 0
        self._generations[rows] += 1
        self.block_tables[:, rows] = 0
        for column in (self.num_tokens, self.num_reserved, self.num_computed, self.num_blocks, self.num_published, self.roots):
            column[rows] = 0
        self.tail_shared[rows] = False
        self.copy_pending[rows] = False
        self._free.extend(rows.tolist()[::-1])

    def ensure_columns(self, num_tokens: int) -> None:
        """Make room for sequences of ``num_tokens``, at most ``max_tokens``; amortised O(1) a token."""
        have = self.block_tables.shape[2]
        needed = -(-num_tokens // self._block_size)
        if needed <= have:
            return
        columns = min(max(needed, 2 * have), self._max_blocks)
        groups, rows, _ = self.block_tables.shape
        tables = np.zeros((groups, rows, columns), dtype=np.int32)
        tables[:, :, :have] = self.block_tables
        tokens = np.zeros((rows, columns * self._block_size), dtype=np.int32)
        tokens[:, : self.token_ids.shape[1]] = self.token_ids
        self._lay_out(tables, tokens)

    def snapshots(self) -> tuple[SequenceSnapshot, ...]:
        """All live rows, copied out."""
        handles, known, held = self._handles.tolist(), self.num_tokens.tolist(), self.num_blocks.tolist()
        reserved, computed, published = self.num_reserved.tolist(), self.num_computed.tolist(), self.num_published.tolist()
        tokens, tables, size = self.token_ids, self.block_tables, self._block_size
        return tuple(
            [
                SequenceSnapshot(
                    seq=handle,
                    num_tokens=known[row],
                    num_reserved_tokens=reserved[row],
                    num_computed_tokens=computed[row],
                    num_published_blocks=published[row],
                    token_ids=tuple(tokens[row, : known[row]].tolist()),
                    block_tables=tuple([tuple(ids.tolist()) for ids in tables[:, row, : held[row]]]),
                    block_size=size,
                )
                for row, handle in enumerate(handles)
                if handle
            ]
        )

    def _lay_out(self, block_tables: Int32Array, token_ids: Int32Array) -> None:
        flat, blocks = tuple(tables.reshape(-1) for tables in block_tables), token_ids.reshape(-1, self._block_size)
        laid_out = block_tables, flat, token_ids, token_ids.reshape(-1), blocks
        # In one statement: an exception from outside finds all of the old arrays here, or all of the new ones.
        self.block_tables, self.flat_block_tables, self.token_ids, self.flat_token_ids, self.token_blocks = laid_out

    def _refuse(self, seqs: Int64Array) -> None:
        rows = seqs & _ROW_MASK
        inside = rows < len(self._handles)
        wrong = ~inside | (self._handles[np.where(inside, rows, 0)] != seqs) | (seqs <= 0)
        seq = int(seqs[wrong.argmax()])
        row, generation = seq & _ROW_MASK, seq >> _ROW_BITS
        if generation > 0 and row < len(self._handles) and generation < self._generations[row]:
            raise StaleHandleError(f"sequence handle {seq} was released (row {row}, generation {generation})")
        raise UnknownHandleError(f"sequence handle {seq} was never issued by this manager")
