"""What the last forward of a batch has written, and may be told to take back although layers have windows.

With a window, completing tokens gives blocks back that shorter sequences would still read. So where transformers announces that it will
crop, they are completed only when the crop has come, or something else. Owns which sequences have such tokens; their blocks are the
manager's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pagedkv.core import KVCacheManager
from pagedkv.plan import BoolArray, Int32Array, Int64Array

CopyBlocks = Callable[[Sequence[Int32Array]], None]


class RecentTokens:
    """The tokens of one batch that are written and not complete yet.

    Args:
        manager: holds the sequences.

    Attributes:
        copy_blocks: copies ``[C, 2]`` blocks (source, target) of each layer group, all of them read before any is written.
    """

    def __init__(self, manager: KVCacheManager, copy_blocks: CopyBlocks) -> None:
        self._manager = manager
        self.copy_blocks = copy_blocks
        self._seqs: Int64Array = np.zeros(0, dtype=np.int64)

    def add(self, seqs: Int64Array) -> None:
        """Note sequences whose reserved tokens are written."""
        self._seqs = seqs

    def settle(self) -> None:
        """Complete all of it: what is behind a window from now on is given back."""
        seqs = self._seqs
        self.forget()
        if len(seqs):
            self._manager.complete(seqs)

    def forget(self) -> None:
        """The sequences are gone."""
        self._seqs = self._seqs[:0]

    def allow(self, seqs: Int64Array, lengths: Int64Array, shorter: Int64Array) -> bool:
        """Whether a batch's sequences ``[U]`` of these lengths can all become so much shorter, now that some tokens are not complete."""
        complete, open_seqs = lengths.copy(), seqs.nonzero()[0]
        complete[open_seqs] = self._manager.table.num_computed[self._manager.rows_of(seqs[open_seqs])]
        return bool(self.can_cut(complete, shorter).all())

    def can_cut(self, lengths: Int64Array, shorter: Int64Array) -> BoolArray:
        """``[U]`` bool which sequences of so many complete tokens can be cut: no window needs a block again that was given back."""
        size = self._manager.block_size
        full, left = ((each // size).astype(np.int32) for each in (lengths, np.minimum(lengths, shorter)))
        possible: BoolArray = np.ones(len(lengths), dtype=np.bool_)
        for window in self._manager.windows:
            if window is not None:
                possible &= window.num_dead_blocks(full, size) <= window.num_dead_blocks(left, size)
        possible |= shorter == 0  # which are released
        return possible

    def take_back(self, seqs: Int64Array, lengths: Int64Array, shorter: Int64Array) -> Int64Array:
        """Cut sequences that could not be cut any more once their tokens are complete, where ``allow`` allows it.

        Returns:
            ``[U]`` int64 lengths after that; those of other sequences are as before, for the manager to cut.
        """
        if self.can_cut(lengths, shorter).all():
            return lengths
        recent = np.isin(seqs, self._seqs) & (shorter > 0) & (shorter < lengths)
        self._cut(seqs[recent], shorter[recent])
        return np.where(recent, shorter, lengths)

    def _cut(self, seqs: Int64Array, lengths: Int64Array) -> None:
        """Cut some of these sequences to ``[n]`` tokens, at least one each, and complete all.

        Cutting gives the blocks of all incomplete tokens back, so those that stay are reserved again, and what is in their blocks moves.
        """
        manager = self._manager
        before = self._tables(seqs)
        self._seqs = np.setdiff1d(self._seqs, seqs)
        self.settle()
        manager.truncate(seqs, lengths.astype(np.int32))
        rest = lengths.astype(np.int32) - manager.table.num_reserved[manager.rows_of(seqs)]
        some = rest > 0
        if not some.any():
            return
        seqs, before = seqs[some], before[:, some]
        manager.extend(seqs, rest[some])
        after = self._tables(seqs)
        moved = (after != 0) & (after != before)
        self.copy_blocks([np.stack([old[at], new[at]], axis=1) for old, new, at in zip(before, after, moved, strict=True)])
        manager.complete(seqs)

    def _tables(self, seqs: Int64Array) -> Int32Array:
        """``[G, n, M]`` block ids, copied out."""
        tables: Int32Array = self._manager.table.block_tables[:, self._manager.rows_of(seqs)]
        return tables
