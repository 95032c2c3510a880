"""Who holds how many references to which block, and in which order blocks are handed out and evicted.

Owns reference counts, the free list and, through its policy, the order of eviction. Does not know which tokens a block holds
(``PrefixCache``), which sequence holds it (``SequenceTable``) or where its bytes are (``KVStorage``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pagedkv.checks import integer
from pagedkv.core.arguments import as_block_ids
from pagedkv.core.eviction import EvictionPolicy, LeastRecentlyUsed
from pagedkv.errors import InvalidRequestError, InvariantError, OutOfBlocksError, StaleHandleError, UnknownHandleError
from pagedkv.plan import BoolArray, Int32Array

NULL_BLOCK = 0
_ONE = np.int32(1)  # of the counts' own type: ufunc.at is many times slower when it has to cast
_NOTHING = np.zeros(0, dtype=np.int32)
_NOTHING.setflags(write=False)
_Array = TypeVar("_Array", Int32Array, BoolArray)
_MAX_REFERENCES = 2**30  # far from int32's edge, so that one command can never wrap a counter


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Blocks handed out, and the cached blocks that had to be evicted for them.

    Attributes:
        block_ids: ``[n]`` int32, each with one reference.
        evicted: ``[e]`` int32, the part of ``block_ids`` whose cached content is gone and must be forgotten.
    """

    block_ids: Int32Array
    evicted: Int32Array


