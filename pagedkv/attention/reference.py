"""The oracle: attention over pages, written to be read. Slow, plain, float32; every other backend must match it.

One sequence, one head at a time; only the tokens that exist are read, so nothing stale can enter a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.protocol import AttendOptions, AttentionSpec, StepAttention, check_query, write_step
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool


class ReferenceBackend:
    """Supports every feature on every device and dtype. Cost: a Python loop over sequences and heads."""

    @property
    def name(self) -> str:
        """``"reference"``."""
        return "reference"

    def supports(self, spec: AttentionSpec) -> str | None:
        """None, unless the heads cannot be grouped or the dtype is no floating one."""
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} K/V heads"
        if not spec.dtype.is_floating_point:
            return f"{spec.dtype} is not a floating dtype"
        return None

    def plan(self, batch: StepBatch) -> StepAttention:
        """Nothing is prepared."""
        return StepAttention(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        """Store K ``[T, Hkv, Dk]`` and V ``[T, Hkv, Dv]``; see ``AttentionBackend.write``."""
        write_step(pool, key, value, step.batch)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        """``[T, Hq, Dk]`` to ``[T, Hq, Dv]``; see ``AttentionBackend.attend``."""
        batch = step.batch
        check_query(query, pool, batch, options)
        output = query.new_empty(query.shape[0], query.shape[1], pool.spec.value_dim)
        tables = batch.block_tables[pool.spec.group].long()
        for seq in range(batch.plan.num_seqs):
            first_token, end_token = int(batch.plan.cu_seqlens_q[seq]), int(batch.plan.cu_seqlens_q[seq + 1])
            length = int(batch.plan.seq_lens[seq])
            num_blocks = -(-length // pool.block_size)
            key, value = pool.gather(tables[seq, :num_blocks], length)
            tokens = slice(first_token, end_token)
            output[tokens] = _attend_sequence(query[tokens], key, value, options)
        return output


def _attend_sequence(query: Tensor, key: Tensor, value: Tensor, options: AttendOptions) -> Tensor:
    """Query ``[Tq, Hq, Dk]`` are the last ``Tq`` positions of K ``[Hkv, length, Dk]`` and V ``[Hkv, length, Dv]``."""
    num_queries, num_heads, _ = query.shape
    group_size = num_heads // key.shape[0]
    length = key.shape[1]
    key_positions = torch.arange(length, device=query.device)
    query_positions = torch.arange(length - num_queries, length, device=query.device)[:, None]
    visible = options.mask.visible(query_positions, key_positions)
    heads = []
    for head in range(num_heads):
        precision = torch.promote_types(query.dtype, torch.float32)
        # A table may have lost its blocks behind a window: what no query sees is not read at all.
        head_key, head_value = key[head // group_size].to(precision), value[head // group_size].to(precision)
        seen = visible.any(dim=0)
        scores = query[:, head].to(precision) @ head_key[seen].T * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.alibi_slopes is not None:
            scores = scores + options.alibi_slopes[head].to(precision) * (key_positions[seen] - query_positions)
        scores = scores.masked_fill(~visible[:, seen], float("-inf"))
        if options.sinks is not None:
            sink = options.sinks[head].to(precision).expand(num_queries, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=1), dim=1)[:, :-1]
        else:
            weights = torch.softmax(scores, dim=1)
        heads.append((weights @ head_value[seen]).to(query.dtype))
    return torch.stack(heads, dim=1)
