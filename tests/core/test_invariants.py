"""Every invariant that the audit's list numbers, broken alone: the audit says which one it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from core_helpers import make_manager, start

from pagedkv.core import BlockPool, KVCacheManager, PrefixCache, Window, auditing
from pagedkv.errors import InvariantError

FULL, HALF, OTHER_HALF, CHAIN, FREE = 1, 2, 4, (5, 6), 9  # blocks of the scene
DEAD_ROW = 3


def scene() -> KVCacheManager:
    """Three sequences of six, six and eight tokens in blocks of four, and what a fourth one has left in the cache."""
    manager = make_manager()
    for tokens in ([1] * 6, [2] * 6, [3] * 8):
        start(manager, tokens)
    manager.release([start(manager, [4] * 5)])
    manager.check()
    return manager


def windowed_scene() -> KVCacheManager:
    """A sequence of three full blocks, all but the first inside a window of two blocks and one position, and one block more."""
    manager = make_manager(windows=[None, Window.sliding(9)])
    for tokens in ([1] * 12, [2] * 4):
        start(manager, tokens)
    manager.check()
    return manager


# What follows writes where no call can: the audit is there for bugs.


def pool(damage: Callable[[BlockPool], object]) -> Callable[[KVCacheManager], object]:
    return lambda manager: damage(manager._groups[0].pool)


def cache(damage: Callable[[PrefixCache], object]) -> Callable[[KVCacheManager], object]:
    return lambda manager: damage(manager._groups[0].cache)


def column(name: str, row: int, value: int) -> Callable[[KVCacheManager], object]:
    return lambda manager: getattr(manager.table, name).__setitem__(row, value)


def cell(row: int, place: int, block: int) -> Callable[[KVCacheManager], object]:
    return lambda manager: manager.table.block_tables.__setitem__((0, row, place), block)


def take_a_policy_entry(pool: BlockPool) -> None:
    policy: Any = pool._policy
    policy._size += 1


def lose_a_free_block(pool: BlockPool) -> None:
    pool._num_free -= 1


def forget_a_parent(cache: PrefixCache) -> None:
    cache._blocks.pop(cache._keys[CHAIN[0]] or b"")
    cache._keys[CHAIN[0]] = None


def mark_another_block(pool: BlockPool) -> None:
    pool._cached[[FULL, HALF]] = False, True


def crossing(name: str, index: int, value: int) -> Callable[[KVCacheManager], object]:
    return lambda manager: getattr(manager._groups[1].cache, name).__setitem__(index, value)


def lose_the_leading_block(manager: KVCacheManager) -> None:
    leader: Any = manager._groups[0]
    followers, leader.followers = leader.followers, []
    leader.forget(np.array([4], dtype=np.int32))
    leader.followers = followers
    manager.table.num_published[1] = 0


def swap_two_blocks(manager: KVCacheManager) -> None:
    tables = manager.table.block_tables[1, 0]
    tables[1], tables[2] = tables[2], tables[1]


BREAKS: dict[int, tuple[Callable[[KVCacheManager], object], str]] = {
    1: (pool(lambda pool: pool._references.__setitem__(FULL, -1)), "block pool: a reference count is negative"),
    2: (pool(lambda pool: pool._cached.__setitem__(0, True)), "block pool: the null block is held or cached"),
    3: (pool(lambda pool: pool._free.__setitem__(0, 99)), "block pool: the null block is in the free list, or one of no pool"),
    4: (pool(lambda pool: pool._free.__setitem__(0, pool._free[1])), "block pool: a block is in the free list twice"),
    5: (pool(lambda pool: pool._references.__setitem__(FREE, 1)), "block pool: a free block is held"),
    6: (pool(lambda pool: pool._cached.__setitem__(FREE, True)), "block pool: a free block is cached"),
    7: (pool(take_a_policy_entry), "block pool: 1 blocks are evictable, the policy holds 2"),
    8: (pool(lose_a_free_block), "block pool: free, evictable and held blocks do not sum to the pool"),
    9: (cache(lambda cache: cache._keys.__setitem__(FULL, b"key")), "prefix cache: block 1 is found by a key that it does not carry"),
    10: (cache(forget_a_parent), "prefix cache: block 6 outlived its parent 5"),
    11: (cache(lambda cache: cache._roots.__setitem__(CHAIN[1], -7)), "prefix cache: block 6 is in another namespace than its parent"),
    12: (cache(lambda cache: cache._num_children.__setitem__(FULL, 1)), "prefix cache: a block's count of children is wrong"),
    13: (
        cache(lambda cache: cache._keys.__setitem__(FREE, b"key")),
        "prefix cache: a block carries a key or a namespace without being findable",
    ),
    14: (
        pool(lambda pool: pool._cached.__setitem__(FULL, False)),
        "layer group: the pool and the prefix cache disagree on how many blocks are cached",
    ),
    15: (pool(mark_another_block), "layer group: a findable block is not marked as cached"),
    16: (column("num_tokens", DEAD_ROW, 1), "manager: a row without a sequence is not empty"),
    17: (lambda manager: manager.table._free.pop(), "manager: free rows and live rows do not sum to all rows"),
    18: (column("num_computed", 0, 7), "manager: row 0: computed 7, reserved 6 and known 6 tokens are out of order"),
    19: (column("num_blocks", 0, 3), "manager: row 0: 3 blocks for 6 reserved tokens"),
    20: (column("num_published", 0, 2), "manager: row 0: 2 blocks published of 1 full ones"),
    21: (cell(0, 5, FREE), "manager: row 0: the null block and the table's 2 blocks are mixed up"),
    22: (cell(0, 0, OTHER_HALF), "manager: row 0: a block counted as published is not findable"),
    23: (column("roots", 0, -99), "manager: row 0: a published block belongs to another namespace"),
    24: (cell(0, 1, FULL), "manager: row 0: its writable block 1 is shared or findable"),
    25: (cell(0, 1, 99), "manager: tables name the blocks 1 to 99, the pool ends with 16"),
    26: (cell(0, 1, OTHER_HALF), "manager: block 2 has 1 references and 0 mentions"),
    27: (crossing("_leading", 2, 9), "window cache: block 2 is found by block 2, which it does not belong to"),
    28: (crossing("_leading", 9, 9), "window cache: a block belongs to one that it is not found by"),
    29: (lose_the_leading_block, "window cache: a block belongs to one of the first group that is not findable"),
    30: (swap_two_blocks, "manager: row 0: a published block belongs to another one than the row's in the first group"),
}
WINDOWED = (27, 28, 29, 30)


@pytest.mark.parametrize("number", BREAKS)
def test_broken_invariant_is_the_one_that_is_named(number: int) -> None:
    damage, message = BREAKS[number]
    manager = windowed_scene() if number in WINDOWED else scene()
    damage(manager)
    with pytest.raises(InvariantError, match=f"^{re.escape(message)}$"):
        manager.check()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cell(0, 1, 17), "manager: tables name the blocks 1 to 17, the pool ends with 16"),
        (pool(lambda pool: pool._free.__setitem__(0, 17)), "block pool: the null block is in the free list, or one of no pool"),
    ],
    ids=["table", "free list"],
)
def test_first_id_behind_the_pool_is_named(damage: Callable[[KVCacheManager], object], message: str) -> None:
    manager = scene()
    damage(manager)
    with pytest.raises(InvariantError, match=f"^{message}$"):
        manager.check()


def test_every_numbered_invariant_is_broken_by_a_test() -> None:
    numbers = [int(number) for number in re.findall(r"^ *(\d+)\. ", auditing.check.__doc__ or "", re.MULTILINE)]
    assert numbers == list(BREAKS) == list(range(1, len(BREAKS) + 1))