class BlockPool:
    """A fixed number of blocks with reference counts; block 0 is the null block and is never handed out.

    A block is *free* (in the free list), *evictable* (cached, held by nobody) or *in use* (held at least once). Every command
    validates before it changes anything.

    Args:
        num_blocks: blocks in all, the null block included; at least 2.
        policy: order of eviction, fresh and empty; least recently used when not given.

    Raises:
        ConfigError: ``num_blocks`` is below 2 or not addressable by int32.

    Memory: 9 bytes a block, plus 16 for the default policy.
    """

    def __init__(self, num_blocks: int, *, policy: EvictionPolicy | None = None) -> None:
        self.num_blocks = num_blocks = integer("num_blocks", num_blocks, least=2, most=2**31 - 1)  # block 0 is the null block
        self._policy: EvictionPolicy = LeastRecentlyUsed(num_blocks) if policy is None else policy
        self._references = np.zeros(num_blocks, dtype=np.int32)
        self._cached = np.zeros(num_blocks, dtype=np.bool_)
        self._references_view, self._cached_view = _readonly(self._references), _readonly(self._cached)
        # The same memory, for reading and writing a single item: numpy takes many times as long for that.
        self._reference_items: memoryview[int] = memoryview(self._references.data)
        self._cached_items: memoryview[int] = memoryview(self._cached.data)
        # A stack whose top is the lowest id: fresh pools fill from the bottom, and what was freed last (still warm) is used first.
        self._free = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)
        self._free = np.concatenate([self._free, np.zeros(1, dtype=np.int32)])
        self._num_free = num_blocks - 1

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all: every block but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._num_free

    @property
    def num_evictable(self) -> int:
        """Cached blocks that nobody holds."""
        return len(self._policy)

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` could hand out now."""
        return self._num_free + len(self._policy)

    @property
    def num_in_use(self) -> int:
        """Blocks held by at least one reference."""
        return self.num_usable - self.num_available

    @property
    def references(self) -> Int32Array:
        """``[N]`` reference counts, a read-only view."""
        return self._references_view

    @property
    def cached(self) -> BoolArray:
        """``[N]`` whether the block is findable by content, a read-only view."""
        return self._cached_view

    def is_cached(self, block_ids: Int32Array) -> BoolArray:
        """Whether each block is findable by content."""
        found: BoolArray = self._cached[self._places(as_block_ids(block_ids))]
        return found

    def is_shared(self, block_ids: Int32Array) -> BoolArray:
        """Whether each block must be copied before it is written: held more than once, or findable (and so immutable)."""
        places = self._places(as_block_ids(block_ids))
        return (self._references[places] > 1) | self._cached[places]

    def take(self, count: int) -> Allocation:
        """Hand out ``count`` blocks with one reference each: free ones first, then evicted ones.

        Raises:
            InvalidRequestError: ``count`` is negative, or no integer.
            OutOfBlocksError: fewer than ``count`` are available; nothing was changed.

        Cost: a fixed number of array operations; O(1) amortised a block.
        """
        if type(count) is not int or count < 0:
            count = integer("number of blocks asked for", count, least=0, error=InvalidRequestError)
        left, evicted = self._num_free - count, _NOTHING
        if left >= 0:
            ids = self._free[left : self._num_free][::-1].copy()
        else:
            if count > self.num_available:
                raise OutOfBlocksError(needed=count, available=self.num_available)
            evicted = self._policy.pop(-left)
            self._cached[evicted] = False
            ids = np.concatenate([self._free[: self._num_free][::-1], evicted])
        self._num_free = max(left, 0)
        self._references[_index(ids)] = _ONE
        return Allocation(ids, evicted)

    def acquire(self, block_ids: Int32Array) -> None:
        """Add one reference for each mention of a block that is held, or cached.

        Raises:
            UnknownHandleError: an id outside the pool, or the null block.
            StaleHandleError: a block that is free: it holds nothing to share.
            InvariantError: a reference count would pass 2**30.
        """
        block_ids = as_block_ids(block_ids)
        places = self._places(block_ids)
        before = self._references[places]
        gone = (before == 0) & ~self._cached[places]
        if gone.any():
            raise StaleHandleError(f"block {int(block_ids[gone][0])} is free; only a held or cached block can be acquired")
        if len(before) and int(before.max()) > _MAX_REFERENCES - len(block_ids):
            raise InvariantError(f"block {int(block_ids[before.argmax()])} would be held more than {_MAX_REFERENCES} times")
        idle = np.unique(block_ids[before == 0])
        if len(idle):
            self._policy.remove(idle)
        np.add.at(self._references, places, _ONE)

    def release(self, block_ids: Int32Array) -> None:
        """Drop one reference for each mention of a block, in this order: give a sequence's blocks tail first.

        Blocks that nobody holds any more become evictable if cached, else free.

        Raises:
            UnknownHandleError: an id outside the pool, or the null block.
            StaleHandleError: more releases than references; nothing was changed.
        """
        block_ids = as_block_ids(block_ids)
        places = self._places(block_ids)
        np.subtract.at(self._references, places, _ONE)
        after = self._references[places]
        if len(after) and int(after.min()) < 0:
            np.add.at(self._references, places, _ONE)
            raise StaleHandleError(f"block {int(block_ids[after.argmin()])} is released more often than it is held")
        idle = _last_mentions(block_ids[after == 0])
        if not len(idle):
            return
        keep = self._cached[_index(idle)]
        self._push_free(idle[~keep])
        if keep.any():
            self._policy.insert(idle[keep])

    def mark_cached(self, block_ids: Sequence[int]) -> None:
        """Note that held blocks became findable by content.

        Raises:
            UnknownHandleError: an id outside the pool, or the null block.
            InvariantError: a block is not held, or cached already.

        Cost: about 0.3 microseconds a block; they come a few at a time, for which one array operation alone takes longer.
        """
        references, cached = self._reference_items, self._cached_items
        try:
            for block in block_ids:
                if not block > NULL_BLOCK:
                    raise IndexError
                if references[block] < 1 or cached[block]:
                    raise InvariantError("only a held block that is not cached yet can be published")
        except (IndexError, TypeError):  # asking each before it is used would take longer
            return self.mark_cached(self._places(as_block_ids(block_ids)).tolist())
        for block in block_ids:
            cached[block] = True

    def forget_cached(self, block_ids: Int32Array) -> None:
        """Note that blocks are not findable any more; those that nobody holds become free.

        Raises:
            UnknownHandleError: an id outside the pool, or the null block.
            InvariantError: a block is not cached, or given twice.
        """
        block_ids = as_block_ids(block_ids)
        self._check_ids(block_ids)
        if not self._cached[block_ids].all() or len(np.unique(block_ids)) < len(block_ids):
            raise InvariantError("only a cached block can be forgotten, and only once")
        self._cached[block_ids] = False
        idle = block_ids[self._references[block_ids] == 0]
        if len(idle):
            self._policy.remove(idle)
            self._push_free(idle)

    def check(self) -> None:
        """Verify every invariant of the pool; O(blocks).

        Raises:
            InvariantError: naming the first that is broken: counts are never negative; the null block is never held, cached or free; the
                free list holds each free block once; a free block is neither held nor cached; the classes sum to the pool.
        """
        for problem in self._problems():
            raise InvariantError(f"block pool: {problem}")

    def _problems(self) -> Iterator[str]:
        # Lists and sets, not arrays: audits run after every operation on pools of a few blocks, where an array operation costs more than
        # a look at every block.
        blocks, references = range(self.num_blocks), self._references.tolist()
        held, cached = set(compress(blocks, references)), set(compress(blocks, self._cached.tolist()))
        free = self._free[: self._num_free].tolist()
        if min(references) < 0:
            yield "a reference count is negative"
        if NULL_BLOCK in held or NULL_BLOCK in cached:
            yield "the null block is held or cached"
        if free and not NULL_BLOCK < min(free) <= max(free) < self.num_blocks:
            yield "the null block is in the free list, or one of no pool"
        if len(set(free)) != len(free):
            yield "a block is in the free list twice"
        if not held.isdisjoint(free):
            yield "a free block is held"
        if not cached.isdisjoint(free):
            yield "a free block is cached"
        unheld, num_evictable = len(cached - held), len(self._policy)
        if unheld != num_evictable:
            yield f"{unheld} blocks are evictable, the policy holds {num_evictable}"
        if len(free) + num_evictable + len(held) != self.num_usable:
            yield "free, evictable and held blocks do not sum to the pool"

    def _push_free(self, block_ids: Int32Array) -> None:
        end = self._num_free + len(block_ids)
        self._free[self._num_free : end] = block_ids
        self._num_free = end

    def _places(self, block_ids: Int32Array) -> npt.NDArray[np.intp]:
        """Blocks of this pool as an index."""
        self._check_ids(block_ids)
        return _index(block_ids)

    def _check_ids(self, block_ids: Int32Array) -> None:
        if len(block_ids) and not (int(block_ids.min()) > NULL_BLOCK and int(block_ids.max()) < self.num_blocks):
            wrong = block_ids[(block_ids <= NULL_BLOCK) | (block_ids >= self.num_blocks)][0]
            raise UnknownHandleError(f"block {int(wrong)} is not one of 1 to {self.num_blocks - 1} (0 is the null block)")


def _index(block_ids: Int32Array) -> npt.NDArray[np.intp]:
    """The same ids as numpy wants them for an index: by any other integers it takes many times as long, at each use."""
    return block_ids.astype(np.intp)


def _last_mentions(block_ids: Int32Array) -> Int32Array:
    """Each id once, in the order of its last mention: an ancestor shared by two sequences must follow both tails."""
    if len(block_ids) < 2:
        return block_ids
    reverse = block_ids[::-1]
    _, first = np.unique(reverse, return_index=True)
    return reverse[np.sort(first)][::-1] if len(first) < len(block_ids) else block_ids


def _readonly(array: _Array) -> _Array:
    view = array.view()
    view.flags.writeable = False
    return view
