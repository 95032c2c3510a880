"""Who may share with whom, and for how long: namespaces, purge and pins."""

from __future__ import annotations

import pytest
from core_helpers import blocks_of, cached, compute, copies_of, make_manager, start

from pagedkv.errors import OutOfBlocksError, StaleHandleError, UnknownHandleError

# Namespaces


def test_namespaces_never_share_though_tokens_and_blocks_are_the_same() -> None:
    manager = make_manager()
    seqs = [start(manager, list(range(9)), name) for name in ("", "a", "b")]
    tables = [blocks_of(manager, seq) for seq in seqs]
    assert len({block for table in tables for block in table}) == 9
    assert manager.statistics().num_hit_tokens == 0
    assert manager.statistics().num_deduplicated == 0
    opened = manager.open([list(range(9))], ["a"])
    assert opened.num_cached_tokens.tolist() == [8]
    assert blocks_of(manager, int(opened.seqs[0])) == tables[1][:2]
    assert cached(manager, list(range(9)), "never seen") == 0


def test_namespaces_in_one_step_are_not_deduplicated() -> None:
    manager = make_manager()
    opened = manager.open([[5] * 4, [5] * 4], ["a", "b"])
    manager.extend(opened.seqs, 4)
    manager.complete(opened.seqs)
    assert manager.statistics().num_deduplicated == 0
    assert manager.statistics().groups[0].num_shared == 0


def test_namespaces_unused_names_are_swept_and_used_ones_kept() -> None:
    manager = make_manager(9, max_seq_len=8)
    kept = start(manager, [1] * 4, "live")
    manager.release([start(manager, [2] * 4, "published")])
    for number in range(3000):
        manager.release(manager.open([[3]], [f"salt {number}"]).seqs)
        assert manager.statistics().num_namespaces <= 1024
    assert cached(manager, [2] * 4, "published") == 4
    assert cached(manager, [1] * 4, "live") == 4
    manager.append([kept], [1])
    compute(manager, kept)
    manager.check()


def test_purge_makes_one_namespace_unfindable_and_leaves_the_others() -> None:
    manager = make_manager()
    for name in ("a", "b"):
        manager.release([start(manager, list(range(8)), name)])
    assert manager.purge("a") == 2
    assert (cached(manager, list(range(8)), "a"), cached(manager, list(range(8)), "b")) == (0, 8)
    assert manager.statistics().groups[0].num_free == 14
    assert manager.purge("a") == 0
    assert manager.purge("never seen") == 0
    assert manager.statistics().num_namespaces == 1
    manager.check()


def test_namespaces_are_named_as_long_as_anything_may_be_found_under_them() -> None:
    manager = make_manager()
    assert manager.namespaces == ()
    for name in ("", "a", "b"):
        start(manager, list(range(9)), name)
    assert manager.namespaces == ("", "a", "b")
    manager.purge("a")
    assert manager.namespaces == ("", "b")
    assert make_manager(enable_prefix_caching=False).namespaces == ()


def test_purge_counts_the_blocks_of_every_group() -> None:
    manager = make_manager([9, 9])
    start(manager, list(range(8)))
    assert manager.purge() == 4


def test_purge_while_sequences_live_lets_them_go_on_without_publishing() -> None:
    manager = make_manager()
    seq, other = start(manager, list(range(8)), "a"), start(manager, list(range(8)), "b")
    pin, _ = manager.pin(list(range(8)), "a")
    assert manager.purge("a") == 2
    for token in range(8, 17):
        manager.append([seq, other], [token, token])
        manager.extend([seq, other], 1)
        manager.complete([seq, other])
        manager.check()
    assert (cached(manager, list(range(16)), "a"), cached(manager, list(range(16)), "b")) == (0, 16)
    fresh = start(manager, list(range(8)), "a")
    assert cached(manager, list(range(8)), "a") == 8
    assert not set(blocks_of(manager, fresh)) & set(blocks_of(manager, seq))
    manager.unpin(pin)
    manager.release([seq, other, fresh])
    manager.check()


@pytest.mark.parametrize("num_blocks", [17, [17, 17]], ids=str)
def test_distrust_forgets_the_chain_and_what_continues_it_and_nothing_else(num_blocks: int | list[int]) -> None:
    manager = make_manager(num_blocks)
    bad = start(manager, list(range(9)))
    sharer = start(manager, [*range(8), *range(50, 55)])
    other = start(manager, list(range(20, 28)))
    elsewhere = start(manager, list(range(8)), "a")
    assert manager.distrust([bad]) == 3 * manager.num_groups
    manager.check()
    assert [cached(manager, list(range(8)), name) for name in ("", "a")] == [0, 8]
    assert cached(manager, [*range(8), *range(50, 54)]) == 0
    assert cached(manager, list(range(20, 28))) == 8
    for token in range(100, 104):
        manager.append([sharer, other], [token, token])
        manager.extend([sharer, other], 1)
        manager.complete([sharer, other])
        manager.check()
    assert cached(manager, [*range(8), *range(50, 55), 100, 101, 102]) == 0, "who has read doubtful blocks publishes no more"
    assert cached(manager, [*range(20, 28), *range(100, 104)]) == 12
    manager.release([bad, sharer, other, elsewhere])
    assert cached(manager, list(range(8))) == 0
    fresh = start(manager, list(range(8)))
    assert cached(manager, list(range(8))) == 8
    assert manager.distrust([fresh]) == 2 * manager.num_groups
    assert manager.distrust([fresh]) == 0


