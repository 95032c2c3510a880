"""Attention steps to try a backend on: ragged, over permuted and poisoned pools, with the dense K and V kept beside them.

Owns how such a step is made from a few numbers; ``conformance_cases`` draws the numbers, ``conformance`` judges what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionBackend, AttentionSpec, Mask
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.storage import BatchBuilder, KVStorage, LayerPool, LayerSpec, StepBatch
from pagedkv.testing.plans import make_plan

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one layer: ``num_kv_heads`` heads of K and V, each seen by ``group`` query heads, ``key_dim`` and ``value_dim`` wide."""

    num_kv_heads: int = 2
    group: int = 3
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group


@dataclass(frozen=True, slots=True)
class Variant:
    """How the layer attends; sinks and slopes are drawn. ``scale`` None stands for ``key_dim ** -0.5``."""

    mask: Mask = field(default_factory=Mask.causal)
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    scale: float | None = None

    def options(self, geometry: Geometry, generator: torch.Generator, device: torch.device) -> AttendOptions:
        """What a backend is called with."""
        heads = geometry.num_heads
        sinks = torch.randn(heads, generator=generator).to(device) if self.sinks else None
        slopes = torch.rand(heads, generator=generator).to(device) if self.alibi else None
        scale = geometry.key_dim**-0.5 if self.scale is None else self.scale
        return AttendOptions(self.mask, scale, softcap=self.softcap, sinks=sinks, alibi_slopes=slopes)

    def spec(self, geometry: Geometry, device: torch.device) -> AttentionSpec:
        """What a backend is asked whether it supports it."""
        return AttentionSpec(
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            key_dim=geometry.key_dim,
            value_dim=geometry.value_dim,
            block_size=geometry.block_size,
            dtype=geometry.dtype,
            device_type=device.type,
            mask=self.mask,
            softcap=self.softcap,
            sinks=self.sinks,
            alibi=self.alibi,
            scale=self.scale,
        )


@dataclass(frozen=True, slots=True)
class Case:
    """One step. ``dense``: per sequence K ``[length, Hkv, Dk]`` and V ``[length, Hkv, Dv]``, contiguous, never paged."""

    geometry: Geometry
    storage: KVStorage
    batch: StepBatch
    query: Tensor
    key: Tensor
    value: Tensor
    dense: list[tuple[Tensor, Tensor]]

    @property
    def pool(self) -> LayerPool:
        """The layer that is tried: the storage's last."""
        return self.storage.layers[-1]

    def attend(self, backend: AttentionBackend, options: AttendOptions) -> Tensor:
        """Write the step's K and V through the backend, then attend."""
        step = backend.plan(self.batch)
        backend.write(self.pool, self.key, self.value, step)
        return backend.attend(self.query, self.pool, step, options)


