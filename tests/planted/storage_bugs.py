"""Bugs of the storage and of the batch that goes to the device, one line each: they are planted one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from planting import Plant, changed
from torch import Tensor

from pagedkv.plan import Int32Array, StepPlan
from pagedkv.storage import BatchBuilder, KVStorage, LayerPool, StepBatch


def copy_in_the_first_layer_only(right: Callable[..., None], storage: KVStorage, copies: tuple[Int32Array, ...]) -> None:
    pools, storage._pools = storage._pools, storage._pools[:1]
    right(storage, copies)
    storage._pools = pools


def copy_the_wrong_way(right: Callable[..., None], pool: LayerPool, sources: Tensor, targets: Tensor) -> None:
    right(pool, targets, sources)


def copy_keys_only(right: Callable[..., None], pool: LayerPool, sources: Tensor, targets: Tensor) -> None:
    pool.key[targets] = pool.key[sources]


def copy_one_block_less(right: Callable[..., None], pool: LayerPool, sources: Tensor, targets: Tensor) -> None:
    right(pool, sources[1:], targets[1:])


def gather_one_token_less(right: Callable[..., tuple[Tensor, Tensor]], pool: LayerPool, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    found = right(pool, ids, length)
    for each in found:
        each[:, length - 1 :] = 0
    return found


def gather_the_first_block_again(
    right: Callable[..., tuple[Tensor, Tensor]], pool: LayerPool, ids: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    return right(pool, torch.cat([ids[:1], ids[:-1]]) if len(ids) > 2 else ids, length)


def write_one_slot_on(right: Callable[..., None], pool: LayerPool, key: Tensor, value: Tensor, *, blocks: Tensor, offsets: Tensor) -> None:
    right(pool, key, value, blocks=blocks, offsets=(offsets + (offsets > 0)) % pool.block_size)


def write_values_of_the_head_before(
    right: Callable[..., None], pool: LayerPool, key: Tensor, value: Tensor, *, blocks: Tensor, offsets: Tensor
) -> None:
    right(pool, key, value.roll(1, dims=1), blocks=blocks, offsets=offsets)


def write_all_but_the_last(
    right: Callable[..., None], pool: LayerPool, key: Tensor, value: Tensor, *, blocks: Tensor, offsets: Tensor
) -> None:
    most = max(len(blocks) - 1, 1)
    right(pool, key[:most], value[:most], blocks=blocks[:most], offsets=offsets[:most])


def fill_the_next_block(right: Callable[..., None], pool: LayerPool, block_ids: Tensor, value: float) -> None:
    right(pool, block_ids + (block_ids + 1 < pool.num_blocks), value)


STORAGE_BUGS: Mapping[str, Plant] = {
    "blocks are copied in the first layer only": changed(KVStorage, "copy_blocks", copy_in_the_first_layer_only),
    "no block is copied": changed(LayerPool, "copy_blocks", lambda right, *_: None),
    "a target is copied over its source": changed(LayerPool, "copy_blocks", copy_the_wrong_way),
    "a copy leaves the values behind": changed(LayerPool, "copy_blocks", copy_keys_only),
    "the first of several copies is missed": changed(LayerPool, "copy_blocks", copy_one_block_less),
    "a gather is one token short": changed(LayerPool, "gather", gather_one_token_less),
    "a gather reads a block twice": changed(LayerPool, "gather", gather_the_first_block_again),
    "a slot inside a block is off by one": changed(LayerPool, "write", write_one_slot_on),
    "values go to another head": changed(LayerPool, "write", write_values_of_the_head_before),
    "the last of many tokens is not written": changed(LayerPool, "write", write_all_but_the_last),
    "a fill hits the block behind": changed(LayerPool, "fill", fill_the_next_block),
}


def with_plan(change: Callable[[StepPlan], StepPlan]) -> Plant:
    """The batch is built from a changed plan."""

    def build(right: Callable[..., StepBatch], builder: BatchBuilder, plan: StepPlan, *others: Any) -> StepBatch:
        return right(builder, change(plan), *others)

    return changed(BatchBuilder, "build", build)


def keep_old_table_rows(right: Callable[..., StepBatch], builder: BatchBuilder, plan: StepPlan, *others: Any) -> StepBatch:
    before = getattr(builder, "stale", None)
    builder.stale = plan.block_tables.copy()  # type: ignore[attr-defined]
    stale = plan if before is None or before.shape != plan.block_tables.shape else replace(plan, block_tables=before)
    return right(builder, stale, *others)


def drop_the_last_column(plan: StepPlan) -> StepPlan:
    tables = plan.block_tables.copy()
    tables[:, :, (plan.seq_lens.max() - 1) // 4] = 0
    return replace(plan, block_tables=tables)


def slots_of_the_block_before(right: Callable[..., StepBatch], builder: BatchBuilder, plan: StepPlan, *others: Any) -> StepBatch:
    batch = right(builder, plan, *others)
    return replace(batch, slot_blocks=tuple((blocks - (offsets == 0).long()).clamp(min=1) for blocks, offsets in slots_of(batch)))


def slots_of(batch: StepBatch) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch.slot_blocks, batch.slot_offsets, strict=True))


def shift_positions_of_chunks(plan: StepPlan) -> StepPlan:
    return replace(plan, positions=plan.positions + np.repeat(plan.query_lens > 1, plan.query_lens).astype(np.int32))


BATCH_BUGS: Mapping[str, Plant] = {
    "table rows are stale": changed(BatchBuilder, "build", keep_old_table_rows),
    "table rows are those of other sequences": with_plan(lambda plan: replace(plan, rows=np.roll(plan.rows, 1))),
    "the last column of the tables is missing": with_plan(drop_the_last_column),
    "a block's first slot is taken for one of the block before": changed(BatchBuilder, "build", slots_of_the_block_before),
    "positions of chunks are one too high": with_plan(shift_positions_of_chunks),
    "lengths leave out this step": with_plan(lambda plan: replace(plan, seq_lens=np.maximum(plan.seq_lens - plan.query_lens, 1))),
    "logits are those of the token before": with_plan(lambda plan: replace(plan, logits_indices=np.maximum(plan.logits_indices - 1, 0))),
}
