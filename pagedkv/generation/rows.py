"""The batch rows of one cache, over sequences of a manager: which columns are stored, and which rows are still the same.

To transformers a batch is a rectangle: all rows have the same number of columns, padding included, and beams of one prompt
are as many rows. Here a row refers to a sequence, in which only what the attention mask shows has a place, and rows that
have seen the same tokens refer to one. They part when their tokens do: re-ordering beams only changes who refers to what.

Owns the rows and their sequences. It does not own blocks (the manager's) and sees no tensor.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError
from pagedkv.generation.grower import Grower
from pagedkv.generation.growth import Growth, NewColumns
from pagedkv.generation.recent import CopyBlocks, RecentTokens
from pagedkv.plan import BoolArray, Int64Array


class Beside(Protocol):
    """What is kept for the same rows elsewhere, and follows them."""

    def select(self, indices: Int64Array) -> None:
        """Make row ``i`` what row ``indices[i]`` was."""

    def crop(self, num_columns: int) -> None:
        """Forget the last columns, or refuse that."""

    def fork(self) -> Self:
        """The same once more."""

    def reset(self) -> None:
        """Forget everything."""


class Rows:
    """The rows of one batch; none before the first forward, whose number of rows stays.

    Args:
        manager: holds the sequences.
        namespace: within which prefixes are shared, in the batch and with whoever uses the same name.
        copy_blocks: as ``RecentTokens`` takes it.
        private: whether nobody else is to use the name, so that what was cached under it is forgotten with the rows.
        beside: what else is kept for the rows.
    """

    def __init__(
        self, manager: KVCacheManager, namespace: str, copy_blocks: CopyBlocks, *, private: bool, beside: Beside | None = None
    ) -> None:
        self.beside = beside
        self._manager = manager
        self._namespace = namespace
        self._private = private
        self._grower = Grower(manager, namespace)
        self._recent = RecentTokens(manager, copy_blocks)
        self._records = False
        self._clear()

    def belongs_to(self, manager: KVCacheManager) -> bool:
        """Whether this manager holds the sequences."""
        return self._manager is manager

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first forward."""
        return len(self._owner)

    @property
    def num_columns(self) -> int:
        """Columns that the batch has, padding included: what transformers takes for the length of the cache."""
        return int(self._stored.shape[1])

    @property
    def num_blocks(self) -> int:
        """Blocks that the rows hold in all layer groups, each counted once."""
        held = self._manager.rows_of(self._seqs[self._seqs != 0])
        return sum(int(np.count_nonzero(np.unique(tables[held]))) for tables in self._manager.table.block_tables)

    def __repr__(self) -> str:
        return f"{self.num_rows} rows of {self.num_columns} columns, {np.count_nonzero(self._seqs)} sequences"

    def lengths(self, num_rows: int) -> Int64Array:
        """``[R]`` int64 tokens stored for each row, of a batch that is or will be ``num_rows`` high."""
        return self._lengths[self._owner] if self.num_rows else np.zeros(num_rows, dtype=np.int64)

    def snapshot(self) -> Growth:
        """The rows as they are, as a growth of nothing."""
        leaders = np.zeros(len(self._seqs), dtype=np.int64)
        return Growth(owner=self._owner, seqs=self._seqs, leaders=leaders, stored=self._stored, lengths=self._lengths)

    def start(self, owner: Int64Array) -> None:
        """Make rows without a token of a batch that has none, where only those of one number ``owner [R]`` may become the same."""
        count = int(owner.max()) + 1
        self._owner = owner
        self._seqs = np.zeros(count, dtype=np.int64)
        self._stored = np.zeros((count, 0), dtype=np.bool_)
        self._lengths = np.zeros(count, dtype=np.int64)

    def has_gaps(self, seen: BoolArray) -> bool:
        """Whether a row has padding between its tokens once the new columns ``[R, Q]`` are there."""
        if seen.all() and self._stored.all():
            return False
        stored = np.concatenate([self._stored[self._owner], seen], axis=1) if self.num_rows else seen
        after_first = np.logical_or.accumulate(stored, axis=1)
        before_last = np.logical_or.accumulate(stored[:, ::-1], axis=1)[:, ::-1]
        return bool((after_first & before_last & ~stored).any())

    @property
    def has_given_back(self) -> bool:
        """Whether blocks behind a window are gone."""
        held = self._manager.rows_of(self._seqs[self._seqs != 0])
        return bool((self._manager.table.block_tables[:, held, 0] == 0).any())

    def see(self, num_rows: int, seen: BoolArray | None) -> bool:
        """Hold the columns so far against what the attention mask shows of them.

        Stored columns that are hidden at the end of a row (padding after its last token, in a continued chat) are given back.

        Args:
            num_rows: rows of the forward.
            seen: ``[R, C]`` bool; None when all are seen.

        Returns:
            Whether a row has a stored column that is hidden and cannot be given back, since others behind it are seen.

        Raises:
            InvalidRequestError: another number of rows, or a column is seen that was padding when it came.
        """
        if self.num_rows and num_rows != self.num_rows:
            raise InvalidRequestError(
                f"the cache holds {self.num_rows} rows and the forward has {num_rows}: use a new cache, or batch_repeat_interleave or "
                "batch_select_indices to change its rows"
            )
        self._recent.settle()
        if not self.num_rows or (seen is None and self._stored.all()):
            return False
        stored = self._stored[self._owner]
        wanted = np.ones_like(stored) if seen is None else seen
        if (wanted & ~stored).any():
            row, column = np.argwhere(wanted & ~stored)[0].tolist()
            raise InvalidRequestError(
                f"column {column} of row {row} was padding when it came and is seen by the attention mask now: pass the same mask again"
            )
        hidden = stored & ~wanted
        return bool(hidden.any()) and self._hide(hidden)

    def grow(self, new: NewColumns) -> Growth:
        """Reserve slots for new columns; rows that were the same and get different tokens part.

        All or nothing: when this raises, rows and blocks are as before.

        Raises:
            OutOfBlocksError: fewer blocks than needed.
            InvalidRequestError: more sequences than the manager has rows, or longer ones than it allows.

        Cost: O(R (C + Q)) bytes looked at, and a fixed number of array operations for a step of one column.
        """
        owner, origin, leaders = self._part(new)
        growth = Growth(
            owner=owner,
            seqs=self._seqs[origin],
            leaders=leaders,
            stored=np.concatenate([self._stored[origin], new.seen[leaders]], axis=1),
            lengths=self._lengths[origin],
        )
        try:
            if len(origin) > len(self._seqs):
                self._grower.fork(growth, origin)
            self._grower.reserve(growth, new)
        except BaseException:
            self._undo(growth)
            raise
        return growth

    def commit(self, growth: Growth) -> None:
        """The tokens of a growth are computed and written."""
        if len(growth.active):
            self._recent.add(growth.seqs[growth.active])
            if not self._records:
                self._recent.settle()
        self._owner, self._seqs, self._stored, self._lengths = growth.owner, growth.seqs, growth.stored, growth.lengths

    def cancel(self, growth: Growth) -> None:
        """Take a growth back, because its step did not run to the end.

        The rows are as they were before it, or all released: when the step would have copied a block that is shared, since whether the
        copy holds what it should is not known then, and when something beside K and V may have changed.
        """
        self._undo(growth)
        if self.beside is not None:
            self.release()

    def _undo(self, growth: Growth) -> None:
        if not self._grower.undo(growth):
            self.release()

    def select(self, indices: Int64Array) -> None:
        """Make row ``i`` what row ``indices[i]`` was. No block is copied; sequences that no row refers to are released."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.num_rows):
            raise InvalidRequestError(f"rows {indices.tolist()} were selected: there are {self.num_rows}")
        if not len(indices):
            return self.release()
        self._recent.settle()
        if self.beside is not None:
            self.beside.select(indices)
        owner = self._owner[indices]
        used, self._owner = np.unique(owner, return_inverse=True)
        if len(used) < len(self._seqs):
            left = np.delete(self._seqs, used)
            self._release(left[left != 0])
            self._seqs, self._stored, self._lengths = self._seqs[used], self._stored[used], self._lengths[used]

    def record(self) -> None:
        """From now on, ``crop`` can take back all columns of the last forward, where layers have windows, too."""
        self._records = any(self._manager.windows)

    def crop(self, num_columns: int) -> None:
        """Forget the last columns of every row.

        Raises:
            InvalidRequestError: fewer than 0, or more than there are; or blocks behind a window would be needed again.
        """
        if not 0 <= num_columns <= self.num_columns:
            raise InvalidRequestError(f"{num_columns} tokens were to be removed: the cache has {self.num_columns}")
        left = self.num_columns - num_columns
        lengths = self._lengths - np.count_nonzero(self._stored[:, left:], axis=1)
        if not self._recent.allow(self._seqs, self._lengths, lengths):
            raise InvalidRequestError(
                f"{num_columns} tokens were to be removed: blocks that layers with windows would need again were given back. Call "
                "activate_past_recording() before the forward whose tokens are removed, or make the pool with windowed_groups=False"
            )
        if self.beside is not None:
            self.beside.crop(num_columns)
        try:
            self._lengths = self._recent.take_back(self._seqs, self._lengths, lengths)
        except BaseException:
            self.release()  # whether the blocks hold what they should is not known
            raise
        self._recent.settle()
        self._cut(lengths)
        self._stored = self._stored[:, :left]

    def fork(self) -> Rows:
        """The same rows once more, over the same blocks: who writes into a shared block first gets a copy of it."""
        self._recent.settle()
        beside = None if self.beside is None else self.beside.fork()
        copy = Rows(self._manager, self._namespace, self._recent.copy_blocks, private=self._private, beside=beside)
        copy._records = self._records
        opened = self._seqs.nonzero()[0]
        free = self._manager.num_free_seqs
        if len(opened) > free:
            raise InvalidRequestError(f"a copy needs {len(opened)} sequences and {free} are left: raise max_num_seqs")
        copy._owner, copy._stored, copy._lengths = self._owner.copy(), self._stored.copy(), self._lengths.copy()
        copy._seqs = np.zeros_like(self._seqs)
        for place in opened.tolist():
            copy._seqs[place] = self._manager.fork(int(self._seqs[place]), 1)[0]
        return copy

    def release(self) -> None:
        """Give every block back and have no rows any more."""
        seqs = self._seqs[self._seqs != 0]
        self._clear()
        self._release(seqs)
        if self.beside is not None:
            self.beside.reset()
        if self._private:
            self._manager.purge(self._namespace)

    def _clear(self) -> None:
        self._owner = np.zeros(0, dtype=np.int64)
        self._seqs = np.zeros(1, dtype=np.int64)  # the sequence without a token that all rows of the first forward part from
        self._stored = np.zeros((1, 0), dtype=np.bool_)
        self._lengths = np.zeros(1, dtype=np.int64)
        self._recent.forget()

    def _release(self, seqs: Int64Array) -> None:
        if len(seqs):
            self._manager.release(seqs)

    def _hide(self, hidden: BoolArray) -> bool:
        """Give back what is hidden behind the last seen token of all rows of a sequence; whether anything else is hidden."""
        in_all = np.ones_like(self._stored)
        in_any = np.zeros_like(self._stored)
        np.logical_and.at(in_all, self._owner, hidden)
        np.logical_or.at(in_any, self._owner, hidden)
        shown = self._stored & ~in_all
        behind = np.cumsum(shown[:, ::-1], axis=1)[:, ::-1] == 0  # no shown column from here on
        dropped = self._stored & behind
        dropped[~self._recent.can_cut(self._lengths, self._lengths - np.count_nonzero(dropped, axis=1))] = False
        self._cut(self._lengths - np.count_nonzero(dropped, axis=1))
        self._stored &= ~dropped
        return bool((in_any & ~dropped).any())

    def _cut(self, lengths: Int64Array) -> None:
        shorter = (lengths < self._lengths) & (self._seqs != 0)
        ended = shorter & (lengths == 0)
        cut = shorter & ~ended
        if cut.any():
            self._manager.truncate(self._seqs[cut], lengths[cut])
        self._release(self._seqs[ended])
        self._seqs[ended] = 0
        self._lengths = lengths

    def _part(self, new: NewColumns) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Each row's sequence after the step ``[R]``, the sequence ``[U]`` that it comes from, and a row ``[U]`` that leads it."""
        num_rows = len(new.seen)
        owner = self._owner if self.num_rows else np.zeros(num_rows, dtype=np.int64)
        if self.num_rows == len(self._seqs):  # each row has a sequence of its own already
            return owner, np.arange(num_rows), np.argsort(owner)
        marks = np.arange(num_rows)[:, None] if new.token_ids is None else np.where(new.seen, new.token_ids, -1)
        places: dict[tuple[int, bytes], int] = {}
        leaders: list[int] = []
        parted = np.empty(num_rows, dtype=np.int64)
        for row, (sequence, mark) in enumerate(zip(owner.tolist(), marks, strict=True)):
            parted[row] = place = places.setdefault((sequence, mark.tobytes()), len(places))
            if place == len(leaders):
                leaders.append(row)
        order = np.array(leaders, dtype=np.int64)
        return parted, owner[order], order
