"""A step plan as device tensors, built once per step and read by every layer.

It owns the kept buffers behind the tensors. It does not own the plan, nor anything that only one backend wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.checks import integer
from pagedkv.errors import InvalidRequestError
from pagedkv.plan import StepPlan
from pagedkv.storage.source import Source
from pagedkv.storage.storage import as_device


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """One step on the device. The tensors are views of the builder's buffers: valid until its next ``build``.

    Attributes:
        plan: the same step on the host.
        token_ids: ``[T]`` int64.
        positions: ``[T]`` int64.
        slot_mapping: ``[G, T]`` int64.
        slot_blocks: per group ``[T]`` int64, the block of each slot.
        slot_offsets: per group ``[T]`` int64, the place of each slot inside its block.
        block_tables: ``[G, S, M']`` int32, ``M'`` the blocks of the step's longest sequence; padded with the null block.
        seq_lens: ``[S]`` int32.
        cu_seqlens_q: ``[S + 1]`` int32.
        logits_indices: ``[K]`` int64.
        block_size: tokens in one block, which ``slot_mapping`` counts in.
        sources: ``[S]`` what each sequence gives to the encoder, whose tokens are its first ones; empty for models without an encoder.
    """

    plan: StepPlan
    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    slot_blocks: tuple[Tensor, ...]
    slot_offsets: tuple[Tensor, ...]
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    logits_indices: Tensor
    block_size: int
    sources: Sequence[Source] = ()

    def wanted(self) -> StepBatch | None:
        """The step of those tokens alone whose logits are wanted; None unless each is the last of its sequence, which sees all K/V of it.

        Cost: some small copies, by which it outlives the builder's next ``build``, but for its plan.
        """
        plan, tokens = self.plan, self.plan.logits_indices
        seqs = np.searchsorted(plan.cu_seqlens_q, tokens, side="right") - 1
        if not np.array_equal(plan.cu_seqlens_q[seqs + 1] - 1, tokens):
            return None
        places, which = self.logits_indices, torch.from_numpy(seqs).to(self.seq_lens.device)
        count = np.arange(len(tokens) + 1, dtype=np.int32)
        alone = replace(
            plan,
            seqs=plan.seqs[seqs],
            rows=plan.rows[seqs],
            token_ids=plan.token_ids[tokens],
            positions=plan.positions[tokens],
            query_lens=np.ones(len(tokens), dtype=np.int32),
            seq_lens=plan.seq_lens[seqs],
            cu_seqlens_q=count,
            slot_mapping=plan.slot_mapping[:, tokens],
            copies=tuple(pairs[:0] for pairs in plan.copies),  # they were made
            num_decodes=len(tokens),
            logits_indices=count[:-1].astype(np.int64),
            sampling_seqs=plan.sampling_logits,
        )
        return replace(
            self,
            plan=alone,
            token_ids=self.token_ids[places],
            positions=self.positions[places],
            slot_mapping=self.slot_mapping[:, places],
            slot_blocks=tuple(blocks[places] for blocks in self.slot_blocks),
            slot_offsets=tuple(offsets[places] for offsets in self.slot_offsets),
            block_tables=self.block_tables[:, which],
            seq_lens=self.seq_lens[which],
            cu_seqlens_q=torch.from_numpy(count).to(places.device),
            logits_indices=torch.arange(len(tokens), device=places.device),
            sources=[self.sources[seq] for seq in seqs] if self.sources else (),
        )


class BatchBuilder:
    """Turns step plans into device tensors, with one copy per array and only the rows and columns in use.

    Buffers are kept and grow in powers of two, so that a steady state allocates nothing and addresses stay put.

    Args:
        device: where the tensors go.
        block_size: tokens in one block.
    """

    def __init__(self, device: torch.device | str, block_size: int) -> None:
        self.block_size = integer("block_size", block_size, least=1, most=2**31 - 1)
        self.device = as_device(device)
        self._buffers: dict[str, _Buffer] = {}

    def build(self, plan: StepPlan, sources: Sequence[Source] = ()) -> StepBatch:
        """Copy one plan to the device.

        Args:
            plan: a step of at least one sequence.
            sources: ``[S]`` for a model with an encoder, what each sequence gives to it.

        Returns:
            the batch, valid until the next call.

        Raises:
            InvalidRequestError: an empty step, arrays whose lengths disagree, or a slot in the null block.

        Cost: nine small copies, whatever the number of sequences.
        """
        self._check(plan)
        blocks, offsets = np.divmod(plan.slot_mapping, self.block_size)
        columns = -(-int(plan.seq_lens.max()) // self.block_size)
        tables = plan.block_tables[:, :, :columns][:, plan.rows]
        if tables.shape[2] < columns:
            raise InvalidRequestError(f"block_tables has {tables.shape[2]} columns, the longest sequence needs {columns}")
        return StepBatch(
            plan=plan,
            token_ids=self._put("token_ids", plan.token_ids, torch.int64),
            positions=self._put("positions", plan.positions, torch.int64),
            slot_mapping=self._put("slot_mapping", plan.slot_mapping, torch.int64),
            slot_blocks=self._put("slot_blocks", blocks, torch.int64).unbind(0),
            slot_offsets=self._put("slot_offsets", offsets, torch.int64).unbind(0),
            block_tables=self._put("block_tables", tables, torch.int32),
            seq_lens=self._put("seq_lens", plan.seq_lens, torch.int32),
            cu_seqlens_q=self._put("cu_seqlens_q", plan.cu_seqlens_q, torch.int32),
            logits_indices=self._put("logits_indices", plan.logits_indices, torch.int64),
            block_size=self.block_size,
            sources=sources,
        )

    def _check(self, plan: StepPlan) -> None:
        tokens, seqs = plan.num_tokens, plan.num_seqs
        if not tokens or not seqs:
            raise InvalidRequestError(f"the step has {seqs} sequences and {tokens} tokens: both must be at least 1")
        shapes = (plan.positions.shape, plan.slot_mapping.shape[1:], plan.query_lens.shape, plan.seq_lens.shape, plan.cu_seqlens_q.shape)
        if shapes != ((tokens,), (tokens,), (seqs,), (seqs,), (seqs + 1,)) or int(plan.cu_seqlens_q[-1]) != tokens:
            raise InvalidRequestError(f"the step's arrays disagree on {tokens} tokens of {seqs} sequences: {shapes}")
        if int(plan.slot_mapping.min()) < self.block_size:
            raise InvalidRequestError(f"slot {int(plan.slot_mapping.min())} lies in the null block, which is never written")

    def _put(self, name: str, array: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.host.numel() < array.size:
            capacity = 1 << max(6, (array.size - 1).bit_length())
            buffer = self._buffers[name] = _Buffer(capacity, dtype, self.device)
        return buffer.put(array)


class _Buffer:
    """One kept array. On the CPU the staging tensor is the device tensor, elsewhere it is copied over once."""

    __slots__ = ("array", "device", "host")

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        # Pageable memory on purpose: the copy is staged before it returns, so that the next step may overwrite the source.
        with torch.inference_mode(False):  # else a buffer born in a step could not be written outside of inference mode
            self.host = torch.empty(capacity, dtype=dtype)
            self.device = self.host if device.type == "cpu" else torch.empty(capacity, dtype=dtype, device=device)
        self.array = self.host.numpy()

    def put(self, source: npt.NDArray[np.generic]) -> Tensor:
        size = source.size
        np.copyto(self.array[:size].reshape(source.shape), source, casting="same_kind")
        if self.device is not self.host:
            self.device[:size].copy_(self.host[:size])
        return self.device[:size].view(source.shape)
