"""Handles, rows and growing columns of ``SequenceTable``."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv.core import SequenceTable
from pagedkv.errors import InvalidRequestError, StaleHandleError, UnknownHandleError


def make_table(max_num_seqs: int = 4, *, max_blocks: int = 64) -> SequenceTable:
    return SequenceTable(max_num_seqs, num_groups=2, block_size=4, max_blocks=max_blocks)


def test_table_fresh_is_empty() -> None:
    table = make_table()
    assert (table.max_num_seqs, table.num_free_rows, table.max_tokens) == (4, 4, 256)
    assert table.live_rows.tolist() == []
    assert table.block_tables.shape == (2, 4, 16)
    assert table.token_ids.shape == (4, 64)
    assert (table.some_tail_shared, table.some_copy_pending) == (False, False)


@pytest.mark.parametrize("num_tokens", [1, 256])
def test_table_holds_the_types_it_promises_also_when_it_has_grown(num_tokens: int) -> None:
    table = make_table()
    table.ensure_columns(num_tokens)
    for numbers in (table.block_tables, table.token_ids, *table.flat_block_tables, table.flat_token_ids, table.token_blocks):
        assert numbers.dtype == np.int32
    for column in (table.num_tokens, table.num_reserved, table.num_computed, table.num_blocks, table.num_published, table.roots):
        assert column.dtype == np.int32
    assert (table.tail_shared.dtype, table.copy_pending.dtype) == (np.bool_, np.bool_)
    rows, handles = table.open_rows(2)
    for taken in (rows, handles, table.rows_of(handles), table.live_rows):
        assert taken.dtype == np.int64


def test_open_rows_gives_lowest_rows_and_distinct_handles() -> None:
    table = make_table()
    rows, handles = table.open_rows(3)
    assert rows.tolist() == [0, 1, 2]
    assert len(set(handles.tolist())) == 3
    assert table.rows_of(handles[::-1]).tolist() == [2, 1, 0]
    assert table.handles_of(rows).tolist() == handles.tolist()
    assert table.live_rows.tolist() == [0, 1, 2]
    assert table.num_free_rows == 1


def test_open_rows_gives_rows_that_were_closed_together_in_the_same_order() -> None:
    table = make_table()
    rows, _ = table.open_rows(4)
    table.close_rows(rows[[2, 0, 3]])
    assert table.open_rows(3)[0].tolist() == [2, 0, 3]


def test_rows_of_no_handles_is_empty() -> None:
    assert make_table().rows_of(np.zeros(0, dtype=np.int64)).tolist() == []


def test_close_rows_makes_handles_stale_and_rows_new() -> None:
    table = make_table()
    rows, old = table.open_rows(2)
    table.num_tokens[rows] = 7
    table.mark_tails_shared(rows)
    table.mark_copies(rows)
    table.close_rows(rows)
    with pytest.raises(StaleHandleError, match=rf"handle {old[0]} was released \(row 0, generation 1\)"):
        table.rows_of(old[:1])
    again, new = table.open_rows(2)
    assert sorted(again.tolist()) == sorted(rows.tolist())
    assert not set(new.tolist()) & set(old.tolist())
    for column in (table.num_tokens, table.tail_shared, table.copy_pending):
        assert not column.any()
    with pytest.raises(StaleHandleError):
        table.rows_of(np.array([new[0], old[1]]))


@pytest.mark.parametrize("forged", [0, -1, 1, 4, 99, (1 << 32) + 2, (2 << 32), (5 << 32) + 1, (1 << 32) + 4, -(1 << 40)])
def test_rows_of_forged_handle_is_refused(forged: int) -> None:
    table = make_table()
    _, handles = table.open_rows(2)
    with pytest.raises(UnknownHandleError, match=f"handle {forged} was never issued"):
        table.rows_of(np.array([handles[0], forged], dtype=np.int64))


@pytest.mark.parametrize("forged", [0, 1, (1 << 32) + 1, (7 << 32) + 99])
def test_rows_of_forged_handle_in_a_table_of_one_row_is_refused(forged: int) -> None:
    with pytest.raises(UnknownHandleError, match=f"handle {forged} was never issued"):
        make_table(1).rows_of(np.array([forged], dtype=np.int64))


def test_rows_of_handle_zero_is_named_though_row_zero_is_empty() -> None:
    table = make_table()
    rows, handles = table.open_rows(2)
    table.close_rows(rows[:1])
    with pytest.raises(UnknownHandleError, match="handle 0 was never issued"):
        table.rows_of(np.array([handles[1], 0], dtype=np.int64))


def test_rows_of_empty_rows_current_generation_is_unknown_not_stale() -> None:
    table = make_table()
    rows, handles = table.open_rows(1)
    table.close_rows(rows)
    with pytest.raises(UnknownHandleError):
        table.rows_of(handles + (1 << 32))  # the generation that the next opening will give out


def test_rows_of_handle_given_twice_is_refused() -> None:
    table = make_table()
    _, handles = table.open_rows(2)
    with pytest.raises(InvalidRequestError, match=r"^a sequence is given twice in one call$"):
        table.rows_of(handles[[0, 1, 0]])


def frozen(handles: np.ndarray) -> np.ndarray:
    copy = handles.copy()
    copy.flags.writeable = False
    return copy


def test_rows_of_frozen_array_is_remembered_until_a_row_is_closed() -> None:
    table = make_table()
    rows, handles = table.open_rows(2)
    same = frozen(handles)
    assert table.rows_of(same) is table.rows_of(same)
    table.close_rows(rows[1:])
    with pytest.raises(StaleHandleError):
        table.rows_of(same)


def test_rows_of_frozen_view_whose_base_changes_follows_the_base() -> None:
    table = make_table()
    _, handles = table.open_rows(2)
    base = handles[:1].copy()
    view = base.view()
    view.flags.writeable = False
    assert table.rows_of(view).tolist() == [0]
    base[0] = handles[1]
    assert table.rows_of(view).tolist() == [1]


def test_tail_marks_are_remembered_until_the_last_is_gone() -> None:
    table = make_table()
    rows, _ = table.open_rows(3)
    table.mark_tails_shared(rows[:0])
    assert not table.some_tail_shared
    table.mark_tails_shared(rows[:2])
    table.unmark_tails(rows[:1])
    assert table.some_tail_shared
    assert table.tail_shared.tolist() == [False, True, False, False]
    table.unmark_tails(rows[1:])
    assert not table.some_tail_shared


def test_copy_marks_are_remembered_until_the_last_is_gone() -> None:
    table = make_table()
    rows, _ = table.open_rows(2)
    table.mark_copies(rows)
    table.clear_copies(rows[:1])
    assert table.some_copy_pending
    assert table.copy_pending.tolist() == [False, True, False, False]
    table.clear_copies(rows[1:])
    assert not table.some_copy_pending


@pytest.mark.parametrize(("num_tokens", "columns"), [(1, 16), (64, 16), (65, 32), (128, 32), (129, 33), (240, 60), (256, 64)])
def test_ensure_columns_doubles_up_to_the_limit(num_tokens: int, columns: int) -> None:
    table = make_table()
    table.block_tables[1, 2, 15] = 9
    table.token_ids[2, 63] = 8
    table.ensure_columns(num_tokens)
    assert table.block_tables.shape == (2, 4, columns)
    assert table.token_ids.shape == (4, 4 * columns)
    assert table.block_tables[1, 2, 15] == 9
    assert table.token_ids[2, 63] == 8
    assert table.block_tables.sum() == 9


def test_columns_never_exceed_the_longest_table() -> None:
    table = make_table(max_blocks=20)
    table.ensure_columns(65)
    assert table.block_tables.shape[2] == 20
    assert make_table(max_blocks=3).block_tables.shape[2] == 3


def test_snapshots_copy_live_rows_out() -> None:
    table = make_table()
    rows, handles = table.open_rows(2)
    row = int(rows[1])
    table.num_tokens[row], table.num_reserved[row], table.num_blocks[row] = 3, 2, 1
    table.token_ids[row, :3] = [5, 6, 7]
    table.block_tables[:, row, 0] = [8, 9]
    _, snapshot = table.snapshots()
    table.token_ids[row] = 0
    assert (snapshot.seq, snapshot.token_ids, snapshot.block_tables) == (handles[1], (5, 6, 7), ((8,), (9,)))
    assert (snapshot.slots(), snapshot.slots(1)) == ((32, 33), (36, 37))
