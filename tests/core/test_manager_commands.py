"""Each command of ``KVCacheManager`` on its own: what it returns, what it changes, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from core_helpers import blocks_of, cached, compute, make_manager, start

from pagedkv.core import LeastRecentlyUsed, Window
from pagedkv.errors import ConfigError, InvalidRequestError, OutOfBlocksError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"num_blocks": []}, "num_blocks is empty"),
        ({"num_blocks": 1}, "num_blocks is 1"),
        ({"num_blocks": [9, 1]}, "num_blocks is 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_seq_len": -5}, "max_seq_len is -5"),
    ],
)
def test_manager_setting_that_cannot_work_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_manager(**{"num_blocks": 9, **options})  # type: ignore[arg-type]


def test_manager_questions_answer_for_a_fresh_one() -> None:
    manager = make_manager([9, 7], max_seq_len=20)
    assert (manager.block_size, manager.num_groups, manager.max_num_seqs, manager.num_free_seqs) == (4, 2, 4, 4)
    assert (manager.max_seq_len, manager.num_usable_blocks, manager.num_available_blocks) == (20, 6, 6)
    assert manager.prefix_caching
    assert [free.tolist() for free in manager.free_block_ids()] == [list(range(1, 9)), list(range(1, 7))]
    assert manager.rows_of([]).tolist() == []
    manager.check()


def test_manager_without_max_seq_len_takes_the_capacity() -> None:
    assert make_manager(9).max_seq_len == 32
    assert make_manager(9, max_seq_len=1000).max_seq_len == 32


def test_manager_evicts_in_each_pool_by_a_policy_made_for_it() -> None:
    made: dict[int, LeastRecentlyUsed] = {}

    def policy(num_blocks: int) -> LeastRecentlyUsed:
        assert num_blocks not in made
        made[num_blocks] = LeastRecentlyUsed(num_blocks)
        return made[num_blocks]

    manager = make_manager([5, 9, 7], windows=[None, None, Window.sliding(4)], policy=policy)
    assert list(made) == [5, 9, 7]
    manager.release([start(manager, [1] * 8)])
    assert [len(order) for order in made.values()] == [2, 2, 2]


# open


def test_open_new_prompt_allocates_nothing() -> None:
    manager = make_manager()
    opened = manager.open([[1, 2, 3], [4]])
    assert opened.num_cached_tokens.tolist() == [0, 0]
    assert (opened.seqs.dtype, opened.num_cached_tokens.dtype) == (np.int64, np.int32)
    assert manager.num_available_blocks == 16
    assert manager.num_free_seqs == 2
    assert manager.rows_of(opened.seqs).tolist() == [0, 1]


def test_open_no_prompts_opens_nothing() -> None:
    assert make_manager().open([]).seqs.tolist() == []


def test_open_accepts_arrays_of_any_integer_type() -> None:
    manager = make_manager()
    for dtype in (np.int8, np.uint16, np.int64, np.uint64):
        (seq,) = manager.open([np.array([1, 2], dtype=dtype)]).seqs.tolist()
        assert manager.snapshot().sequences[-1].token_ids == (1, 2)
        manager.release([seq])


@pytest.mark.parametrize(
    ("prompts", "namespaces", "message"),
    [
        ([[]], None, "^a prompt is empty: it needs at least one token$"),
        ([[1], []], None, "^a prompt is empty: it needs at least one token$"),
        ([[0] * 65], None, "a prompt has 65 tokens, max_seq_len is 64"),
        ([[-1]], None, "from 0 to 2\\*\\*31 - 1, got -1"),
        ([[2**31]], None, "got 2147483648"),
        ([[1.5]], None, "flat list of integers, got float64"),
        ([[True]], None, "flat list of integers, got bool"),
        ([["a"]], None, "flat list of integers"),
        ([[2**70]], None, "flat list of integers, got object"),
        ([[[1, 2]]], None, "of shape \\(1, 2\\)"),
        ([[[1], [1, 2]]], None, "flat list of integers"),
        ([[1]] * 5, None, "5 sequences were asked for and 4 are left"),
        ([[1], [2]], ["a"], "1 namespaces were given for 2 prompts"),
    ],
)
def test_open_what_cannot_be_opened_is_refused_whole(prompts: list[list[int]], namespaces: list[str] | None, message: str) -> None:
    manager = make_manager()
    before = manager.snapshot()
    with pytest.raises(InvalidRequestError, match=message):
        manager.open(prompts, namespaces)
    assert manager.snapshot() == before


def test_open_cached_prompt_leaves_the_last_token_to_compute() -> None:
    manager = make_manager()
    start(manager, list(range(8)))
    assert manager.open([list(range(8))]).num_cached_tokens.tolist() == [4]
    assert manager.open([list(range(9))]).num_cached_tokens.tolist() == [8]
    assert manager.statistics().num_hit_tokens == 12
    assert manager.statistics().num_query_tokens == 8 + 8 + 9


def test_open_without_cache_shares_and_counts_nothing() -> None:
    manager = make_manager()
    start(manager, list(range(8)))
    asked = manager.statistics().num_query_tokens
    assert manager.open([list(range(9))], use_cache=False).num_cached_tokens.tolist() == [0]
    assert manager.statistics().num_query_tokens == asked


def test_open_with_caching_off_shares_and_remembers_nothing() -> None:
    manager = make_manager(enable_prefix_caching=False)
    start(manager, list(range(8)), "a")
    assert not manager.prefix_caching
    assert cached(manager, list(range(8)), "a") == 0
    assert manager.open([list(range(9))], ["a"]).num_cached_tokens.tolist() == [0]
    assert manager.statistics().num_namespaces == 0
    assert manager.statistics().groups[0].num_cached == 0
    manager.check()


def test_open_two_prompts_that_share_a_cached_prefix_hold_it_twice() -> None:
    manager = make_manager()
    start(manager, list(range(9)))
    opened = manager.open([list(range(9)), list(range(6))])
    assert opened.num_cached_tokens.tolist() == [8, 4]
    assert dict(manager.snapshot().references[0]) == {1: 3, 2: 2, 3: 1}


# extend


def test_extend_returns_slots_in_the_order_asked() -> None:
    manager = make_manager()
    opened = manager.open([[1] * 6, [2] * 3])
    extension = manager.extend(opened.seqs[::-1], [3, 5])
    assert extension.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert extension.slot_mapping.tolist() == [[4, 5, 6, 8, 9, 10, 11, 12]]
    assert extension.slot_mapping.dtype == np.int64
    assert [copies.tolist() for copies in extension.copies] == [[]]
    more = manager.extend(opened.seqs[:1], 1)
    assert (more.slot_mapping.tolist(), more.positions.tolist()) == ([[13]], [5])


def test_extend_in_several_groups_gives_each_its_own_slots() -> None:
    manager = make_manager([9, 9])
    first, second = manager.open([[1] * 5, [2] * 5]).seqs.tolist()
    manager.extend([first], [5])
    assert manager.extend([second], [5]).slot_mapping.tolist() == [[12, 13, 14, 15, 16]] * 2


@pytest.mark.parametrize("count", [1, np.int32(1)])
def test_extend_one_at_a_time_equals_all_at_once(count: int) -> None:
    manager = make_manager()
    (seq,) = manager.open([[1] * 9]).seqs.tolist()
    slots = [manager.extend([seq], count if isinstance(count, int) else [count]).slot_mapping[0, 0] for _ in range(9)]
    assert slots == list(range(4, 13))
    manager.complete([seq])
    manager.check()


def test_extend_one_number_for_all_is_given_to_each() -> None:
    manager = make_manager()
    opened = manager.open([[1] * 6, [2] * 6])
    assert manager.extend(opened.seqs, 2).positions.tolist() == [0, 1, 0, 1]


def test_extend_nobody_reserves_nothing() -> None:
    manager = make_manager()
    assert manager.extend([], []).slot_mapping.shape == (1, 0)
    assert manager.extend([], 1).slot_mapping.shape == (1, 0)


@pytest.mark.parametrize("counts", [[0], [-1], [4], [2**31 - 1], [2**32 + 1], [-(2**40)], [1.0], [[1]], [1, 1], [], 4, 0, -3, 2**40, 2**70])
def test_extend_count_that_cannot_be_is_refused(counts: object) -> None:
    manager = make_manager()
    (seq,) = manager.open([[1, 2, 3, 4]]).seqs.tolist()
    manager.extend([seq], 1)
    before = manager.snapshot()
    with pytest.raises(InvalidRequestError):
        manager.extend([seq], counts)  # type: ignore[arg-type]
    assert manager.snapshot() == before


def test_extend_one_beyond_what_is_known_is_refused() -> None:
    manager = make_manager()
    opened = manager.open([[1], [2, 2]])
    manager.extend(opened.seqs, 1)
    with pytest.raises(InvalidRequestError, match=r"cannot reserve 1 tokens: .*\[0, 1\]"):
        manager.extend(opened.seqs, 1)
    with pytest.raises(InvalidRequestError, match=r"cannot reserve \[2\] tokens: .* unreserved, \[1\]$"):
        manager.extend(opened.seqs[1:], [2])


@pytest.mark.parametrize("num_blocks", [[4, 9], [9, 4]])
@pytest.mark.parametrize("counts", [16, [16]])
def test_extend_with_one_group_too_small_changes_no_group(num_blocks: list[int], counts: object) -> None:
    manager = make_manager(num_blocks)
    (seq,) = manager.open([[1] * 32]).seqs.tolist()
    before = manager.snapshot()
    with pytest.raises(OutOfBlocksError, match="needs 4 blocks, 3 are available") as raised:
        manager.extend([seq], counts)  # type: ignore[arg-type]
    assert (raised.value.needed, raised.value.available) == (4, 3)
    assert manager.snapshot() == before
    manager.check()


def test_extend_by_one_without_blocks_changes_nothing() -> None:
    manager = make_manager(2, max_seq_len=8, max_num_seqs=2)
    first, second = manager.open([[1] * 4, [2] * 4]).seqs.tolist()
    manager.extend([first], 1)
    before = manager.snapshot()
    with pytest.raises(OutOfBlocksError):
        manager.extend([first, second], 1)
    assert manager.snapshot() == before


def test_num_blocks_needed_is_what_extend_takes() -> None:
    manager = make_manager([17, 20])
    opened = manager.open([[1] * 6, [2] * 9])
    assert manager.num_blocks_needed(opened.seqs, [4, 9]) == 4
    manager.extend(opened.seqs, [4, 9])
    assert manager.num_available_blocks == 12
    assert manager.num_blocks_needed(opened.seqs[:1], 1) == 1
    with pytest.raises(InvalidRequestError):
        manager.num_blocks_needed(opened.seqs[:1], 3)
    assert manager.num_blocks_needed([], []) == 0


# complete and append


def test_complete_publishes_only_what_is_full() -> None:
    manager = make_manager()
    (seq,) = manager.open([list(range(9))]).seqs.tolist()
    for count, found in ((3, 0), (1, 4), (3, 4), (1, 8), (1, 8)):
        manager.extend([seq], [count])
        assert cached(manager, list(range(9))) <= found
        manager.complete([seq])
        assert cached(manager, list(range(9))) == found


def test_extend_alone_publishes_nothing() -> None:
    manager = make_manager()
    (seq,) = manager.open([list(range(8))]).seqs.tolist()
    manager.extend([seq], [8])
    assert cached(manager, list(range(8))) == 0
    manager.release([seq])
    assert manager.statistics().groups[0].num_free == 16


def test_complete_appends_next_tokens_but_not_where_there_is_none() -> None:
    manager = make_manager()
    opened = manager.open([[1], [2], [3]])
    manager.extend(opened.seqs, 1)
    manager.complete(opened.seqs, [7, -1, 9])
    assert [seq.token_ids for seq in manager.snapshot().sequences] == [(1, 7), (2,), (3, 9)]


def test_complete_without_reservation_changes_nothing_but_the_token() -> None:
    manager = make_manager()
    (seq,) = manager.open([[1]]).seqs.tolist()
    manager.complete([seq], [5])
    assert manager.snapshot().sequences[0].token_ids == (1, 5)
    manager.complete([], [])
    manager.complete([])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([-2], "token id -2 is below 0"),
        ([2**31], "32-bit"),
        ([2**32 + 5], "32-bit"),
        ([-(2**31) - 1], "32-bit"),
        ([1, 2], "^next_token_ids: expected 1 integers, one for each sequence, got 2$"),
        ([0.5], "flat list of integers"),
    ],
)
@pytest.mark.parametrize("command", ["complete", "append"])
def test_next_token_that_cannot_be_is_refused(command: str, tokens: list[int], message: str) -> None:
    manager = make_manager()
    (seq,) = manager.open([[1, 2, 3, 4]]).seqs.tolist()
    manager.extend([seq], [4])
    before = manager.snapshot()
    with pytest.raises(InvalidRequestError, match=message):
        getattr(manager, command)([seq], tokens)
    assert manager.snapshot() == before
    assert cached(manager, [1, 2, 3, 4]) == 0


@pytest.mark.parametrize("command", ["complete", "append"])
def test_next_token_beyond_max_seq_len_is_refused(command: str) -> None:
    manager = make_manager(max_seq_len=3)
    full, short = manager.open([[1, 2, 3], [4]]).seqs.tolist()
    manager.extend([full], [3])
    with pytest.raises(InvalidRequestError, match="reached max_seq_len, 3"):
        getattr(manager, command)([short, full], [0, 0])
    getattr(manager, command)([short, full], [0, -1])
    assert [seq.token_ids for seq in manager.snapshot().sequences] == [(1, 2, 3), (4, 0)]


def test_append_nothing_to_nobody_changes_nothing() -> None:
    manager = make_manager()
    before = manager.snapshot()
    manager.append([], [])
    assert manager.snapshot() == before


def test_append_beyond_the_first_columns_keeps_tables_and_tokens() -> None:
    manager = make_manager(40, block_size=1, max_num_seqs=2)
    prompt = list(range(15))
    seq = start(manager, prompt)
    for token in range(15, 39):
        manager.append([seq], [token])
        compute(manager, seq)
    assert manager.snapshot().sequences[0].token_ids == tuple(range(39))
    assert blocks_of(manager, seq) == list(range(1, 40))
    assert manager.table.block_tables.shape[2] == 39
    manager.check()


# cancel, truncate, release


def test_cancel_gives_back_what_was_reserved() -> None:
    manager = make_manager()
    seq = start(manager, [1, 2], next_token=3)
    before = manager.snapshot()
    manager.extend([seq], 1)
    manager.append([seq], [4])
    manager.extend([seq], 1)
    manager.append([seq], [5])
    manager.extend([seq], 1)
    manager.cancel([seq])
    assert manager.snapshot().sequences[0].block_tables == before.sequences[0].block_tables
    assert manager.snapshot().sequences[0].num_reserved_tokens == 2
    manager.cancel([seq])
    manager.cancel([])
    manager.check()


def test_truncate_forgets_tokens_and_gives_back_blocks() -> None:
    manager = make_manager()
    seq = start(manager, list(range(12)))
    manager.truncate([seq], [5])
    (snapshot,) = manager.snapshot().sequences
    assert (snapshot.num_tokens, snapshot.num_computed_tokens, snapshot.num_published_blocks) == (5, 5, 1)
    assert len(snapshot.block_tables[0]) == 2
    assert cached(manager, list(range(12))) == 12  # what was published stays findable
    manager.check()


def test_truncate_uncomputed_tokens_keeps_the_computed() -> None:
    manager = make_manager()
    (seq,) = manager.open([list(range(12))]).seqs.tolist()
    manager.extend([seq], [5])
    manager.complete([seq])
    manager.truncate([seq], [9])
    assert manager.snapshot().sequences[0].num_computed_tokens == 5
    manager.truncate([], [])


@pytest.mark.parametrize("length", [0, -1, 13, 2**32 + 1])
def test_truncate_to_a_length_that_cannot_be_is_refused(length: int) -> None:
    manager = make_manager()
    seq = start(manager, list(range(12)))
    before = manager.snapshot()
    message = rf"^cannot truncate to \[{length}\] tokens: each must be from 1 to what is known, \[12\]$"
    with pytest.raises(InvalidRequestError, match=message if length < 2**31 else "32-bit"):
        manager.truncate([seq], [length])
    assert manager.snapshot() == before


def test_truncate_to_what_is_known_changes_nothing() -> None:
    manager = make_manager()
    seq = start(manager, list(range(9)), next_token=9)
    before = manager.snapshot()
    manager.truncate([seq], [10])
    assert manager.snapshot() == before


def test_release_gives_back_unpublished_and_keeps_published_blocks() -> None:
    manager = make_manager()
    seq = start(manager, list(range(9)))
    manager.release([seq])
    (account,) = manager.statistics().groups
    assert (account.num_free, account.num_evictable, account.num_in_use) == (14, 2, 0)
    assert manager.num_free_seqs == 4
    manager.release([])
    manager.check()
