"""Groups with a window give back the blocks behind it, and still find whatever they can serve."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from core_helpers import blocks_of, cached, compute, copies_of, ids, make_manager, start

from pagedkv.core import KVCacheManager, Window
from pagedkv.core.matching import servable_blocks
from pagedkv.core.window import WindowKind
from pagedkv.core.window_cache import WindowCache
from pagedkv.errors import InvalidRequestError, InvariantError, OutOfBlocksError

SLIDING = Window.sliding(8)  # of blocks of 4: two full ones, since the last position of the third is just out of sight


def manager_of(*windows: Window, num_blocks: int | list[int] = 17, **options: object) -> KVCacheManager:
    return make_manager(num_blocks, windows=[None, *windows], check="audit", **options)


def seen(window: Window, position: int) -> range:
    """The positions that one sees, by the definition."""
    first = max(0, position - window.size + 1) if window.kind == "sliding" else position // window.size * window.size
    return range(first, position + 1)


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_window_dead_blocks_are_those_that_no_later_position_sees(kind: WindowKind) -> None:
    for size, block_size in product(range(1, 14), range(1, 6)):
        window = Window(kind, size)
        found = window.num_dead_blocks(np.arange(12, dtype=np.int32), block_size)
        assert found.dtype == np.int32
        for num_full in range(12):
            position = num_full * block_size
            dead = seen(window, position)[0] // block_size
            assert window.num_dead_blocks(num_full, block_size) == found[num_full] == dead, f"{window}, {num_full} blocks of {block_size}"
            assert num_full - dead + 1 <= window.most_blocks(block_size)
            assert all(seen(window, later)[0] >= dead * block_size for later in range(position, position + 3 * size))


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_window_most_blocks_is_what_the_worst_length_needs(kind: WindowKind) -> None:
    for size, block_size in product(range(1, 14), range(1, 6)):
        window = Window(kind, size)
        worst = max(num_full - window.num_dead_blocks(num_full, block_size) + 1 for num_full in range(3 * size))
        spare = 1 if kind == "chunked" and size % block_size else 0  # a chunk that ends inside a block counts as one that lies at its worst
        assert worst <= window.most_blocks(block_size) <= worst + spare, f"{window}, blocks of {block_size}"


def test_complete_gives_back_the_blocks_behind_the_window() -> None:
    manager = manager_of(SLIDING, enable_prefix_caching=False)
    seq = start(manager, [7] * 14)
    assert blocks_of(manager, seq) == [1, 2, 3, 4]
    assert blocks_of(manager, seq, 1) == [0, 2, 3, 4]
    assert manager.available_blocks == (12, 13)
    assert manager.statistics().groups[1].num_in_use == 3


def test_decodes_of_a_frozen_array_give_back_as_they_go() -> None:
    manager = manager_of(SLIDING, num_blocks=[33, 4], max_num_seqs=1)
    seqs = manager.open([[7]]).seqs
    seqs.setflags(write=False)
    for step in range(100):
        manager.extend(seqs, 1)
        manager.complete(seqs, np.array([step], dtype=np.int32))
    assert len(blocks_of(manager, int(seqs[0]))) == 25
    assert [block > 0 for block in blocks_of(manager, int(seqs[0]), 1)] == [False] * 23 + [True] * 2
    assert manager.statistics().groups[1].num_evicted > 0


def test_decodes_without_prefix_caching_give_back_as_they_go() -> None:
    manager = manager_of(Window.chunked(8), num_blocks=[33, 3], max_num_seqs=1, enable_prefix_caching=False)
    seqs = manager.open([[7]]).seqs
    seqs.setflags(write=False)
    for step in range(100):
        manager.extend(seqs, 1)
        manager.complete(seqs, np.array([step], dtype=np.int32))
    assert [block > 0 for block in blocks_of(manager, int(seqs[0]), 1)] == [False] * 24 + [True]


def test_undone_step_keeps_what_has_to_be_read_again() -> None:
    manager = manager_of(SLIDING)
    seq = start(manager, [7] * 14, next_token=8)
    manager.extend([seq], 1)
    manager.cancel([seq])
    assert blocks_of(manager, seq, 1)[1:] == [2, 3, 4]


def test_match_needs_only_what_is_inside_the_window_at_its_end() -> None:
    manager = manager_of(SLIDING, num_blocks=[33, 9])
    prompt = list(range(20))
    manager.release([start(manager, prompt)])
    match = manager.match(prompt)
    assert match.num_tokens == 20
    assert [len(blocks) for blocks in match.block_ids] == [5, 2]
    (seq,) = manager.open([[*prompt, 99]]).seqs.tolist()
    assert [block > 0 for block in blocks_of(manager, seq, 1)] == [False, False, False, True, True]
    assert manager.num_held_blocks(match) == 2
    assert manager.held_blocks(match) == (5, 2)
    compute(manager, seq)


def test_match_falls_back_to_the_longest_prefix_whose_window_is_cached() -> None:
    manager = manager_of(SLIDING, num_blocks=[33, 9])
    prompt = list(range(32))
    manager.release([start(manager, prompt)])
    assert [cached(manager, prompt[:end]) for end in (4, 8, 12, 32)] == [4, 8, 12, 32]
    start(manager, [90] * 8)  # evicts the two that were given back first: the first of the prompt
    assert [cached(manager, prompt[:end]) for end in (4, 8, 12, 16, 32)] == [0, 0, 0, 16, 32]


def test_several_windows_must_all_serve_a_match() -> None:
    a_window, another = Window.sliding(5), Window.sliding(9)
    assert servable_blocks(5, [(a_window, [1, 1, 1, 1, 1]), (another, [1, 1, 1, 1, 1])], 4) == 5
    assert servable_blocks(5, [(a_window, [1, 1, 1, 1, 1]), (another, [1, 1, 1, 0, 1])], 4) == 3
    assert servable_blocks(5, [(a_window, [1, 1, 0, 1, 1]), (another, [1, 1, 1, 0, 1])], 4) == 2
    assert servable_blocks(5, [(another, [0, 1, 1, 1, 1]), (a_window, [1, 1, 1, 1, 0])], 4) == 4
    assert servable_blocks(5, [(another, [0, 1, 0, 1, 0]), (a_window, [1, 1, 1, 1, 1])], 4) == 0


@pytest.mark.parametrize("seed", range(20))
def test_servable_prefix_is_the_longest_by_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length, size = int(rng.integers(1, 12)), int(rng.integers(1, 4))
    kinds: list[WindowKind] = ["sliding", "chunked", "sliding"]
    found = [(Window(kind, int(rng.integers(1, 12))), (rng.random(length) < 0.8).astype(int).tolist()) for kind in kinds]
    tried = [end for end in range(length + 1) if all(all(blocks[window.num_dead_blocks(end, size) : end]) for window, blocks in found)]
    assert servable_blocks(length, found, size) == tried[-1], f"seed {seed}"


def test_evicted_leading_block_takes_what_belongs_to_it_along() -> None:
    manager = manager_of(SLIDING, num_blocks=[5, 17])
    manager.release([start(manager, [1] * 16)])
    assert manager.statistics().groups[1].num_cached == 4
    start(manager, [2] * 12)
    groups = manager.statistics().groups
    assert (groups[0].num_cached, groups[1].num_cached) == (4, 4)
    assert (groups[0].num_evicted, groups[1].num_evicted) == (3, 0)
    assert cached(manager, [1] * 16) == 4


def test_twin_of_a_cached_prefix_fills_what_the_window_had_lost() -> None:
    manager = manager_of(SLIDING, num_blocks=[33, 6], max_seq_len=64)
    prompt = list(range(16))
    manager.release([start(manager, prompt)])
    manager.release([start(manager, [90] * 16)])
    assert cached(manager, prompt) == 0
    seq = int(manager.open([[*prompt, 1]], use_cache=False).seqs[0])
    manager.extend([seq], 17)
    manager.complete([seq])
    assert cached(manager, prompt) == 16
    assert manager.statistics().num_deduplicated == 4


def test_two_twins_of_one_step_share_in_the_windowed_group_too() -> None:
    manager = manager_of(SLIDING)
    seqs = manager.open([[5] * 8, [5] * 8], use_cache=False).seqs
    manager.extend(seqs, 8)
    manager.complete(seqs)
    assert blocks_of(manager, int(seqs[0]), 1) == blocks_of(manager, int(seqs[1]), 1)
    single = manager.open([[6] * 4, [6] * 4], use_cache=False).seqs
    manager.extend(single, 4)
    manager.complete(single)
    assert blocks_of(manager, int(single[0]), 1) == blocks_of(manager, int(single[1]), 1)
    assert manager.statistics().num_deduplicated == 6


def test_fork_shares_what_is_inside_the_window_and_copies_the_tail_in_every_group() -> None:
    manager = manager_of(SLIDING)
    seq = start(manager, [7] * 14, next_token=8)
    (child,) = manager.fork(seq, 1).tolist()
    manager.append([child], [9])
    assert manager.statistics().groups[1].num_shared == 3
    assert blocks_of(manager, child, 1) == blocks_of(manager, seq, 1)
    assert len(copies_of(manager, [seq, child])) == 2
    assert manager.num_exclusive_blocks([seq]) == 1
    manager.release([seq, child])
    assert [group.num_in_use for group in manager.statistics().groups] == [0, 0]


def test_truncate_goes_back_as_far_as_nothing_is_gone() -> None:
    manager = manager_of(SLIDING)
    seq = start(manager, [7] * 15)
    with pytest.raises(InvalidRequestError, match="blocks behind a window would be needed again"):
        manager.truncate([seq], [11])
    manager.truncate([seq], [13])
    manager.truncate([seq], [12])
    assert blocks_of(manager, seq, 1) == [0, 2, 3]
    short = start(manager, [8] * 8)
    manager.truncate([short], [2])
    assert blocks_of(manager, short, 1) == blocks_of(manager, short, 1)[:1]


def test_larger_window_keeps_what_truncate_shall_take_back() -> None:
    manager = manager_of(Window.sliding(8 + 4))
    seq = start(manager, [7] * 15)
    manager.truncate([seq], [11])
    assert len(blocks_of(manager, seq, 1)) == 3


def test_pin_holds_the_window_at_the_end_of_its_prefix() -> None:
    manager = manager_of(SLIDING, num_blocks=[33, 5])
    prompt = list(range(16))
    manager.release([start(manager, prompt)])
    pin, num_tokens = manager.pin(prompt)
    assert num_tokens == 16
    assert manager.available_blocks == (28, 2)
    manager.release([start(manager, [1] * 8)])
    assert cached(manager, prompt) == 16
    manager.unpin(pin)
    assert manager.available_blocks == (32, 4)


def test_purge_and_distrust_reach_windowed_groups() -> None:
    manager = manager_of(SLIDING)
    seq = start(manager, [1] * 12, "a")
    start(manager, [2] * 12, "b")
    assert manager.purge("a") == 6
    assert manager.statistics().groups[1].num_cached == 3
    assert manager.distrust([seq]) == 0
    other = start(manager, [*[2] * 8, 3], "b")
    assert manager.distrust([other]) == 6
    assert [group.num_cached for group in manager.statistics().groups] == [0, 0]


def test_extend_is_refused_for_the_group_that_has_too_few() -> None:
    manager = manager_of(SLIDING, num_blocks=[33, 4])
    seq = int(manager.open([[7] * 20]).seqs[0])
    with pytest.raises(OutOfBlocksError, match="needs 5 blocks, 3 are available"):
        manager.extend([seq], 20)
    for count in (12, 4, 4):
        manager.extend([seq], [count])
        manager.complete([seq])
    assert manager.usable_blocks == (32, 3)
    assert manager.max_seq_len == 128


def test_namespaces_are_swept_with_windowed_groups() -> None:
    manager = manager_of(SLIDING, max_num_seqs=1)
    manager.release([start(manager, [1] * 8, "kept")])
    for number in range(1100):
        manager.release(manager.open([[1]], [str(number)]).seqs)
    assert manager.statistics().num_namespaces < 1024
    assert cached(manager, [1] * 8, "kept") == 8


def test_window_cache_refuses_to_forget_what_it_does_not_find() -> None:
    cache = WindowCache(4, num_leading=8)
    assert cache.publish([5, 5, 6], [1, 2, 3]) == [1, 1, 3]
    for wrong in (ids(2), ids(1, 1)):
        with pytest.raises(InvariantError, match=r"^window cache: only a published block can be removed, and only once$"):
            cache.remove(wrong)
    cache.remove(ids(1))
    assert (len(cache), cache.find_all([5, 6]), cache.published(), cache.leading()) == (1, [0, 3], {3}, {6})
    cache.check()
