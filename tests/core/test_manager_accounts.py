"""What a manager says about itself, and that its audit names whatever is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from core_helpers import ids, make_manager, start

from pagedkv.core import CacheStatistics, KVCacheManager, SequenceTable
from pagedkv.errors import InvariantError


def test_statistics_classes_of_blocks_sum_to_the_pool() -> None:
    manager = make_manager([17, 20])
    manager.release([start(manager, list(range(8)))])
    seq = start(manager, list(range(6)))
    manager.fork(seq, 1)
    account = manager.statistics()
    for group in account.groups:
        assert group.num_free + group.num_evictable + group.num_in_use == group.num_blocks
        assert (group.num_in_use, group.num_evictable, group.num_shared, group.num_cached) == (2, 1, 2, 2)
    assert (account.block_size, account.num_seqs, account.num_pins, account.num_namespaces) == (4, 2, 0, 1)
    assert (account.num_reserved_tokens, account.num_reserved_slots) == (12, 16)
    assert account.waste == pytest.approx(0.25)


def test_statistics_waste_of_an_empty_manager_is_none() -> None:
    assert make_manager().statistics().waste == 0.0


def test_statistics_are_frozen() -> None:
    account: CacheStatistics = make_manager().statistics()
    with pytest.raises(FrozenInstanceError):
        account.num_seqs = 3  # type: ignore[misc]


def test_snapshot_is_a_copy_that_prints() -> None:
    manager = make_manager([9, 9])
    seq = start(manager, list(range(5)), next_token=9)
    before = manager.snapshot()
    (sequence,) = before.sequences
    assert before.statistics == manager.statistics()
    assert sequence.slots(1) == (4, 5, 6, 7, 8)
    assert str(sequence) == "\n".join(
        [
            f"sequence {seq}: 6 tokens, 5 computed, 1 blocks public",
            "  group 0, 2 blocks of 4: 1 2",
            "  group 1, 2 blocks of 4: 1 2",
        ]
    )
    manager.extend([seq], 1)
    assert manager.snapshot() != before
    manager.cancel([seq])
    assert manager.snapshot() == before
    assert before.references == (((1, 1), (2, 1)), ((1, 1), (2, 1)))


def test_num_exclusive_blocks_counts_what_nobody_else_holds() -> None:
    manager = make_manager()
    one = start(manager, [1] * 6)
    two = start(manager, [1] * 4 + [2] * 6)
    assert manager.num_exclusive_blocks([one]) == 1
    assert manager.num_exclusive_blocks([two]) == 2
    assert manager.num_exclusive_blocks([one, two]) == 4
    manager.pin([1] * 4)
    assert manager.num_exclusive_blocks([one, two]) == 3
    assert manager.num_exclusive_blocks([]) == 0


def test_free_block_ids_are_those_nobody_can_read() -> None:
    manager = make_manager(7, max_seq_len=16)
    manager.release([start(manager, list(range(5)))])
    start(manager, [9, 9])
    (free,) = manager.free_block_ids()
    assert free.dtype == np.int32
    cached_block = manager.match(list(range(4))).block_ids[0][0]
    held = [block for block, _ in manager.snapshot().references[0]]
    assert sorted([*free.tolist(), cached_block, *held]) == list(range(1, 7))


# What follows writes into the table, which says "to read, never to write": ``check`` is there for bugs.

Damage = Callable[[SequenceTable], None]


def _set(column: str, row: int, value: int) -> Damage:
    return lambda table: getattr(table, column).__setitem__(row, value)


def _set_block(row: int, place: int, value: int) -> Damage:
    return lambda table: table.block_tables.__setitem__((0, row, place), value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set("num_tokens", 3, 1), "a row without a sequence is not empty"),
        (_set_block(3, 0, 1), "a row without a sequence is not empty"),
        (_set("num_computed", 0, 7), "row 0: computed 7, reserved 6 and known 6 tokens are out of order"),
        (_set("num_tokens", 0, 5), "row 0: computed 6, reserved 6 and known 5 tokens are out of order"),
        (_set("num_blocks", 0, 3), "row 0: 3 blocks for 6 reserved tokens"),
        (_set("num_published", 0, 2), "row 0: 2 blocks published of 1 full ones"),
        (_set_block(0, 5, 9), "row 0: the null block and the table's 2 blocks are mixed up"),
        (_set_block(0, 1, 0), "row 0: the null block and the table's 2 blocks are mixed up"),
        (_set_block(0, 0, 9), "row 0: a block counted as published is not findable"),
        (_set("roots", 0, -99), "row 0: a published block belongs to another namespace"),
        (_set_block(0, 1, 1), "row 0: its writable block 1 is shared or findable"),
        (_set_block(0, 1, 99), "tables name the blocks 1 to 99, the pool ends with 16"),
        (_set_block(0, 1, -1), "tables name the blocks -1 to"),
        (_set_block(1, 1, 9), "block 4 has 1 references and 0 mentions"),
    ],
)
def test_check_damaged_table_is_named(damage: Damage, message: str) -> None:
    manager = make_manager()
    for tokens in ([1] * 6, [2] * 6, [3] * 8):
        start(manager, tokens)
    manager.fork(int(manager.snapshot().sequences[1].seq), 1)
    manager.release([manager.snapshot().sequences[3].seq])
    manager.check()
    damage(manager.table)
    with pytest.raises(InvariantError, match=f"^manager: {message}"):
        manager.check()


def test_check_lost_row_is_named() -> None:
    manager = make_manager()
    start(manager, [1])
    manager.table._free.pop()
    with pytest.raises(InvariantError, match=r"^manager: free rows and live rows do not sum to all rows$"):
        manager.check()


def test_check_lost_pin_is_named() -> None:
    manager = make_manager()
    manager.release([start(manager, [1] * 4)])
    pin, _ = manager.pin([1] * 4)
    held = manager._pins.pop(pin)
    with pytest.raises(InvariantError, match=f"block {held[0][0]} has 1 references and 0 mentions"):
        manager.check()


def test_check_looks_into_every_group() -> None:
    manager: KVCacheManager = make_manager([9, 9])
    seq = start(manager, [1] * 6)
    manager.check()
    manager.table.block_tables[1, 0, 1] = 7
    with pytest.raises(InvariantError):
        manager.check()
    manager.table.block_tables[1, 0, 1] = 2
    manager.release([seq])
    assert manager.rows_of(ids()).tolist() == []
