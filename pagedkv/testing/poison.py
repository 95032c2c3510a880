"""A backend that makes stale memory visible: whatever a step has not written yet is NaN when the step begins.

Owns no rule and no storage: it wraps any attention backend. Together with ``Engine.fill_free_blocks(float("nan"))`` after each step, no
K/V is left in the pool that anybody could read by mistake and get away with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionBackend, AttentionSpec, get_backend
from pagedkv.attention.protocol import StepAttention
from pagedkv.plan import StepPlan
from pagedkv.storage import LayerPool
from pagedkv.storage.batch import StepBatch


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """Places in one layer group's pools: ``blocks [n]`` and ``offsets [n]``, int64."""

    blocks: Tensor
    offsets: Tensor


class PoisonBackend:
    """Runs another backend; before a layer's K/V are written, every slot that the step's sequences hold for later positions is NaN.

    That covers fresh blocks whoever had them before, also in the very same step, and the unwritten end of half-full ones. A block that
    somebody else could read is never written by a correct step, so one that is shared by mistake shows as well.

    Args:
        inner: what computes; a name or an object, as ``get_backend`` takes it.
        device: where the pools live.

    Attributes:
        num_poisoned: slots made NaN so far, in all layers: a test asserts that it is not 0.
    """

    def __init__(self, inner: str | AttentionBackend = "auto", *, device: torch.device | str = "cpu") -> None:
        self._inner = get_backend(inner, device=device)
        self._slots: tuple[_Slots, ...] = ()
        self.num_poisoned = 0

    @property
    def name(self) -> str:
        """The inner name, marked."""
        return f"poisoned {self._inner.name}"

    def supports(self, spec: AttentionSpec) -> str | None:
        """What the inner one says."""
        return self._inner.supports(spec)

    def plan(self, batch: StepBatch) -> StepAttention:
        """Note which slots of the step hold nothing, then plan as the inner one does."""
        device = batch.token_ids.device
        self._slots = tuple(_empty_slots(batch.plan, group, batch.block_size, device) for group in range(len(batch.slot_blocks)))
        return self._inner.plan(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        """Poison, then write as the inner one does."""
        slots, spec = self._slots[pool.spec.group], pool.spec
        count = len(slots.blocks)
        nan = torch.full((count, spec.num_kv_heads, max(spec.key_dim, spec.value_dim)), float("nan"), dtype=pool.dtype, device=pool.device)
        pool.write(nan[..., : spec.key_dim], nan[..., : spec.value_dim], blocks=slots.blocks, offsets=slots.offsets)
        self.num_poisoned += count
        self._inner.write(pool, key, value, step)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        """As the inner one does."""
        return self._inner.attend(query, pool, step, options)


def _empty_slots(plan: StepPlan, group: int, block_size: int, device: torch.device) -> _Slots:
    """Every slot from a sequence's first position of this step to the end of its last block."""
    first = (plan.seq_lens - plan.query_lens).astype(np.int64)
    end = -(-plan.seq_lens.astype(np.int64) // block_size) * block_size
    counts = end - first
    owners = np.repeat(np.arange(plan.num_seqs), counts)
    positions = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    blocks = plan.block_tables[group][plan.rows[owners], positions // block_size].astype(np.int64)
    return _Slots(torch.from_numpy(blocks).to(device), torch.from_numpy(positions % block_size).to(device))