@pytest.mark.parametrize("known", [2, 6, 13])
def test_distrust_leaves_a_sequence_that_holds_nothing_doubtful_as_it_was(known: int) -> None:
    manager = make_manager([17, 17])
    bad = start(manager, list(range(9)))
    other = start(manager, list(range(20, 20 + known)))
    manager.distrust([bad])
    for token in range(20 + known, 36):
        manager.append([other], [token])
        compute(manager, other)
        manager.check()
    assert cached(manager, list(range(20, 36))) == 16


@pytest.mark.parametrize("shared", [4, 8, 12])
def test_distrust_stops_whoever_shares_any_number_of_doubtful_blocks(shared: int) -> None:
    manager = make_manager()
    bad = start(manager, list(range(13)))
    sharer = start(manager, [*range(shared), 50])
    manager.distrust([bad])
    manager.check()
    for token in range(51, 64 - shared + 4):
        manager.append([sharer], [token])
        compute(manager, sharer)
        manager.check()
    assert manager.statistics().groups[0].num_cached == 0
    assert start(manager, [*range(shared), 50]) != sharer
    assert cached(manager, [*range(shared), 50]) == shared


def test_purge_while_a_step_is_out_keeps_its_blocks_unfindable() -> None:
    manager = make_manager()
    (seq,) = manager.open([list(range(8))], ["a"]).seqs.tolist()
    manager.extend([seq], [8])
    manager.purge("a")
    manager.complete([seq])
    assert cached(manager, list(range(8)), "a") == 0
    manager.check()


def test_purge_then_truncate_then_write_needs_no_copy() -> None:
    manager = make_manager()
    seq = start(manager, list(range(8)))
    manager.purge()
    manager.truncate([seq], [6])
    manager.append([seq], [99])
    assert copies_of(manager, [seq]) == []


# Pins


def test_pin_holds_a_prefix_that_would_be_evicted() -> None:
    manager = make_manager(5, max_seq_len=16)
    manager.release([start(manager, list(range(9)))])
    pin, num_tokens = manager.pin(list(range(9)))
    assert num_tokens == 8
    assert manager.num_available_blocks == 2
    (seq,) = manager.open([[9] * 12]).seqs.tolist()
    with pytest.raises(OutOfBlocksError, match="needs 3 blocks, 2 are available"):
        manager.extend([seq], [12])
    assert cached(manager, list(range(9))) == 8
    manager.unpin(pin)
    manager.extend([seq], [12])
    manager.check()


def test_pin_of_nothing_is_a_pin_all_the_same() -> None:
    manager = make_manager()
    pin, num_tokens = manager.pin([1, 2, 3])
    assert num_tokens == 0
    assert manager.statistics().num_pins == 1
    manager.unpin(pin)


def test_pin_holds_the_prefix_of_its_own_namespace() -> None:
    manager = make_manager(6, max_seq_len=20)
    for name in ("a", ""):
        manager.release([start(manager, list(range(8)), name)])
    pin, num_tokens = manager.pin(list(range(8)), "a")
    assert num_tokens == 8
    assert manager.num_held_blocks(manager.match(list(range(8)), "a")) == 2
    start(manager, [9] * 12)
    assert (cached(manager, list(range(8)), "a"), cached(manager, list(range(8)))) == (8, 0)
    manager.unpin(pin)
    manager.check()


def test_pin_twice_holds_twice() -> None:
    manager = make_manager()
    manager.release([start(manager, list(range(8)))])
    first, second = manager.pin(list(range(8)))[0], manager.pin(list(range(8)))[0]
    assert first != second
    manager.unpin(first)
    assert manager.statistics().groups[0].num_in_use == 2
    manager.unpin(second)
    assert manager.statistics().groups[0].num_evictable == 2
    manager.check()


def test_unpin_twice_or_what_never_was_is_refused() -> None:
    manager = make_manager()
    pin, _ = manager.pin([1])
    manager.unpin(pin)
    with pytest.raises(StaleHandleError, match=f"pin {pin} was released"):
        manager.unpin(pin)
    for never in (0, -1, pin + 1):
        with pytest.raises(UnknownHandleError, match=f"pin {never} was never issued"):
            manager.unpin(never)
