from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pagedkv.errors import ConfigError, InvalidRequestError
from pagedkv.storage import BatchBuilder
from pagedkv.testing.plans import make_plan


def test_build_mixed_step_has_the_documented_arrays() -> None:
    plan = make_plan([1, 3], [6, 3], block_tables=[[2, 5], [4]], block_size=4, token_ids=[9, 7, 8, 6])
    batch = BatchBuilder("cpu", 4).build(plan)
    assert batch.plan is plan
    assert batch.token_ids.tolist() == [9, 7, 8, 6]
    assert batch.positions.tolist() == [5, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [[21, 16, 17, 18]]
    assert [blocks.tolist() for blocks in batch.slot_blocks] == [[5, 4, 4, 4]]
    assert [offsets.tolist() for offsets in batch.slot_offsets] == [[1, 0, 1, 2]]
    assert batch.block_tables.tolist() == [[[2, 5], [4, 0]]]
    assert batch.seq_lens.tolist() == [6, 3]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4]
    assert batch.logits_indices.tolist() == [0, 3]
    assert batch.block_size == 4
    for name in ("token_ids", "positions", "slot_mapping", "logits_indices"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("block_tables", "seq_lens", "cu_seqlens_q"):
        assert getattr(batch, name).dtype == torch.int32


def test_build_wide_table_of_many_rows_copies_only_what_the_step_uses() -> None:
    plan = make_plan([1, 1], [6, 3], block_tables=[[2, 5], [4]], block_size=4)
    table = np.full((1, 50, 40), 99, dtype=np.int32)
    table[0, 30, :2], table[0, 7, :2] = [2, 5], [4, 0]
    table.flags.writeable = False
    batch = BatchBuilder("cpu", 4).build(replace(plan, rows=np.array([30, 7], dtype=np.int64), block_tables=table))
    assert batch.block_tables.tolist() == [[[2, 5], [4, 0]]]


def test_build_again_keeps_the_buffers() -> None:
    builder = BatchBuilder("cpu", 4)
    first = builder.build(make_plan([1, 3], [6, 3], block_tables=[[2, 5], [4]], block_size=4))
    address = first.token_ids.data_ptr()
    second = builder.build(make_plan([1], [5], block_tables=[[1, 3]], block_size=4, token_ids=[5]))
    assert second.token_ids.data_ptr() == address
    assert second.token_ids.tolist() == [5]
    lengths = [300] * 3
    third = builder.build(make_plan(lengths, lengths, block_tables=np.arange(1, 226).reshape(3, 75), block_size=4))
    assert third.slot_mapping.shape == (1, 900)
    assert third.slot_mapping[0].tolist() == list(range(4, 904))


def test_wanted_is_the_step_that_its_wanted_tokens_would_be_alone() -> None:
    builder = BatchBuilder("cpu", 4)
    tables = [[2, 5], [4], [6, 7]]
    plan = make_plan([1, 3, 2], [6, 3, 7], block_tables=tables, block_size=4, token_ids=[9, 7, 8, 6, 3, 1])
    wanted = builder.build(replace(plan, logits_indices=np.array([0, 5], dtype=np.int64))).wanted()
    expected = BatchBuilder("cpu", 4).build(make_plan([1, 1], [6, 7], block_tables=[tables[0], tables[2]], block_size=4, token_ids=[9, 1]))
    assert wanted is not None
    builder.build(plan)  # which writes over the buffers of the step before
    tensors = ("token_ids", "positions", "slot_mapping", "block_tables", "seq_lens", "cu_seqlens_q", "logits_indices")
    for ours, theirs in ((getattr(each, name) for each in (wanted, expected)) for name in tensors):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
    for each in ("query_lens", "seq_lens", "cu_seqlens_q", "token_ids", "positions", "slot_mapping", "logits_indices", "num_decodes"):
        assert np.array_equal(getattr(wanted.plan, each), getattr(expected.plan, each)), each
    assert [blocks.tolist() for blocks in wanted.slot_blocks] == [[5, 7]]
    assert [offsets.tolist() for offsets in wanted.slot_offsets] == [[1, 2]]


@pytest.mark.parametrize(("tokens", "is_step"), [([], True), ([3], True), ([0, 3], True), ([2], False), ([0, 1, 2, 3], False)])
def test_wanted_tokens_that_are_not_the_last_of_a_sequence_are_no_step(tokens: list[int], is_step: bool) -> None:
    plan = make_plan([1, 3], [6, 3], block_tables=[[2, 5], [4]], block_size=4)
    wanted = BatchBuilder("cpu", 4).build(replace(plan, logits_indices=np.array(tokens, dtype=np.int64))).wanted()
    assert (wanted is not None) == is_step
    assert wanted is None or wanted.plan.num_seqs == len(tokens)


def test_build_two_groups_splits_the_slots_of_each() -> None:
    tables = np.array([[[2, 5]], [[7, 1]]])
    batch = BatchBuilder("cpu", 4).build(make_plan([2], [5], block_tables=tables, block_size=4))
    assert [blocks.tolist() for blocks in batch.slot_blocks] == [[2, 5], [7, 1]]
    assert [offsets.tolist() for offsets in batch.slot_offsets] == [[3, 0], [3, 0]]
    assert batch.block_tables.tolist() == tables.tolist()


def test_build_slot_of_the_null_block_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="null block"):
        BatchBuilder("cpu", 4).build(make_plan([1], [3], block_tables=[[0]], block_size=4))


def test_build_arrays_that_disagree_are_refused() -> None:
    plan = make_plan([1, 1], [6, 3], block_tables=[[2, 5], [4]], block_size=4)
    builder = BatchBuilder("cpu", 4)
    with pytest.raises(InvalidRequestError, match="disagree"):
        builder.build(replace(plan, positions=plan.positions[:1]))
    with pytest.raises(InvalidRequestError, match="at least 1"):
        builder.build(replace(plan, token_ids=plan.token_ids[:0]))
    with pytest.raises(InvalidRequestError, match="1 columns"):
        builder.build(replace(plan, block_tables=plan.block_tables[:, :, :1]))
    with pytest.raises(ConfigError, match="block_size"):
        BatchBuilder("cpu", 0)


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "table", "words"),
    [
        ([0], [3], [[1]], "between 1"),
        ([4], [3], [[1]], "between 1"),
        ([1], [9], [[1, 2]], "too short"),
        ([1], [3], [[1], [2]], "block tables"),
        ([], [], [], "block tables"),
    ],
)
def test_make_plan_lengths_that_disagree_are_refused(
    query_lens: list[int],
    seq_lens: list[int],
    table: list[list[int]],
    words: str,
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        make_plan(query_lens, seq_lens, block_tables=table, block_size=4)
