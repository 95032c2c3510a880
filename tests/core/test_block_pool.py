"""Reference counts, the order in which blocks are handed out, and the refusals of ``BlockPool``."""

from __future__ import annotations

import numpy as np
import pytest
from core_helpers import ids

from pagedkv.core import NULL_BLOCK, BlockPool
from pagedkv.errors import ConfigError, InvalidRequestError, InvariantError, OutOfBlocksError, StaleHandleError, UnknownHandleError


def evictable(pool: BlockPool, count: int) -> list[int]:
    """Take blocks, make them findable and let go of them, one after the other."""
    blocks = pool.take(count).block_ids
    pool.mark_cached(blocks)
    for block in blocks:
        pool.release(ids(block))
    return blocks.tolist()


@pytest.mark.parametrize("num_blocks", [-1, 0, 1, 2**31])
def test_pool_size_that_cannot_work_is_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_blocks is {num_blocks}"):
        BlockPool(num_blocks)


def test_pool_fresh_is_all_free() -> None:
    pool = BlockPool(5)
    assert (pool.num_blocks, pool.num_usable, pool.num_free, pool.num_evictable, pool.num_available, pool.num_in_use) == (5, 4, 4, 0, 4, 0)
    assert not pool.references.any()
    assert not pool.cached.any()
    pool.check()


def test_take_from_fresh_pool_gives_lowest_ids_with_one_reference() -> None:
    pool = BlockPool(5)
    allocation = pool.take(3)
    assert allocation.block_ids.tolist() == [1, 2, 3]
    assert allocation.evicted.tolist() == []
    assert (allocation.block_ids.dtype, allocation.evicted.dtype) == (np.int32, np.int32)
    assert pool.references.tolist() == [0, 1, 1, 1, 0]
    assert pool.num_in_use == 3
    pool.check()


def test_take_whole_pool_never_gives_the_null_block() -> None:
    pool = BlockPool(9)
    assert NULL_BLOCK not in pool.take(8).block_ids
    pool.check()


def test_take_nothing_changes_nothing() -> None:
    pool = BlockPool(3)
    assert pool.take(0).block_ids.tolist() == []
    assert pool.num_free == 2


def test_take_after_release_gives_last_freed_first() -> None:
    pool = BlockPool(5)
    pool.take(4)
    pool.release(ids(2))
    pool.release(ids(4))
    assert pool.take(2).block_ids.tolist() == [4, 2]


def test_take_more_than_available_changes_nothing() -> None:
    pool = BlockPool(4)
    evictable(pool, 1)
    pool.take(1)
    with pytest.raises(OutOfBlocksError, match="needs 3 blocks, 2 are available") as raised:
        pool.take(3)
    assert (raised.value.needed, raised.value.available) == (3, 2)
    assert (pool.num_free, pool.num_evictable, pool.num_in_use) == (1, 1, 1)
    pool.check()


def test_take_negative_count_is_refused() -> None:
    pool = BlockPool(4)
    with pytest.raises(InvalidRequestError, match="asked for is -1"):
        pool.take(-1)
    pool.check()


def test_take_uses_free_blocks_before_it_evicts_the_least_recently_used() -> None:
    pool = BlockPool(5)
    old, new = evictable(pool, 2)
    allocation = pool.take(3)
    assert allocation.block_ids.tolist() == [3, 4, old]
    assert allocation.evicted.tolist() == [old]
    assert not pool.cached[old]
    assert pool.cached[new]
    pool.check()


def test_acquire_held_block_adds_a_reference_for_each_mention() -> None:
    pool = BlockPool(4)
    pool.take(2)
    pool.acquire(ids(1, 1, 2))
    assert pool.references.tolist() == [0, 3, 2, 0]
    assert pool.is_shared(ids(1, 2)).tolist() == [True, True]
    pool.check()


def test_acquire_cached_idle_block_saves_it_from_eviction() -> None:
    pool = BlockPool(3)
    first, second = evictable(pool, 2)
    pool.acquire(ids(first, first))
    assert (pool.num_evictable, pool.num_in_use) == (1, 1)
    assert pool.take(1).block_ids.tolist() == [second]
    pool.check()


def test_acquire_free_block_is_refused() -> None:
    pool = BlockPool(4)
    pool.take(1)
    with pytest.raises(StaleHandleError, match="block 2 is free"):
        pool.acquire(ids(1, 2))
    assert pool.references.tolist() == [0, 1, 0, 0]


def test_acquire_past_the_largest_count_is_refused() -> None:
    pool = BlockPool(3)
    pool.take(1)
    pool.references.base[1] = 2**30  # as if it had been acquired that often
    with pytest.raises(InvariantError, match="block 1 would be held more than"):
        pool.acquire(ids(1))


@pytest.mark.parametrize("wrong", [0, -1, 4, 2**31 - 1])
@pytest.mark.parametrize("command", ["acquire", "release", "forget_cached"])
def test_command_with_an_id_outside_the_pool_is_refused(command: str, wrong: int) -> None:
    pool = BlockPool(4)
    pool.take(3)
    with pytest.raises(UnknownHandleError, match=rf"block {wrong} is not one of 1 to 3"):
        getattr(pool, command)(ids(1, wrong))
    assert pool.references.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("command", ["acquire", "release", "mark_cached", "forget_cached"])
