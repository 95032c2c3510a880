"""Putting a step plan together: reserves slots as rows are added, then freezes the arrays. Lives for one ``plan()`` call."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from pagedkv.core import Extension, KVCacheManager
from pagedkv.plan import Int32Array, Int64Array, StepPlan
from pagedkv.scheduling.running import RunningSet

_Array = TypeVar("_Array", Int32Array, Int64Array)


class PlanBuilder:
    """Collects decodes (first, all at once) and prefill chunks (one by one).

    Args:
        manager: takes the reservations.
        running: knows which rows hold tokens back and which want prompt logits.
    """

    def __init__(self, manager: KVCacheManager, running: RunningSet) -> None:
        self._manager = manager
        self._running = running
        self.decodes: Int64Array = np.zeros(0, dtype=np.int64)
        self._seqs = self.decodes
        self._prefills: list[tuple[int, int, int]] = []  # row, first position, tokens
        self._extensions: list[Extension] = []
        self.num_tokens = 0

    @property
    def rows(self) -> list[int]:
        """Rows added so far."""
        return [*self.decodes.tolist(), *(row for row, _, _ in self._prefills)]

    def add_decodes(self, rows: Int64Array) -> None:
        """Reserve one slot in each row; raises ``OutOfBlocksError`` before any change."""
        seqs = self._running.seqs if rows is self._running.rows else self._manager.table.handles_of(rows)
        self._extensions.append(self._manager.extend(seqs, 1))
        self.decodes, self._seqs = rows, seqs
        self.num_tokens = len(rows)

    def fit_chunk(self, row: int, budget: int) -> int:
        """Tokens of this row that can be computed now: what is left to compute, within the budget and the blocks at hand."""
        table, size = self._manager.table, self._manager.block_size
        start = int(table.num_reserved[row])
        left = int(table.num_tokens[row]) - int(self._running.hold[row]) - start
        # No copy to reckon with: a half-full last block that others hold is written by decodes alone, the first tokens of forks.
        room = (int(table.num_blocks[row]) + self._manager.num_available_blocks) * size - start
        return min(left, budget, room)

    def add_prefill(self, row: int, num_tokens: int) -> None:
        """Reserve slots for a chunk that ``fit_chunk`` allowed."""
        start = int(self._manager.table.num_reserved[row])
        handle = self._manager.table.handles_of(np.array([row]))
        self._extensions.append(self._manager.extend(handle, np.array([num_tokens], dtype=np.int32)))
        self._prefills.append((row, start, num_tokens))
        self.num_tokens += num_tokens

    def abandon(self) -> None:
        """Give back all that was reserved."""
        self._manager.cancel(self._manager.table.handles_of(np.array(self.rows, dtype=np.int64)))

    def build(self, step: int) -> StepPlan:
        """Freeze the plan; O(tokens), a fixed number of array operations for the decodes."""
        table, decodes, seqs = self._manager.table, self.decodes, self._seqs
        num_decodes = len(decodes)
        rows, cu_seqlens_q = decodes, self._running.numbers[: num_decodes + 1]
        query_lens = self._running.ones[:num_decodes]
        positions = self._extensions[0].positions if num_decodes else query_lens
        tokens = table.token_ids.reshape(-1).take(decodes * table.token_ids.shape[1] + positions)
        if self._prefills:
            rows = np.concatenate([decodes, np.array([row for row, _, _ in self._prefills], dtype=np.int64)])
            seqs = table.handles_of(rows)
            query_lens = np.concatenate([query_lens, np.array([count for _, _, count in self._prefills], dtype=np.int32)])
            cu_seqlens_q = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(query_lens, dtype=np.int32)])
            tokens = np.concatenate([tokens, *(table.token_ids[row, at : at + count] for row, at, count in self._prefills)])
            positions = _joined([extension.positions for extension in self._extensions], axis=0)
        logits, sampling, sampled_from = self._logits(rows, cu_seqlens_q)
        groups = range(self._manager.num_groups)
        return StepPlan(
            step=step,
            seqs=seqs,
            rows=rows,
            token_ids=tokens,
            positions=positions,
            query_lens=query_lens,
            seq_lens=table.num_reserved[rows],
            cu_seqlens_q=cu_seqlens_q,
            slot_mapping=_joined([extension.slot_mapping for extension in self._extensions], axis=1),
            block_tables=_readonly(table.block_tables),
            copies=tuple(_joined([extension.copies[group] for extension in self._extensions], axis=0) for group in groups),
            num_decodes=num_decodes,
            logits_indices=logits,
            sampling_seqs=sampling,
            sampling_logits=sampled_from,
        )

    def _logits(self, rows: Int64Array, cu_seqlens_q: Int32Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Which packed tokens need logits, which sequences sample, and from which of those logits."""
        table = self._manager.table
        if not self._prefills:
            every = self._running.long_numbers[: len(rows)]
            return every, every, every
        last = cu_seqlens_q[1:].astype(np.int64) - 1
        sampling = np.flatnonzero(table.num_reserved[rows] == table.num_tokens[rows])
        if not self._running.prompt_logits[rows].any():
            return last[sampling], sampling, np.arange(len(sampling))
        wanted = np.zeros(int(cu_seqlens_q[-1]), dtype=np.bool_)
        wanted[last[sampling]] = True
        for seq in np.flatnonzero(self._running.prompt_logits[rows]).tolist():
            wanted[cu_seqlens_q[seq] : cu_seqlens_q[seq + 1]] = True
        indices = np.flatnonzero(wanted)
        return indices, sampling, np.searchsorted(indices, last[sampling])


def _joined(parts: list[_Array], *, axis: int) -> _Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def _readonly(array: Int32Array) -> Int32Array:
    view = array.view()
    view.flags.writeable = False
    return view
