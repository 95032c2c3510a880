"""The step plan: the one value in which bookkeeping (numpy) and computing (torch) meet.

It owns nothing. The scheduler makes it, the batch turns it into device tensors, nobody writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What one forward pass computes, for ``S`` sequences and ``T`` packed tokens, decodes first.

    Attributes:
        step: number of the step, counted from 0.
        seqs: ``[S]`` int64 sequence handles.
        rows: ``[S]`` int64 rows of ``block_tables``.
        token_ids: ``[T]`` int32, the tokens to compute, sequence after sequence.
        positions: ``[T]`` int32, each token's position in its own sequence.
        query_lens: ``[S]`` int32 tokens computed now, at least 1.
        seq_lens: ``[S]`` int32 tokens with stored K/V after this step.
        cu_seqlens_q: ``[S + 1]`` int32, running sum of ``query_lens`` from 0.
        slot_mapping: ``[G, T]`` int64, where each token's K/V goes: ``block_id * block_size + offset``.
        block_tables: ``[G, R, M]`` int32, a read-only view of all tables, padded with the null block 0. Row ``rows[s]`` is
            sequence ``s``. Valid until the next command to the manager.
        copies: per layer group, ``[C, 2]`` int32 ``(source, target)`` blocks to copy before anything is written.
        num_decodes: the first so many sequences have a query length of 1 and sample.
        logits_indices: ``[K]`` int64, packed token indices whose logits are wanted.
        sampling_seqs: ``[Q]`` int64 indices into ``seqs`` of the sequences that get a new token from this step.
        sampling_logits: ``[Q]`` int64 indices into ``logits_indices``, the row each of them samples from.
    """

    step: int
    seqs: Int64Array
    rows: Int64Array
    token_ids: Int32Array
    positions: Int32Array
    query_lens: Int32Array
    seq_lens: Int32Array
    cu_seqlens_q: Int32Array
    slot_mapping: Int64Array
    block_tables: Int32Array
    copies: tuple[Int32Array, ...]
    num_decodes: int
    logits_indices: Int64Array
    sampling_seqs: Int64Array
    sampling_logits: Int64Array

    @property
    def num_seqs(self) -> int:
        """Sequences in the step, ``S``."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Packed tokens in the step, ``T``."""
        return len(self.token_ids)