def test_command_with_no_blocks_changes_nothing(command: str) -> None:
    pool = BlockPool(4)
    getattr(pool, command)(ids())
    assert pool.num_free == 3


def test_release_last_reference_frees_the_block() -> None:
    pool = BlockPool(4)
    pool.take(1)
    pool.acquire(ids(1))
    pool.release(ids(1))
    assert pool.num_free == 2
    pool.release(ids(1))
    assert pool.num_free == 3
    pool.check()


def test_release_twice_in_one_call_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(4)
    pool.take(2)
    with pytest.raises(StaleHandleError, match="block 1 is released more often than it is held"):
        pool.release(ids(2, 1, 1))
    assert pool.references.tolist() == [0, 1, 1, 0]
    pool.check()


def test_release_twice_in_two_calls_is_refused() -> None:
    pool = BlockPool(4)
    pool.take(1)
    pool.release(ids(1))
    with pytest.raises(StaleHandleError):
        pool.release(ids(1))
    assert pool.num_free == 3
    pool.check()


def test_release_shared_ancestor_follows_both_tails_into_the_order_of_eviction() -> None:
    pool = BlockPool(5)
    pool.take(3)
    pool.mark_cached(ids(1, 2, 3))
    pool.acquire(ids(1))
    pool.release(ids(2, 1, 3, 1))  # two chains, 1-2 and 1-3, tails first
    assert pool.take(4).block_ids.tolist() == [4, 2, 3, 1]
    pool.check()


def test_mark_cached_unheld_block_is_refused() -> None:
    pool = BlockPool(4)
    with pytest.raises(InvariantError, match=r"^only a held block that is not cached yet can be published$"):
        pool.mark_cached(ids(1))


def test_mark_cached_twice_is_refused() -> None:
    pool = BlockPool(4)
    pool.take(1)
    pool.mark_cached(ids(1))
    with pytest.raises(InvariantError, match=r"^only a held block that is not cached yet can be published$"):
        pool.mark_cached(ids(1))
    assert pool.is_shared(ids(1)).tolist() == [True]


def test_forget_cached_frees_the_idle_and_leaves_the_held() -> None:
    pool = BlockPool(5)
    idle = evictable(pool, 1)
    held = pool.take(1).block_ids
    pool.mark_cached(held)
    pool.forget_cached(ids(*idle, *held))
    assert (pool.num_free, pool.num_evictable, pool.num_in_use) == (3, 0, 1)
    assert not pool.is_shared(held).any()
    pool.check()


def test_forget_cached_held_block_alone_frees_nothing() -> None:
    pool = BlockPool(3)
    held = pool.take(1).block_ids
    pool.mark_cached(held)
    pool.forget_cached(held)
    assert pool.num_free == 1
    pool.check()


@pytest.mark.parametrize("block_ids", [(1, 1), (1, 2)], ids=["twice", "not cached"])
def test_forget_cached_what_cannot_be_forgotten_is_refused(block_ids: tuple[int, ...]) -> None:
    pool = BlockPool(4)
    evictable(pool, 1)
    with pytest.raises(InvariantError, match=r"^only a cached block can be forgotten, and only once$"):
        pool.forget_cached(ids(*block_ids))
    pool.check()


@pytest.mark.parametrize("view", ["references", "cached"])
def test_views_are_read_only(view: str) -> None:
    array = getattr(BlockPool(3), view)
    with pytest.raises(ValueError, match="read-only"):
        array[1] = 1


class KeepsNothing:
    """A policy that loses what it is given: the pool's audit must see it."""

    def insert(self, block_ids: np.ndarray) -> None:
        """Lose them."""

    def remove(self, block_ids: np.ndarray) -> None:
        """Nothing to take out."""

    def pop(self, count: int) -> np.ndarray:
        """Nothing to give."""
        return ids()

    def __len__(self) -> int:
        return 0


def test_check_policy_that_loses_blocks_is_named() -> None:
    pool = BlockPool(3, policy=KeepsNothing())
    evictable(pool, 1)
    with pytest.raises(InvariantError, match="1 blocks are evictable, the policy holds 0"):
        pool.check()


# What follows writes into the pool's memory, as no call can: ``check`` is there for bugs.


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"references": (1, -1)}, "a reference count is negative"),
        ({"references": (0, 1)}, "the null block is held"),
        ({"cached": (0, True)}, "the null block is held or cached"),
        ({"references": (3, 1)}, "a free block is held"),
        ({"cached": (3, True)}, "a free block is cached"),
        ({"references": (1, 0)}, "do not sum to the pool"),
    ],
)
def test_check_scribbled_counts_are_named(broken: dict[str, tuple[int, int]], message: str) -> None:
    pool = BlockPool(4)
    pool.take(2)
    for view, (block, value) in broken.items():
        getattr(pool, view).base[block] = value
    with pytest.raises(InvariantError, match=message):
        pool.check()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (0, "the null block is in the free list"),
        (4, "in the free list, or one of no pool"),
        (-1, "in the free list, or one of no pool"),
        (2, "a block is in the free list twice"),
    ],
)
def test_check_scribbled_free_list_is_named(entry: int, message: str) -> None:
    pool = BlockPool(4)
    pool._free[0] = entry
    with pytest.raises(InvariantError, match=message):
        pool.check()
