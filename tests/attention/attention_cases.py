"""Random attention cases on any device: ragged steps over permuted, poisoned pools, with the dense K and V kept beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionBackend, Mask
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec, StepBatch
from pagedkv.testing.plans import make_plan


@dataclass(frozen=True)
class Geometry:
    num_kv_heads: int = 2
    group: int = 3
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


@dataclass(frozen=True)
class Variant:
    mask: Mask = field(default_factory=Mask.causal)
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    scale: float | None = None

    def options(self, geometry: Geometry, generator: torch.Generator, device: torch.device) -> AttendOptions:
        heads = geometry.num_heads
        sinks = torch.randn(heads, generator=generator).to(device) if self.sinks else None
        slopes = torch.rand(heads, generator=generator).to(device) if self.alibi else None
        scale = geometry.key_dim**-0.5 if self.scale is None else self.scale
        return AttendOptions(self.mask, scale, softcap=self.softcap, sinks=sinks, alibi_slopes=slopes)


@dataclass(frozen=True)
class Case:
    """One step. ``dense``: per sequence K ``[length, Hkv, Dk]`` and V ``[length, Hkv, Dv]``, contiguous, never paged."""

    geometry: Geometry
    storage: KVStorage
    batch: StepBatch
    query: Tensor
    key: Tensor
    value: Tensor
    dense: list[tuple[Tensor, Tensor]]

    def attend(self, backend: AttentionBackend, options: AttendOptions) -> Tensor:
        """Write the step's K and V through the backend, then attend."""
        step = backend.plan(self.batch)
        pool = self.storage.layers[0]
        backend.write(pool, self.key, self.value, step)
        return backend.attend(self.query, pool, step, options)


def make_case(
    geometry: Geometry,
    query_lens: list[int],
    *,
    seq_lens: list[int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    drop_behind: Mask | None = None,
) -> Case:
    """A step whose earlier tokens are stored already.

    Blocks are permuted and taken from the top of the pool, and all that no sequence stored is NaN. With ``drop_behind``, blocks
    that no query of the step sees any more are given back, null in the table and poisoned in the pool, and what lies behind the
    window inside of the first live block is poisoned as well.
    """
    size, lengths = geometry.block_size, np.asarray(seq_lens)
    needed = -(-lengths // size)
    num_blocks = int(needed.sum()) + 8
    storage = KVStorage(
        [LayerSpec(geometry.num_kv_heads, geometry.key_dim, geometry.value_dim)],
        num_blocks=num_blocks,
        block_size=size,
        dtype=geometry.dtype,
        device=device,
    )
    storage.fill(range(1, num_blocks), float("nan"))
    top = num_blocks - 1 - torch.randperm(int(needed.sum()), generator=generator).numpy()
    tables = np.zeros((len(seq_lens), int(needed.max())), dtype=np.int64)
    queries, new_keys, new_values, dense = [], [], [], []
    for seq, (num_queries, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        start = int(needed[:seq].sum())
        tables[seq, : needed[seq]] = top[start : start + needed[seq]]
        key = torch.randn(length, geometry.num_kv_heads, geometry.key_dim, generator=generator).to(device, geometry.dtype)
        value = torch.randn(length, geometry.num_kv_heads, geometry.value_dim, generator=generator).to(device, geometry.dtype)
        past = length - num_queries
        slots = tables[seq, np.arange(past) // size] * size + np.arange(past) % size
        storage.write(0, key[:past], value[:past], torch.from_numpy(slots).to(device))
        queries.append(torch.randn(num_queries, geometry.num_heads, geometry.key_dim, generator=generator))
        new_keys.append(key[past:])
        new_values.append(value[past:])
        dense.append((key, value))
        if drop_behind is not None and (gone := drop_behind.first_visible(past) // size):
            storage.fill(tables[seq, :gone], float("nan"))
            tables[seq, :gone] = 0
        if drop_behind is not None:
            for position in range(drop_behind.first_visible(past) // size * size, drop_behind.first_visible(past)):
                block = int(tables[seq, position // size])
                storage.layers[0].key[block, :, position % size] = float("nan")
                storage.layers[0].value[block, :, position % size] = float("nan")
    plan = make_plan(query_lens, seq_lens, block_tables=tables, block_size=size)
    return Case(
        geometry=geometry,
        storage=storage,
        batch=BatchBuilder(device, size).build(plan),
        query=torch.cat(queries).to(device, geometry.dtype),
        key=torch.cat(new_keys),
        value=torch.cat(new_values),
        dense=dense,
    )


def random_lengths(generator: torch.Generator, *, decodes: int, chunks: int, longest: int) -> tuple[list[int], list[int]]:
    """Query and sequence lengths: so many decodes, then so many chunks, half of them without a past."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    query_lens = [1] * decodes
    seq_lens = [draw(1, longest) for _ in range(decodes)]
    for chunk in range(chunks):
        length = draw(2, longest)
        seq_lens.append(length)
        query_lens.append(length if chunk % 2 == 0 else draw(1, length))
    return query_lens, seq_lens


def dense_attention(case: Case, options: AttendOptions) -> Tensor:
    """The same step in float64 from contiguous K and V, K and V repeated per query head: another way to the same numbers."""
    outputs, geometry = [], case.geometry
    start = 0
    for (key, value), num_queries in zip(case.dense, case.batch.plan.query_lens.tolist(), strict=True):
        query = case.query[start : start + num_queries].double().transpose(0, 1)
        start += num_queries
        keys = key.double().transpose(0, 1).repeat_interleave(geometry.group, dim=0)
        values = value.double().transpose(0, 1).repeat_interleave(geometry.group, dim=0)
        length = keys.shape[1]
        rows = torch.arange(length - num_queries, length, device=query.device)[:, None]
        columns = torch.arange(length, device=query.device)[None, :]
        logits = torch.einsum("hqd,hkd->hqk", query, keys) * options.scale
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        if options.alibi_slopes is not None:
            logits = logits - options.alibi_slopes.double()[:, None, None] * (rows - columns)
        allowed = columns <= rows
        if options.mask.kind == "sliding":
            allowed = allowed & (rows - columns < options.mask.size)
        if options.mask.kind == "chunked":
            allowed = allowed & (rows // options.mask.size == columns // options.mask.size)
        exponentials = torch.where(allowed, logits, -torch.inf).exp()
        total = exponentials.sum(dim=-1, keepdim=True)
        if options.sinks is not None:
            total = total + options.sinks.double().exp()[:, None, None]
        outputs.append(torch.einsum("hqk,hkd->qhd", exponentials / total, values))
    return torch.cat(outputs)
