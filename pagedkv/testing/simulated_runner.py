"""A runner that fails when told to, and remembers every plan. Owns no model: it wraps one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pagedkv.plan import Int64Array, StepPlan
from pagedkv.testing.hash_model import HashModel

if TYPE_CHECKING:
    import torch

    from pagedkv.models import ModelRunner
    from pagedkv.storage import KVStorage, StepBatch

Fault = Literal["before", "after", "logits"]


class SimulatedRunner:
    """What an ``Engine`` needs of a ``ModelRunner``, passed on to one, with faults.

    Args:
        inner: the model.
        namespace_of: namespace number of a sequence handle; asked for the hash model only.

    Attributes:
        fault: of the next forward: it raises ``MemoryError`` before or after the model has run, or the logits of the first sequence that
            samples are NaN and its blocks unreadable. Cleared by whoever sets it.
        digest: of all plans so far.
        plan: of the last forward; reset by whoever wants to know whether there was one.
        num_spoilt: sequences whose logits were made NaN.
    """

    def __init__(self, inner: ModelRunner, namespace_of: Callable[[int], int]) -> None:
        self._inner = inner
        if isinstance(inner, HashModel):
            inner.namespaces_of = self._namespaces
        self._namespace_of = namespace_of
        self.block_size, self.device = inner.block_size, inner.device
        self.vocab_size, self.num_token_ids = inner.vocab_size, inner.num_token_ids
        self.max_positions, self.max_positions_reason = inner.max_positions, inner.max_positions_reason
        self.far_positions: int | None = None  # not simulated
        self.encoder = inner.encoder
        self.eos_token_ids, self.windows, self.group_nbytes = inner.eos_token_ids, inner.windows, inner.group_nbytes
        self.recurrent_state = inner.recurrent_state
        self.fault: Fault | None = None
        self.digest = hashlib.sha256()
        self.plan: StepPlan | None = None
        self.num_spoilt = 0

    @property
    def num_counted_tokens(self) -> int:
        """Tokens of that plan that count for the budget of a step: all, or those of prompts where they come whole."""
        if self.plan is None:
            return 0
        return self.plan.num_tokens - (self.plan.num_decodes if self.recurrent_state == "whole" else 0)

    def new_storage(self, num_blocks: int | Sequence[int], *, num_rows: int) -> KVStorage:
        """The model's own."""
        return self._inner.new_storage(num_blocks, num_rows=num_rows)

    def altered(self) -> bool:
        """As the model says."""
        return self._inner.altered()

    def forward(self, batch: StepBatch, storage: KVStorage) -> torch.Tensor:
        """Run the model, or fail."""
        self.plan = plan = batch.plan
        for array in (plan.seqs, plan.token_ids, plan.slot_mapping, plan.logits_indices, *plan.copies):
            self.digest.update(np.ascontiguousarray(array).tobytes())
        if self.fault == "before":
            raise MemoryError("simulated: no memory for this step")
        logits = self._inner.forward(batch, storage)
        if self.fault == "after":
            raise MemoryError("simulated: the step failed at its end")
        if self.fault == "logits" and len(plan.sampling_seqs):
            self._spoil(plan, storage, logits)
        return logits

    def _spoil(self, plan: StepPlan, storage: KVStorage, logits: torch.Tensor) -> None:
        seq = int(plan.sampling_seqs[0])
        logits[int(plan.sampling_logits[0])] = float("nan")
        for group, slots in enumerate(plan.slot_mapping):
            written = slots[int(plan.cu_seqlens_q[seq]) : int(plan.cu_seqlens_q[seq + 1])] // self.block_size
            storage.fill(np.unique(written), float("nan"), group=group)
        self.num_spoilt += 1

    def _namespaces(self, plan: StepPlan) -> Int64Array:
        return np.array([self._namespace_of(seq) for seq in plan.seqs.tolist()], dtype=np.int64)
