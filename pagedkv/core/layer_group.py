"""One layer group's blocks: its pool and what finds its blocks, kept in step.

Owns the rule that a block stops being findable in the same breath in which the pool gives it away, and that what belongs to it in the
groups that follow does, too. Knows no sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Generic, Protocol, TypeVar

import numpy as np

from pagedkv.core.block_pool import BlockPool
from pagedkv.core.eviction import EvictionPolicy
from pagedkv.core.prefix_cache import PrefixCache
from pagedkv.core.report import GroupStatistics
from pagedkv.core.window import Window
from pagedkv.core.window_cache import WindowCache
from pagedkv.errors import InvariantError
from pagedkv.plan import Int32Array


class FindableBlocks(Protocol):
    """What a group asks of that which finds its blocks."""

    def __len__(self) -> int:
        """Findable blocks."""

    def remove(self, block_ids: Int32Array) -> None:
        """Forget findable blocks."""

    def published(self) -> set[int]:
        """All findable blocks."""

    def check(self) -> None:
        """Raise ``InvariantError`` for what is broken."""


_Cache_co = TypeVar("_Cache_co", bound=FindableBlocks, covariant=True)


class BlockGroup(Generic[_Cache_co]):
    """The blocks of the layers that keep the same positions, however they are found.

    Args:
        pool: the group's blocks.
        cache: finds those of them that are published.

    Attributes:
        window: how far back its layers look; None where they look at everything.
        followers: groups whose blocks are found by way of this one's.
        num_evicted: findable blocks given away since the start.
    """

    def __init__(self, pool: BlockPool, cache: _Cache_co, *, window: Window | None) -> None:
        self.pool = pool
        self.cache = cache
        self.window = window
        self.followers: list[WindowedGroup] = []
        self.num_evicted = 0

    def take(self, count: int) -> Int32Array:
        """Hand out ``count`` blocks and forget what they held; raises ``OutOfBlocksError`` before any change."""
        allocation = self.pool.take(count)
        if len(allocation.evicted):
            self.cache.remove(allocation.evicted)
            self.num_evicted += len(allocation.evicted)
            for follower in self.followers:
                follower.drop(allocation.evicted)
        return allocation.block_ids

    def settle(self, block_ids: Int32Array, holders: Int32Array) -> int:
        """After publishing: note the new blocks as cached and swap each duplicate for the block that holds its content already.

        Args:
            block_ids: ``[n]`` int32 blocks as computed, each with one reference of the caller's.
            holders: ``[n]`` int32 blocks that hold the contents; the caller's references end up on these.

        Returns:
            how many were duplicates. No block is mentioned twice among those that are not.
        """
        twins = holders != block_ids
        num_twins = int(np.count_nonzero(twins))
        fresh = holders[~twins]
        known = self.pool.is_cached(fresh)
        if np.count_nonzero(known):
            fresh = fresh[~known]
        self.pool.mark_cached(fresh.tolist())
        if num_twins:
            self.pool.acquire(holders[twins])
            self.pool.release(block_ids[twins])
        return num_twins

    def forget(self, block_ids: Int32Array) -> None:
        """Make published blocks unfindable, and what belongs to them in other groups; those that nobody holds become free."""
        self.cache.remove(block_ids)
        self.pool.forget_cached(block_ids)
        for follower in self.followers:
            follower.drop(block_ids)

    def statistics(self) -> GroupStatistics:
        """A frozen account; O(blocks)."""
        pool = self.pool
        num_free, num_evictable = pool.num_free, pool.num_evictable
        return GroupStatistics(
            num_blocks=pool.num_usable,
            num_free=num_free,
            num_evictable=num_evictable,
            num_in_use=pool.num_usable - num_free - num_evictable,
            num_shared=int(np.count_nonzero(pool.references > 1)),
            num_cached=len(self.cache),
            num_evicted=self.num_evicted,
        )

    def held_blocks(self) -> tuple[tuple[int, int], ...]:
        """``(block_id, references)`` of every held block, ascending; O(blocks)."""
        return tuple((block, count) for block, count in enumerate(self.pool.references.tolist()) if count)

    def free_blocks(self) -> Int32Array:
        """``[n]`` int32 ids of the blocks that hold nothing, ascending: neither held nor findable; O(blocks)."""
        ids: Int32Array = ((self.pool.references == 0) & ~self.pool.cached).nonzero()[0].astype(np.int32)
        return ids[1:]  # without the null block

    def check(self) -> None:
        """Verify the pool, the cache and that both name the same blocks; O(blocks).

        Raises:
            InvariantError: naming what is broken.
        """
        self.pool.check()
        self.cache.check()
        cached = self.pool.cached.tolist()
        if sum(cached) != len(self.cache):
            raise InvariantError("layer group: the pool and the prefix cache disagree on how many blocks are cached")
        if not self.cache.published().issubset(compress(range(self.pool.num_blocks), cached)):
            raise InvariantError("layer group: a findable block is not marked as cached")

    def _note_published(self, block_ids: Sequence[int], holders: Sequence[int], *, known: int) -> None:
        """After publishing, with ``known`` findable blocks before it."""
        if len(self.cache) - known == len(block_ids):  # all of them are new: there is nothing to tell apart
            self.pool.mark_cached(block_ids)
        else:
            self.settle(np.array(block_ids, dtype=np.int32), np.array(holders, dtype=np.int32))


class LayerGroup(BlockGroup[PrefixCache]):
    """A group whose sequences keep all of their blocks, and so are found by their tokens.

    Args:
        num_blocks: blocks in the group's pools, the null block included.
        block_size: tokens in a block.
        policy: order of eviction, fresh and empty.
    """

    def __init__(self, num_blocks: int, *, block_size: int, policy: EvictionPolicy | None = None) -> None:
        super().__init__(BlockPool(num_blocks, policy=policy), PrefixCache(num_blocks, block_size=block_size), window=None)

    def publish(self, parents: Sequence[int], token_ids: Int32Array, block_ids: Sequence[int], roots: Sequence[int]) -> list[int]:
        """Make full blocks findable; arguments as for ``PrefixCache.publish``. The caller has one reference on each block.

        Returns:
            ``n`` ids of the blocks that the caller's references are on from now on.
        """
        known = len(self.cache)
        holders = self.cache.publish(parents, token_ids, block_ids, roots)
        self._note_published(block_ids, holders, known=known)
        return holders


class WindowedGroup(BlockGroup[WindowCache]):
    """A group whose sequences give back the blocks behind their window; what it has published is found by way of a leading group.

    Args:
        num_blocks: blocks in the group's pools, the null block included.
        window: how far back its layers look.
        leader: the group that keeps everything; it tells this one what it forgets.
        policy: order of eviction, fresh and empty.
    """

    window: Window

    def __init__(self, num_blocks: int, *, window: Window, leader: LayerGroup, policy: EvictionPolicy | None = None) -> None:
        cache = WindowCache(num_blocks, num_leading=leader.pool.num_blocks)
        super().__init__(BlockPool(num_blocks, policy=policy), cache, window=window)
        leader.followers.append(self)

    def follow(self, leading: Sequence[int], block_ids: Sequence[int]) -> list[int]:
        """Make full blocks findable by the leading group's published blocks for the same tokens; the rest as for ``LayerGroup.publish``."""
        known = len(self.cache)
        holders = self.cache.publish(leading, block_ids)
        self._note_published(block_ids, holders, known=known)
        return holders

    def drop(self, leading: Int32Array) -> None:
        """Forget what belongs to blocks that the leading group has forgotten."""
        found = [block for block in self.cache.find_all(leading.tolist()) if block]
        if found:
            self.forget(np.array(found, dtype=np.int32))


Group = LayerGroup | WindowedGroup
