"""Sharing of blocks: prefixes, duplicates, forks and copy-on-write, eviction."""

from __future__ import annotations

import pytest
from core_helpers import blocks_of, cached, compute, copies_of, make_manager, start

from pagedkv.errors import InvalidRequestError, OutOfBlocksError

# Duplicates


def test_complete_same_content_twice_keeps_one_block() -> None:
    manager = make_manager()
    opened = manager.open([list(range(9)), list(range(9))])
    manager.extend(opened.seqs, 9)
    manager.complete(opened.seqs)
    first, second = opened.seqs.tolist()
    assert blocks_of(manager, first)[:2] == blocks_of(manager, second)[:2]
    assert blocks_of(manager, first)[2] != blocks_of(manager, second)[2]
    assert manager.statistics().num_deduplicated == 2
    assert manager.statistics().groups[0].num_in_use == 4
    manager.check()


def test_complete_content_that_is_cached_already_points_at_it() -> None:
    manager = make_manager()
    manager.release([start(manager, list(range(8)))])
    (seq,) = manager.open([list(range(8))], use_cache=False).seqs.tolist()
    compute(manager, seq)
    assert blocks_of(manager, seq) == [1, 2]
    assert manager.statistics().num_deduplicated == 2
    manager.check()


def test_complete_duplicates_while_decoding_meet_in_one_block() -> None:
    manager = make_manager()
    opened = manager.open([[1], [1]])
    for _ in range(8):
        manager.extend(opened.seqs, 1)
        manager.complete(opened.seqs, [1, 1])
    first, second = opened.seqs.tolist()
    assert blocks_of(manager, first) == blocks_of(manager, second)
    assert manager.statistics().groups[0].num_shared == 2
    manager.check()


def test_complete_mixture_of_single_blocks_and_chains_publishes_all() -> None:
    manager = make_manager()
    opened = manager.open([list(range(4)), list(range(100, 112))])
    manager.extend(opened.seqs, [4, 12])
    manager.complete(opened.seqs)
    assert cached(manager, list(range(4))) == 4
    assert cached(manager, list(range(100, 112))) == 12
    manager.check()


def test_complete_second_block_beside_a_first_block_publishes_both() -> None:
    manager = make_manager()
    seq = start(manager, list(range(4)), next_token=4)
    (other,) = manager.open([[7] * 4]).seqs.tolist()
    for _ in range(3):
        manager.extend([seq], 1)
        manager.complete([seq], [4])
    manager.extend([seq, other], [1, 4])
    manager.complete([seq, other])
    assert cached(manager, [0, 1, 2, 3, 4, 4, 4, 4]) == 8
    assert cached(manager, [7] * 4) == 4


def test_match_in_groups_of_different_memory_is_as_long_as_the_shortest() -> None:
    manager = make_manager([6, 12], max_seq_len=20)
    manager.release([start(manager, list(range(12)))])
    seq = start(manager, [50] * 15)  # takes 4 of 5 blocks of group 0, which evicts from it alone
    evicted = [group.num_evicted for group in manager.statistics().groups]
    assert evicted == [2, 0]
    assert cached(manager, list(range(12))) == 4
    match = manager.match(list(range(12)))
    assert [len(ids) for ids in match.block_ids] == [1, 1]
    assert manager.num_held_blocks(match) == 0
    manager.release([seq])
    (again,) = manager.open([list(range(13))]).seqs.tolist()
    assert manager.num_held_blocks(manager.match(list(range(12)))) == 1
    compute(manager, again)
    assert cached(manager, list(range(12))) == 12
    manager.check()


# Forks and copy-on-write


def test_fork_shares_all_blocks_and_allocates_none() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    children = manager.fork(seq, 2).tolist()
    assert {tuple(blocks_of(manager, each)) for each in [seq, *children]} == {(1, 2)}
    assert manager.num_available_blocks == 14
    assert manager.num_exclusive_blocks([seq]) == 0
    assert manager.num_exclusive_blocks([seq, *children]) == 2
    manager.check()


def test_fork_write_into_shared_tail_copies_it_and_the_last_writer_keeps_it() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    one, two = manager.fork(seq, 2).tolist()
    for each in (seq, one, two):
        manager.append([each], [6])
    assert copies_of(manager, [one]) == [[2, 3]]
    assert copies_of(manager, [seq]) == [[2, 4]]
    assert copies_of(manager, [two]) == []
    assert [blocks_of(manager, each) for each in (seq, one, two)] == [[1, 4], [1, 3], [1, 2]]


