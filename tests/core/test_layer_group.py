"""A layer group keeps its pool and its prefix cache in step."""

from __future__ import annotations

import numpy as np
import pytest
from core_helpers import ids

from pagedkv.core.layer_group import LayerGroup
from pagedkv.errors import InvariantError, OutOfBlocksError

ROOT = -1


def published(group: LayerGroup, tokens: list[int]) -> int:
    """Take a block, publish it as a chain of its own and let go of it."""
    block = group.take(1)
    group.settle(block, group.cache.publish_chain(ROOT, np.array([tokens], dtype=np.int32), block, ROOT))
    group.pool.release(block)
    return int(block[0])


def test_take_evicted_block_is_not_findable_any_more() -> None:
    group = LayerGroup(3, block_size=2)
    first, second = published(group, [1, 1]), published(group, [2, 2])
    assert group.take(1).tolist() == [first]
    assert group.num_evicted == 1
    assert group.cache.match(ROOT, ids(1, 1)) == []
    assert group.cache.match(ROOT, ids(2, 2)) == [second]
    group.check()


def test_take_more_than_available_leaves_the_cache_alone() -> None:
    group = LayerGroup(3, block_size=2)
    published(group, [1, 1])
    with pytest.raises(OutOfBlocksError):
        group.take(3)
    assert group.cache.match(ROOT, ids(1, 1)) == [1]
    group.check()


def test_settle_duplicate_moves_the_reference_to_the_older_block() -> None:
    group = LayerGroup(5, block_size=2)
    older = published(group, [1, 1])
    block = group.take(1)
    holders = group.cache.publish_chain(ROOT, np.array([[1, 1]], dtype=np.int32), block, ROOT)
    assert group.settle(block, holders) == 1
    assert holders.tolist() == [older]
    assert group.held_blocks() == ((older, 1),)
    group.check()


def test_settle_block_that_is_cached_already_changes_nothing() -> None:
    group = LayerGroup(5, block_size=2)
    block = group.take(1)
    holders = group.cache.publish_chain(ROOT, np.array([[1, 1]], dtype=np.int32), block, ROOT)
    assert group.settle(block, holders) == 0
    assert group.settle(block, holders) == 0
    group.check()


def test_publish_of_duplicates_alone_moves_their_references_to_the_older_block() -> None:
    group = LayerGroup(5, block_size=2)
    older = published(group, [1, 1])
    twins = group.take(2).tolist()  # as many as are findable before and after it
    assert group.publish([ROOT] * 2, np.ones((2, 2), dtype=np.int32), twins, [ROOT] * 2) == [older, older]
    assert group.held_blocks() == ((older, 2),)
    group.check()


def test_forget_makes_idle_blocks_free_and_unfindable() -> None:
    group = LayerGroup(5, block_size=2)
    block = published(group, [1, 1])
    group.forget(ids(block))
    assert group.cache.match(ROOT, ids(1, 1)) == []
    assert group.pool.num_free == 4
    group.check()


def test_accounts_sum_to_the_pool() -> None:
    group = LayerGroup(6, block_size=2)
    published(group, [1, 1])
    held = group.take(2)
    group.pool.acquire(held[:1])
    account = group.statistics()
    assert (account.num_blocks, account.num_free, account.num_evictable, account.num_in_use) == (5, 2, 1, 2)
    assert (account.num_shared, account.num_cached, account.num_evicted) == (1, 1, 0)
    assert group.held_blocks() == ((int(held[0]), 2), (int(held[1]), 1))
    assert group.free_blocks().tolist() == [4, 5]


def test_check_pool_and_cache_that_disagree_in_number_are_named() -> None:
    group = LayerGroup(4, block_size=2)
    group.pool.mark_cached(group.take(1))
    with pytest.raises(InvariantError, match=r"^layer group: the pool and the prefix cache disagree on how many blocks are cached$"):
        group.check()


def test_check_pool_and_cache_that_name_other_blocks_are_named() -> None:
    group = LayerGroup(4, block_size=2)
    blocks = group.take(2)
    group.pool.mark_cached(blocks[:1])
    group.cache.publish_chain(ROOT, np.array([[1, 1]], dtype=np.int32), blocks[1:], ROOT)
    with pytest.raises(InvariantError, match=r"^layer group: a findable block is not marked as cached$"):
        group.check()
