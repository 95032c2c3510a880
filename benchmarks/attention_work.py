"""The steps that attention is measured on, with K and V for many layers, so that no call finds its own in a cache.

Owns cases and tensors. Does not own who attends to them, nor any clock.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionSpec, Mask
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec, StepBatch
from pagedkv.testing.plans import make_plan


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: what each sequence computes now and holds afterwards, by which heads, in which dtype.

    Attributes:
        title: for a table.
        query_lens, seq_lens: of each sequence.
        num_heads, num_kv_heads, dim: of one layer.
        dtype: by name.
    """

    title: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    dim: int
    dtype: str

    @property
    def is_decode(self) -> bool:
        """Whether bytes count, and not multiplications."""
        return max(self.query_lens) == 1

    @property
    def nbytes(self) -> int:
        """K and V of all sequences in one layer: what a decode reads at least."""
        return int(sum(self.seq_lens) * self.num_kv_heads * self.dim * 2 * getattr(torch, self.dtype).itemsize)

    @property
    def flops(self) -> int:
        """Floating point operations of the two products over what is not masked."""
        pairs = sum(new * (length - new) + new * (new + 1) // 2 for new, length in zip(self.query_lens, self.seq_lens, strict=True))
        return 4 * self.num_heads * self.dim * pairs

    def __str__(self) -> str:
        return f"{self.title}, {self.num_heads}/{self.num_kv_heads} heads x {self.dim}"


def shapes(dtype: str, *, seed: int, quick: bool) -> list[Shape]:
    """All cases, or with ``quick`` small ones of the same kinds."""
    shrink = 16 if quick else 1
    ragged = tuple(random.Random(seed).randint(16, 768) // (4 if quick else 1) for _ in range(64 // shrink))
    decodes = [
        (f"decode {8 // min(shrink, 4)} x {4_096 // shrink:,}", (4_096 // shrink,) * (8 // min(shrink, 4))),
        (f"decode {32 // shrink} x {512 // shrink:,}", (512 // shrink,) * (32 // shrink)),
        (f"decode {len(ragged)} ragged", ragged),
        (f"decode 1 x {4_096 // shrink:,}", (4_096 // shrink,)),
    ]
    chunk = 512 // shrink
    steps = [(title, (1,) * len(lengths), lengths) for title, lengths in decodes]
    steps += [(f"prefill {chunk} over {length:,}", (chunk,), (length,)) for length in (chunk, 4 * chunk)]
    return [Shape(title, new, lengths, *heads, dtype) for heads in ((9, 3, 64), (32, 8, 128)) for title, new, lengths in steps]


class Work:
    """The tensors of one shape.

    Args:
        shape: what to make.
        nbytes: of K and V in all layers together, at least.
        block_size: tokens in one block.
        generator: of all numbers, and of the order of blocks.
    """

    def __init__(self, shape: Shape, *, nbytes: int, block_size: int, generator: torch.Generator) -> None:
        self.shape = shape
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        self.num_layers = max(2, math.ceil(nbytes / shape.nbytes))
        needed = -(-np.asarray(shape.seq_lens) // block_size)
        num_blocks = int(needed.sum()) + 1
        layer = LayerSpec(shape.num_kv_heads, shape.dim, shape.dim)
        self.storage = KVStorage([layer] * self.num_layers, num_blocks=num_blocks, block_size=block_size, dtype=self.dtype, device="cpu")
        for pool in self.storage.layers:  # all but the null block, which stays zeros
            pool.key[1:].normal_(generator=generator)
            pool.value[1:].normal_(generator=generator)
        order = torch.randperm(num_blocks - 1, generator=generator).numpy() + 1
        tables = np.zeros((len(needed), int(needed.max())), dtype=np.int64)
        tables[np.arange(tables.shape[1]) < needed[:, None]] = order
        plan = make_plan(shape.query_lens, shape.seq_lens, block_tables=tables, block_size=block_size)
        self.batch: StepBatch = BatchBuilder("cpu", block_size).build(plan)
        self.tables = torch.from_numpy(tables)
        tokens = sum(shape.query_lens)
        self.query = torch.randn(tokens, shape.num_heads, shape.dim, generator=generator).to(self.dtype)
        self.options = AttendOptions(Mask.causal(), shape.dim**-0.5)

    @property
    def spec(self) -> AttentionSpec:
        """What a backend is asked whether it supports it."""
        shape = self.shape
        sizes = (shape.num_heads, shape.num_kv_heads, shape.dim, shape.dim, self.batch.block_size)
        return AttentionSpec(*sizes, self.dtype, "cpu", Mask.causal())

    @cached_property
    def contiguous(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Per layer and sequence K and V ``[Hkv, length, D]``, never paged; equal lengths are one entry ``[S, Hkv, length, D]``."""
        lengths = self.shape.seq_lens
        layers = []
        for pool in self.storage.layers:
            pairs = [
                pool.gather(table[: -(-length // pool.block_size)], length) for table, length in zip(self.tables, lengths, strict=True)
            ]
            if len(set(lengths)) == 1:
                pairs = [(torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs]))]
            layers.append([(key.contiguous(), value.contiguous()) for key, value in pairs])
        return layers