def make_case(
    geometry: Geometry,
    query_lens: Sequence[int],
    *,
    seq_lens: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    drop_behind: Mask | None = None,
    garbage: bool = False,
    magnitude: float = 1.0,
) -> Case:
    """A step whose earlier tokens are stored already.

    Blocks are permuted and taken from the top of the pool, and all that no sequence stored is NaN, but for the null block. Q, K and V have
    the strides that models give them: head after head.

    Args:
        geometry: of the layer.
        query_lens: per sequence the tokens to compute.
        seq_lens: per sequence its tokens after the step.
        generator: of all numbers, on the CPU.
        device: where the tensors go.
        drop_behind: blocks that no query of the step sees any more under this mask are given back, null in the table and poisoned in the
            pool, and what lies behind the window inside of the first live block is poisoned as well.
        garbage: tables go on behind their sequences with blocks of NaN, their rows lie scattered among rows of nobody, and the layer is of
            the second of two layer groups, whose tables differ.
        magnitude: of the queries' elements.
    """
    needed = -(-np.asarray(seq_lens) // geometry.block_size)
    storage = _storage(geometry, num_blocks=int(needed.sum()) + 8, second_group=garbage, device=device)
    tables = _tables(storage, needed, generator)
    past_lens = [length - num_queries for num_queries, length in zip(query_lens, seq_lens, strict=True)]
    dense, queries = [], []
    for table, past, length in zip(tables, past_lens, seq_lens, strict=True):
        key, value = (
            torch.randn(length, geometry.num_kv_heads, width, generator=generator).to(device, geometry.dtype)
            for width in (geometry.key_dim, geometry.value_dim)
        )
        _store(storage, table, key[:past], value[:past])
        queries.append(torch.randn(length - past, geometry.num_heads, geometry.key_dim, generator=generator) * magnitude)
        dense.append((key, value))
        if drop_behind is not None:
            _drop(storage, table, drop_behind.first_visible(past))
    return Case(
        geometry=geometry,
        storage=storage,
        batch=_batch(query_lens, seq_lens, tables, geometry.block_size, device, needed if garbage else None),
        query=_strided(torch.cat(queries).to(device, geometry.dtype)),
        key=_strided(torch.cat([key[past:] for (key, _), past in zip(dense, past_lens, strict=True)])),
        value=_strided(torch.cat([value[past:] for (_, value), past in zip(dense, past_lens, strict=True)])),
        dense=dense,
    )


def _storage(geometry: Geometry, *, num_blocks: int, second_group: bool, device: torch.device | str) -> KVStorage:
    """A pool full of NaN for the layer, behind a layer of another group where it is to be of the second one."""
    spec = LayerSpec(geometry.num_kv_heads, geometry.key_dim, geometry.value_dim, group=int(second_group))
    layers = [replace(spec, group=0), spec] if second_group else [spec]
    storage = KVStorage(layers, num_blocks=num_blocks, block_size=geometry.block_size, dtype=geometry.dtype, device=device)
    for group in range(len(layers)):
        storage.fill(range(1, num_blocks), _NAN, group=group)
    return storage


def _tables(storage: KVStorage, needed: Int64Array, generator: torch.Generator) -> Int64Array:
    """``[S, M]`` so many blocks for each sequence, permuted, from the top of the pool."""
    tables = np.zeros((len(needed), int(needed.max())), dtype=np.int64)
    top = storage.layers[-1].num_blocks - 1 - torch.randperm(int(needed.sum()), generator=generator).numpy()
    tables[np.arange(tables.shape[1]) < needed[:, None]] = top  # row after row
    return tables


def _store(storage: KVStorage, table: Int64Array, key: Tensor, value: Tensor) -> None:
    """Write a sequence's first K ``[P, Hkv, Dk]`` and V ``[P, Hkv, Dv]`` to the layer that is tried."""
    positions, size = np.arange(len(key)), storage.block_size
    slots = torch.from_numpy(table[positions // size] * size + positions % size).to(key.device)
    storage.write(len(storage.layers) - 1, key, value, slots)


def _strided(packed: Tensor) -> Tensor:
    """The same ``[T, H, D]`` with the tokens of a head side by side."""
    return packed.transpose(0, 1).contiguous().transpose(0, 1)


def _drop(storage: KVStorage, table: Int64Array, first_visible: int) -> None:
    """Take what lies before a position from one sequence."""
    size, pool = storage.block_size, storage.layers[-1]
    gone = first_visible // size
    storage.fill(table[:gone], _NAN, group=pool.spec.group)
    table[:gone] = 0
    for position in range(gone * size, first_visible):
        block = int(table[position // size])
        pool.key[block, :, position % size] = _NAN
        pool.value[block, :, position % size] = _NAN


def _batch(
    query_lens: Sequence[int], seq_lens: Sequence[int], tables: Int64Array, size: int, device: torch.device | str, needed: Int64Array | None
) -> StepBatch:
    """The step on the device; with the blocks that each sequence needs given, among garbage."""
    if needed is None:
        return BatchBuilder(device, size).build(make_plan(query_lens, seq_lens, block_tables=tables, block_size=size))
    poisoned = 1  # the lowest blocks of a pool belong to nobody
    own = np.where(np.arange(tables.shape[1]) < needed[:, None], tables, poisoned)
    plan = make_plan(query_lens, seq_lens, block_tables=np.stack([np.full_like(own, poisoned), own]), block_size=size)
    rows = np.arange(len(own), dtype=np.int64)[::-1] * 2 + 1
    scattered: Int32Array = np.full((2, 2 * len(own) + 2, own.shape[1] + 2), poisoned, dtype=np.int32)
    scattered[:, rows, : own.shape[1]] = plan.block_tables
    return BatchBuilder(device, size).build(replace(plan, rows=rows, block_tables=scattered))


def random_lengths(generator: torch.Generator, *, decodes: int, chunks: int, longest: int) -> tuple[list[int], list[int]]:
    """Query and sequence lengths: so many decodes, then so many chunks of 2 to ``longest`` tokens, half of them without a past."""

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