def test_fork_all_write_in_one_step_the_last_keeps_the_block() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([seq, child], [6, 7])
    assert manager.num_blocks_needed([seq, child], 1) == 1
    assert copies_of(manager, [child, seq]) == [[2, 3]]
    assert blocks_of(manager, seq) == [1, 2]
    assert manager.statistics().num_copies == 1


def test_fork_of_a_full_tail_needs_no_copy() -> None:
    manager = make_manager()
    seq = start(manager, list(range(8)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([seq, child], [8, 9])
    assert copies_of(manager, [seq, child]) == []
    assert [blocks_of(manager, each) for each in (seq, child)] == [[1, 2, 3], [1, 2, 4]]


def test_fork_of_a_fork_copies_once_for_each_writer_but_the_last() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([child], [6])
    assert copies_of(manager, [child]) == [[2, 3]]
    (grandchild,) = manager.fork(child, 1).tolist()
    manager.append([child, grandchild, seq], [7, 8, 6])
    assert copies_of(manager, [grandchild, child, seq]) == [[3, 4]]
    assert [blocks_of(manager, each) for each in (seq, child, grandchild)] == [[1, 2], [1, 3], [1, 4]]


def test_fork_write_without_room_for_the_copy_changes_nothing() -> None:
    manager = make_manager(3, max_seq_len=8)
    seq = start(manager, list(range(6)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([seq, child], [6, 7])
    before = manager.snapshot()
    for seqs in ([seq], [child], [seq, child]):
        with pytest.raises(OutOfBlocksError, match="needs 1 blocks, 0 are available"):
            manager.extend(seqs, 1)
        with pytest.raises(OutOfBlocksError):
            manager.extend(seqs, [1] * len(seqs))
    assert manager.snapshot() == before
    manager.release([child])
    assert copies_of(manager, [seq]) == []


def test_fork_in_several_groups_copies_in_each() -> None:
    manager = make_manager([9, 9])
    seq = start(manager, list(range(6)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([child], [6])
    assert copies_of(manager, [child]) == [[2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("count", "message"), [(0, "fork count is 0"), (-1, "fork count is -1"), (4, "4 forks need 4 sequences and 3 are left")]
)
def test_fork_count_that_cannot_be_is_refused(count: int, message: str) -> None:
    manager = make_manager()
    seq = start(manager, [1])
    before = manager.snapshot()
    with pytest.raises(InvalidRequestError, match=message):
        manager.fork(seq, count)
    assert manager.snapshot() == before


def test_fork_with_reserved_slots_is_refused() -> None:
    manager = make_manager()
    seq = start(manager, [1], next_token=2)
    manager.extend([seq], 1)
    with pytest.raises(InvalidRequestError, match="has reserved slots"):
        manager.fork(seq, 1)
    manager.cancel([seq])
    assert len(manager.fork(seq, 1)) == 1


def test_cancel_after_a_copy_counts_the_copied_tokens_as_not_computed() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([child], [6])
    assert manager.extend([child], 1).copies[0].tolist() == [[2, 3]]
    manager.cancel([child])
    (snapshot,) = (each for each in manager.snapshot().sequences if each.seq == child)
    assert (snapshot.num_computed_tokens, snapshot.block_tables) == (4, ((1,),))
    assert manager.extend([child], [3]).positions.tolist() == [4, 5, 6]
    manager.complete([child])
    manager.check()


def test_cancel_of_one_with_a_copy_leaves_the_copy_of_the_other() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    one, two = manager.fork(seq, 2).tolist()
    manager.append([one, two], [6, 6])
    manager.extend([one, two], 1)
    manager.cancel([one])
    manager.complete([two])
    computed = {each.seq: each.num_computed_tokens for each in manager.snapshot().sequences}
    assert (computed[one], computed[two]) == (4, 7)
    manager.check()


def test_cancel_of_one_with_a_copy_and_then_of_the_other_counts_both_as_not_computed() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    one, two = manager.fork(seq, 2).tolist()
    manager.append([one, two], [6, 6])
    manager.extend([one, two], 1)
    manager.cancel([one])
    manager.cancel([two])
    assert [each.num_computed_tokens for each in manager.snapshot().sequences] == [6, 4, 4]
    manager.check()


def test_cancel_of_a_later_step_keeps_what_was_computed_with_a_copy() -> None:
    manager = make_manager()
    seq = start(manager, list(range(5)))
    (child,) = manager.fork(seq, 1).tolist()
    for token in (5, 6):
        manager.append([child], [token])
        manager.extend([child], 1)
        if token == 5:
            manager.complete([child])
    manager.cancel([child])
    assert [each.num_computed_tokens for each in manager.snapshot().sequences] == [5, 6]
    manager.check()


def test_copies_are_counted_over_all_steps() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    children = manager.fork(seq, 3).tolist()
    for number, child in enumerate(children, start=1):
        manager.append([child], [6])
        copies_of(manager, [child])
        assert manager.statistics().num_copies == number


def test_truncate_to_a_block_edge_leaves_no_shared_tail_to_look_at() -> None:
    manager = make_manager()
    seq = start(manager, list(range(9)))
    manager.truncate([seq], [8])
    assert not manager.table.some_tail_shared
    manager.append([seq], [8])
    assert copies_of(manager, [seq]) == []


def test_truncate_after_a_copy_counts_the_copied_tokens_as_not_computed() -> None:
    manager = make_manager()
    seq = start(manager, list(range(6)))
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([child], [6])
    manager.extend([child], 1)
    manager.truncate([child], [6])
    (snapshot,) = (each for each in manager.snapshot().sequences if each.seq == child)
    assert (snapshot.num_tokens, snapshot.num_computed_tokens) == (6, 4)
    manager.check()


def test_truncate_inside_a_published_block_copies_before_the_next_write() -> None:
    manager = make_manager()
    seq = start(manager, list(range(8)))
    manager.truncate([seq], [6])
    manager.append([seq], [99])
    assert copies_of(manager, [seq]) == [[2, 3]]
    assert cached(manager, list(range(8))) == 8
    assert manager.statistics().groups[0].num_evictable == 1
    manager.append([seq], [98])
    assert copies_of(manager, [seq]) == []
    assert cached(manager, [0, 1, 2, 3, 4, 5, 99, 98]) == 8


def test_truncate_and_write_the_same_again_returns_to_the_published_block() -> None:
    manager = make_manager()
    seq = start(manager, list(range(8)))
    manager.truncate([seq], [7])
    manager.append([seq], [7])
    assert copies_of(manager, [seq]) == [[2, 3]]
    assert blocks_of(manager, seq) == [1, 2]
    assert manager.statistics().groups[0].num_free == 14


# Eviction


@pytest.mark.parametrize(("num_evicted", "found"), [(0, 12), (1, 8), (2, 4), (3, 0)])
def test_eviction_takes_leaves_before_what_they_continue(num_evicted: int, found: int) -> None:
    manager = make_manager(6, max_seq_len=20)
    manager.release([start(manager, list(range(12)))])
    start(manager, [90] * (8 + 4 * num_evicted))
    assert manager.statistics().groups[0].num_evicted == num_evicted
    assert cached(manager, list(range(12))) == found
    manager.check()


def test_eviction_takes_the_least_recently_released_sequence_first() -> None:
    manager = make_manager(5, max_seq_len=16)
    old, new = start(manager, [1] * 8), start(manager, [2] * 8)
    manager.release([old])
    manager.release([new])
    start(manager, [3] * 4)
    assert (cached(manager, [1] * 8), cached(manager, [2] * 8)) == (4, 8)


def test_eviction_spares_what_was_used_again() -> None:
    manager = make_manager(5, max_seq_len=16)
    for token in (1, 2):
        manager.release([start(manager, [token] * 8)])
    manager.release(manager.open([[1] * 9]).seqs)
    start(manager, [3] * 4)
    assert (cached(manager, [1] * 8), cached(manager, [2] * 8)) == (8, 4)


def test_eviction_of_two_tails_leaves_their_common_beginning() -> None:
    manager = make_manager(4, max_seq_len=12)
    one = start(manager, [1] * 4 + [2] * 4)
    two = start(manager, [1] * 4 + [3] * 4)
    manager.release([one, two])
    start(manager, [9] * 8)
    assert cached(manager, [1] * 4 + [2] * 4) == 4
    manager.check()


def test_evicted_block_is_never_found_by_its_old_tokens() -> None:
    manager = make_manager(3, max_seq_len=8)
    manager.release([start(manager, [1] * 8)])
    seq = start(manager, [2] * 8)
    assert cached(manager, [1] * 8) == 0
    assert cached(manager, [2] * 8) == 8
    assert blocks_of(manager, seq) == [2, 1]
