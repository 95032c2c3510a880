"""Exact lookup of published blocks, and the names of namespaces."""

from __future__ import annotations

import numpy as np
import pytest
from core_helpers import ids

from pagedkv.core import PrefixCache
from pagedkv.core.prefix_cache import Namespaces
from pagedkv.errors import InvariantError, UnknownHandleError

ROOT = -1


def chain_cache() -> PrefixCache:
    """Blocks 1-2-3 hold tokens 0..5, two each."""
    cache = PrefixCache(9, block_size=2)
    cache.publish_chain(ROOT, np.arange(6, dtype=np.int32).reshape(3, 2), ids(1, 2, 3), ROOT)
    return cache


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), []),
        ((0,), []),
        ((0, 1), [1]),
        ((0, 1, 2), [1]),
        ((0, 1, 2, 3), [1, 2]),
        ((0, 1, 2, 9), [1]),
        ((2, 3), []),
        (range(9), [1, 2, 3]),
    ],
)
def test_match_returns_the_longest_chain_of_whole_blocks(tokens: tuple[int, ...], expected: list[int]) -> None:
    assert chain_cache().match(ROOT, ids(*tokens)) == expected


def test_match_in_another_namespace_finds_nothing() -> None:
    assert chain_cache().match(-2, ids(0, 1)) == []


def test_match_changes_nothing() -> None:
    cache = chain_cache()
    cache.match(ROOT, ids(7, 7, 7, 7))
    assert len(cache) == 3
    cache.check()


def test_publish_chain_of_known_content_names_the_older_blocks() -> None:
    cache = chain_cache()
    contents = np.array([[0, 1], [2, 3], [8, 8]], dtype=np.int32)
    assert cache.publish_chain(ROOT, contents, ids(4, 5, 6), ROOT).tolist() == [1, 2, 6]
    assert cache.match(ROOT, ids(0, 1, 2, 3, 8, 8)) == [1, 2, 6]
    assert cache.match(ROOT, ids(0, 1, 2, 3, 4, 5)) == [1, 2, 3]
    cache.check()


def test_publish_behind_a_parent_continues_the_chain() -> None:
    cache = chain_cache()
    holders = cache.publish([3, ROOT], np.array([[6, 7], [9, 9]], dtype=np.int32), [4, 5], [ROOT, ROOT])
    assert holders == [4, 5]
    assert cache.match(ROOT, ids(*range(8))) == [1, 2, 3, 4]
    assert cache.match(ROOT, ids(9, 9)) == [5]
    cache.check()


def test_publish_same_content_twice_in_one_call_keeps_one() -> None:
    cache = PrefixCache(9, block_size=2)
    holders = cache.publish([ROOT, ROOT], np.array([[1, 1], [1, 1]], dtype=np.int32), [3, 4], [ROOT, ROOT])
    assert holders == [3, 3]
    assert len(cache) == 1
    cache.check()


def test_publish_same_block_again_changes_nothing() -> None:
    cache = chain_cache()
    assert cache.publish([ROOT], np.array([[0, 1]], dtype=np.int32), [1], [ROOT]) == [1]
    assert cache.publish_chain(1, np.array([[2, 3]], dtype=np.int32), ids(2), ROOT).tolist() == [2]
    assert len(cache) == 3
    cache.check()


def test_publish_same_tokens_in_two_namespaces_keeps_both() -> None:
    cache = chain_cache()
    cache.publish_chain(-2, np.array([[0, 1]], dtype=np.int32), ids(7), -2)
    assert cache.match(-2, ids(0, 1)) == [7]
    assert cache.match(ROOT, ids(0, 1)) == [1]
    assert (cache.blocks_of(ROOT).tolist(), cache.blocks_of(-2).tolist()) == ([1, 2, 3], [7])
    assert sorted(cache.live_roots().tolist()) == [-2, -1]
    cache.check()


def test_match_token_that_looks_like_a_parent_is_not_confused() -> None:
    """A key is a parent and tokens, of fixed width: no shift of one into the other may match."""
    cache = PrefixCache(9, block_size=1)
    cache.publish_chain(ROOT, np.array([[2], [1]], dtype=np.int32), ids(1, 2), ROOT)
    assert cache.match(ROOT, ids(2, 1)) == [1, 2]
    assert cache.match(ROOT, ids(1, 2)) == []
    assert cache.match(ROOT, ids(2, 2)) == [1]


def test_remove_leaf_keeps_the_rest() -> None:
    cache = chain_cache()
    cache.remove(ids(3))
    assert cache.match(ROOT, ids(*range(6))) == [1, 2]
    cache.check()


def test_remove_leaves_and_parents_together_in_any_order() -> None:
    cache = chain_cache()
    cache.remove(ids(1, 3, 2))
    assert len(cache) == 0
    assert cache.live_roots().tolist() == []
    cache.check()


def test_remove_parent_before_its_children_is_refused_and_changes_nothing() -> None:
    cache = chain_cache()
    with pytest.raises(InvariantError, match="block 2 is to go before blocks that continue it"):
        cache.remove(ids(2))
    assert cache.match(ROOT, ids(*range(6))) == [1, 2, 3]
    cache.check()


def test_remove_unpublished_block_is_refused_and_changes_nothing() -> None:
    cache = chain_cache()
    with pytest.raises(InvariantError, match=r"^prefix cache: only a published block can be removed, and only once$"):
        cache.remove(ids(3, 4))
    assert cache.match(ROOT, ids(*range(6))) == [1, 2, 3]
    cache.check()


