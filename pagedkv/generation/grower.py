"""Slots for what one forward adds: reserved in a manager, and given back where the forward does not come to its end.

Owns nothing: which rows there are is ``Rows``' to say, and the blocks are the manager's.
"""

from __future__ import annotations

import numpy as np

from pagedkv.core import KVCacheManager
from pagedkv.errors import OutOfBlocksError
from pagedkv.generation.growth import Growth, NewColumns
from pagedkv.plan import Int32Array, Int64Array

_MORE_BLOCKS = "close caches that are not needed any more, or make a larger pool (num_blocks or kv_cache_memory_bytes)"


class Grower:
    """Reserves for growths: ``undo`` takes back what ``fork`` and ``reserve`` have done for one, however far they came.

    Args:
        manager: holds the sequences.
        namespace: within which prefixes are shared.
    """

    def __init__(self, manager: KVCacheManager, namespace: str) -> None:
        self._manager = manager
        self._namespace = namespace

    def fork(self, growth: Growth, origin: Int64Array) -> None:
        """Give a handle of its own to every sequence but the first of those that have one ``origin [U]``.

        Raises:
            InvalidRequestError: more sequences than the manager has rows.
        """
        _, first, counts = np.unique(origin, return_index=True, return_counts=True)
        for place, count in zip(first[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
            seq = int(growth.seqs[place])
            if seq:
                forks = self._manager.fork(seq, count - 1)
                growth.added += forks.tolist()
                others = (origin == origin[place]).nonzero()[0][1:]
                growth.seqs[others] = forks

    def reserve(self, growth: Growth, new: NewColumns) -> None:
        """Make the new tokens known, and reserve a slot for each that is not cached.

        Raises:
            OutOfBlocksError: fewer blocks than needed.
            InvalidRequestError: more sequences than the manager has rows.
        """
        try:
            self._reserve(growth, new)
        except OutOfBlocksError as error:
            raise OutOfBlocksError(needed=error.needed, available=error.available, change=_MORE_BLOCKS) from None

    def undo(self, growth: Growth) -> bool:
        """Take all of it back; whether the sequences hold what they did, and not less, since a block was to be copied."""
        if growth.added:
            self._manager.release(growth.added)
        seqs, lengths = list(growth.before), list(growth.before.values())
        if seqs:
            self._manager.truncate(seqs, lengths)
        return bool(self._manager.table.num_computed[self._manager.rows_of(seqs)].tolist() == lengths)

    def _reserve(self, growth: Growth, new: NewColumns) -> None:
        seen = new.seen[growth.leaders]
        counts = np.count_nonzero(seen, axis=1).astype(np.int32)
        growth.lengths = growth.lengths + counts
        self._check_lengths(growth.lengths)
        some = counts > 0
        opening, going_on = (some & (growth.seqs == 0)).nonzero()[0], (some & (growth.seqs != 0)).nonzero()[0]
        if len(going_on):
            self._append(growth, going_on, counts, new)
        cached = np.zeros_like(counts)
        if len(opening):
            cached[opening] = self._open(growth, opening, new)
        active = some.nonzero()[0]
        growth.active = active = active[np.argsort(counts[active] - cached[active] != 1, kind="stable")]
        growth.computed = counts[active] - cached[active]
        if not len(active):
            return
        by_one = bool((growth.computed == 1).all())
        growth.extension = self._manager.extend(growth.seqs[active], 1 if by_one else growth.computed)
        places, columns = seen[active].nonzero()
        if cached.any():
            rank = np.arange(len(places)) - np.repeat(np.cumsum(counts[active]) - counts[active], counts[active])
            computed = rank >= cached[active][places]
            places, columns = places[computed], columns[computed]
        growth.token_rows, growth.token_columns = growth.leaders[active][places], columns

    def _check_lengths(self, lengths: Int64Array) -> None:
        longest, manager = int(lengths.max()), self._manager
        if longest > manager.max_seq_len:
            needed = -(-longest // manager.block_size)
            raise OutOfBlocksError(needed=needed, available=manager.usable_blocks[0], change=_MORE_BLOCKS)

    def _open(self, growth: Growth, places: Int64Array, new: NewColumns) -> Int32Array:
        """Start the sequences in these places; returns how many tokens of each are cached."""
        known = new.token_ids is not None
        prompts = [self._tokens(new, growth.leaders[place]) for place in places.tolist()]
        name = self._namespace if known else f"{self._namespace}\0unknown"
        opened = self._manager.open(prompts, [name] * len(prompts), use_cache=new.may_skip and known)
        growth.seqs[places] = opened.seqs
        growth.added += opened.seqs.tolist()
        if not known:
            self._manager.purge(name)  # from here on they publish nothing
        return opened.num_cached_tokens

    def _append(self, growth: Growth, places: Int64Array, counts: Int32Array, new: NewColumns) -> None:
        """Make the new tokens of sequences known that have some already."""
        seqs = growth.seqs[places]
        added = frozenset(growth.added)
        before = (growth.lengths - counts)[places].tolist()
        growth.before = {seq: length for seq, length in zip(seqs.tolist(), before, strict=True) if seq not in added}
        if new.token_ids is None:
            self._manager.purge(self._namespace)  # nobody may find by tokens what does not follow from tokens
        tokens = [self._tokens(new, growth.leaders[place]) for place in places.tolist()]
        for step in range(max(map(len, tokens))):
            self._manager.append(seqs, [int(each[step]) if step < len(each) else -1 for each in tokens])

    @staticmethod
    def _tokens(new: NewColumns, row: int) -> Int32Array:
        """The tokens of a row; zeros where they are not known."""
        if new.token_ids is None:
            return np.zeros(np.count_nonzero(new.seen[row]), dtype=np.int32)
        tokens: Int32Array = new.token_ids[row, new.seen[row]].astype(np.int32)
        return tokens
