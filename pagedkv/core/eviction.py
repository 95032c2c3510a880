"""Which cached block goes first when blocks run out: the policy protocol and the default, least recently used.

A policy owns the order of the blocks that are cached and held by nobody. It does not own reference counts (``BlockPool``) or what
the blocks contain (``PrefixCache``).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pagedkv.errors import InvariantError
from pagedkv.plan import Int32Array

_MIN_WINDOW = 64  # entries looked at together; below this, numpy's call overhead outweighs the scan


class EvictionPolicy(Protocol):
    """Orders evictable blocks; implement it to change what is forgotten first.

    Promise that the pool relies on and checks: ``pop`` hands out a block only after every cached block that continues it. The pool
    inserts a sequence's blocks tail first, so any policy that keeps the order of insertion keeps the promise.
    """

    def insert(self, block_ids: Int32Array) -> None:
        """Add blocks that nobody holds any more, in this order; none of them is in already."""

    def remove(self, block_ids: Int32Array) -> None:
        """Take blocks out because somebody holds them again; all of them are in."""

    def pop(self, count: int) -> Int32Array:
        """Take out and return the next ``count`` victims, at most ``len(self)``."""

    def __len__(self) -> int:
        """Blocks that can be evicted now."""


class LeastRecentlyUsed:
    """Evicts the block that was let go of the longest time ago.

    A queue of block ids with lazy deletion: an entry counts only while ``_position`` still points at it. Every operation is a fixed number
    of array operations over the blocks given, plus amortised O(1) a block for skipping dead entries. 16 bytes a block.

    Args:
        num_blocks: size of the id space, the null block included.
    """

    __slots__ = ("_head", "_position", "_queue", "_size", "_tail")

    def __init__(self, num_blocks: int) -> None:
        self._position = np.full(num_blocks, -1, dtype=np.int64)
        # Twice the ids: compaction then frees at least half, so its O(n) is paid for by n insertions.
        self._queue = np.zeros(max(2 * num_blocks, 2), dtype=np.int32)
        self._head = 0
        self._tail = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def insert(self, block_ids: Int32Array) -> None:
        """Add blocks as the most recently used, in this order."""
        count = len(block_ids)
        if self._tail + count > len(self._queue):
            self._compact()
        end = self._tail + count
        self._queue[self._tail : end] = block_ids
        self._position[block_ids] = np.arange(self._tail, end)
        self._tail = end
        self._size += count

    def remove(self, block_ids: Int32Array) -> None:
        """Forget blocks; their entries die where they are."""
        self._position[block_ids] = -1
        self._size -= len(block_ids)

    def pop(self, count: int) -> Int32Array:
        """Take out the ``count`` least recently used blocks, oldest first.

        Raises:
            InvariantError: there are not so many.
        """
        if count > self._size:
            raise InvariantError(f"eviction policy: {count} blocks are to be evicted and {self._size} can be")
        victims = np.empty(count, dtype=np.int32)
        found = 0
        while found < count:
            end = min(self._head + max(2 * (count - found), _MIN_WINDOW), self._tail)
            window = self._queue[self._head : end]
            alive = np.flatnonzero(self._position[window] == np.arange(self._head, end))[: count - found]
            victims[found : found + len(alive)] = window[alive]
            found += len(alive)
            # Stop right behind the last one taken: what follows it was not judged yet.
            self._head = end if found < count else self._head + int(alive[-1]) + 1
        self._position[victims] = -1
        self._size -= count
        return victims

    def _compact(self) -> None:
        window = self._queue[self._head : self._tail]
        alive = window[self._position[window] == np.arange(self._head, self._tail)]
        self._queue[: len(alive)] = alive
        self._position[alive] = np.arange(len(alive))
        self._head = 0
        self._tail = len(alive)