def test_remove_refused_beside_another_chain_counts_the_children_as_before() -> None:
    cache = chain_cache()
    cache.publish([ROOT, 1, 1], np.array([[8, 8], [8, 9], [9, 9]], dtype=np.int32), [4, 5, 6], [ROOT] * 3)
    with pytest.raises(InvariantError, match=r"^prefix cache: block 1 is to go before blocks that continue it; .* pop leaves first$"):
        cache.remove(ids(5, 6, 1, 4))
    cache.check()
    cache.remove(ids(5, 6, 3, 2, 1, 4))
    assert len(cache) == 0
    cache.check()


def test_continuations_of_a_branching_chain_are_all_of_its_branches() -> None:
    cache = PrefixCache(12, block_size=1)
    tree = {1: ROOT, 2: 1, 3: 2, 4: 1, 5: 4, 6: 5, 7: ROOT, 8: 7}
    for block, parent in tree.items():
        cache.publish([parent], np.array([[block]], dtype=np.int32), [block], [ROOT])
    found = cache.continuations_of(ids(1))
    assert (found.tolist(), found.dtype) == ([1, 2, 3, 4, 5, 6], np.int32)
    assert cache.continuations_of(ids(8, 4)).tolist() == [4, 5, 6, 8]
    assert cache.continuations_of(ids()).tolist() == []


def test_ids_that_the_cache_gives_out_are_int32() -> None:
    cache = chain_cache()
    holders = cache.publish_chain(ROOT, np.array([[5, 5]], dtype=np.int32), ids(4), ROOT)
    assert {holders.dtype, cache.blocks_of(ROOT).dtype, cache.live_roots().dtype} == {np.dtype(np.int32)}


def test_remove_null_block_is_refused_as_one_that_can_never_be_published() -> None:
    cache = chain_cache()
    with pytest.raises(UnknownHandleError, match="block 0 is not one of 1 to 8"):
        cache.remove(ids(3, 0))
    assert cache.match(ROOT, ids(*range(6))) == [1, 2, 3]


def test_remove_then_publish_other_content_finds_only_the_new() -> None:
    cache = chain_cache()
    cache.remove(ids(3))
    cache.publish([ROOT], np.array([[4, 5]], dtype=np.int32), [3], [ROOT])
    assert cache.match(ROOT, ids(*range(6))) == [1, 2]
    assert cache.match(ROOT, ids(4, 5)) == [3]


# What follows writes into the cache's memory, as no call can: ``check`` is there for bugs.


def test_check_foreign_key_is_named() -> None:
    cache = chain_cache()
    cache._keys[2] = cache._keys[3]
    with pytest.raises(InvariantError, match="block 2 is found by a key that it does not carry"):
        cache.check()


def test_check_block_that_outlived_its_parent_is_named() -> None:
    cache = chain_cache()
    del cache._blocks[cache._keys[2] or b""]
    cache._keys[2] = None
    with pytest.raises(InvariantError, match="block 3 outlived its parent 2"):
        cache.check()


def test_check_block_in_another_namespace_than_its_parent_is_named() -> None:
    cache = chain_cache()
    cache._roots[2] = -7
    with pytest.raises(InvariantError, match="block 2 is in another namespace"):
        cache.check()


def test_check_wrong_count_of_children_is_named() -> None:
    cache = chain_cache()
    cache._num_children[3] = 1
    with pytest.raises(InvariantError, match=r"^prefix cache: a block's count of children is wrong$"):
        cache.check()


@pytest.mark.parametrize("column", ["_keys", "_roots"])
def test_check_key_or_namespace_without_being_findable_is_named(column: str) -> None:
    cache = chain_cache()
    getattr(cache, column)[8] = b"key" if column == "_keys" else ROOT
    with pytest.raises(InvariantError, match=r"^prefix cache: a block carries a key or a namespace without being findable$"):
        cache.check()


def test_intern_gives_each_name_its_own_negative_root_once() -> None:
    names = Namespaces()
    assert names.find("a") is None
    roots = [names.intern(name) for name in ("a", "b", "a")]
    assert roots[0] == roots[2] != roots[1]
    assert max(roots) < 0
    assert names.find("b") == roots[1]
    assert len(names) == 2


def test_forget_then_intern_gives_a_fresh_root() -> None:
    names = Namespaces()
    old = names.intern("a")
    names.forget("a")
    names.forget("never known")
    assert names.find("a") is None
    assert names.intern("a") != old


def test_sweep_keeps_the_used_and_never_gives_a_root_again() -> None:
    names = Namespaces()
    roots = {names.intern(str(number)) for number in range(1023)}
    assert not names.crowded
    roots.add(names.intern("one more"))
    assert names.crowded
    kept = {names.intern("7")}
    names.sweep(kept)
    assert len(names) == 1
    assert not names.crowded
    assert names.find("7") in kept
    assert names.intern("8") not in roots
    for number in range(1021):
        names.intern(f"later {number}")
    assert not names.crowded
    names.intern("the 1024th")
    assert names.crowded


def test_sweep_with_everything_used_waits_until_it_is_twice_as_crowded() -> None:
    names = Namespaces()
    roots = {names.intern(str(number)) for number in range(1024)}
    names.sweep(roots)
    assert len(names) == 1024
    assert not names.crowded
    for number in range(1024, 2048):
        names.intern(str(number))
    assert names.crowded


def test_intern_when_all_roots_are_used_up_is_refused() -> None:
    names = Namespaces()
    names._next = -(2**31 - 1)  # as if so many had been made
    assert names.intern("the last") == -(2**31 - 1)
    with pytest.raises(InvariantError, match=r"^no more namespaces can be told apart; make a new manager$"):
        names.intern("one too many")
    assert names.intern("the last") == -(2**31 - 1)
