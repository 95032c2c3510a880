"""Putting a step plan together: reserves slots as rows are added, then freezes the arrays. Lives for one ``plan()`` call."""

from __future__ import annotations

import numpy as np

from pagedkv.core import Extension, KVCacheManager
from pagedkv.plan import Int32Array, Int64Array, StepPlan
from pagedkv.scheduling.config import SchedulerConfig
from pagedkv.scheduling.running import RunningSet


class PlanBuilder:
    """Collects decodes (first, all at once) and prefill chunks (one by one).

    Args:
        manager: takes the reservations.
        config: the step's token budget, and whether prompts may be split.
        running: knows which rows hold tokens back and which want prompt logits.
    """

    def __init__(self, manager: KVCacheManager, config: SchedulerConfig, running: RunningSet) -> None:
        self._manager = manager
        self._config = config
        self._running = running
        self.decodes: Int64Array = running.long_numbers[:0]
        self._seqs = self.decodes
        self._prefills: list[tuple[int, int, int]] = []  # row, first position, tokens
        self._extensions: list[Extension] = []
        self.num_tokens = 0

    def add_decodes(self, rows: Int64Array) -> None:
        """Reserve one slot in each row; raises ``OutOfBlocksError`` before any change."""
        seqs = self._running.seqs if rows is self._running.rows else self._manager.table.handles_of(rows)
        self._extensions.append(self._manager.extend(seqs, 1))
        self.decodes, self._seqs = rows, seqs
        self.num_tokens = len(rows)

    @property
    def budget(self) -> int:
        """Prompt tokens that the step may still take."""
        counted = self.num_tokens if self._config.recurrent_state != "whole" else self.num_tokens - len(self.decodes)
        return self._config.max_num_batched_tokens - counted

    def takes(self, num_tokens: int) -> bool:
        """Whether a sequence that has so many tokens to compute, and none computed, may start in this step."""
        least = 1 if self._config.recurrent_state != "whole" else min(num_tokens, self._config.max_num_batched_tokens)
        return least <= self.budget

    def fit_chunk(self, row: int) -> int:
        """Tokens of this row that can be computed now: what is left to compute, within the budget and the blocks at hand."""
        table, size = self._manager.table, self._manager.block_size
        start = int(table.num_reserved[row])
        left = int(table.num_tokens[row]) - int(self._running.hold[row]) - start
        # No copy to reckon with: a half-full last block that others hold is written by decodes alone, the first tokens of forks.
        room = (int(table.num_blocks[row]) + self._manager.num_available_blocks) * size - start
        fitting = min(left, self.budget, room)
        if self._config.recurrent_state != "whole":
            return fitting
        # What no step holds begins with a step full, and goes on token by token.
        piece = 1 if start else min(left, self._config.max_num_batched_tokens)
        return piece if piece <= fitting else 0

    def add_prefill(self, row: int, num_tokens: int) -> None:
        """Reserve slots for a chunk that ``fit_chunk`` allowed."""
        start = int(self._manager.table.num_reserved[row])
        handle = self._manager.table.handles_of(np.array([row]))
        self._extensions.append(self._manager.extend(handle, np.array([num_tokens], dtype=np.int32)))
        self._prefills.append((row, start, num_tokens))
        self.num_tokens += num_tokens

    def build(self, step: int) -> StepPlan:
        """Freeze the plan; O(tokens), a fixed number of array operations for the decodes."""
        if self._prefills:
            return self._build_mixture(step)
        (extension,) = self._extensions
        return plan_of_decodes(step, self._manager, self._running, (self._seqs, self.decodes, self._decoded_tokens()), extension)

    def _build_mixture(self, step: int) -> StepPlan:
        table, parts = self._manager.table, self._extensions
        rows = np.concatenate([self.decodes, np.array([row for row, _, _ in self._prefills], dtype=np.int64)])
        ones = self._running.ones[: len(self.decodes)]
        query_lens = np.concatenate([ones, np.array([count for _, _, count in self._prefills], dtype=np.int32)])
        cu_seqlens_q = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(query_lens, dtype=np.int32)])
        chunks = [table.token_ids[row, at : at + count] for row, at, count in self._prefills]
        logits, sampling, sampled_from = self._logits(rows, cu_seqlens_q)
        groups = range(self._manager.num_groups)
        return StepPlan(
            step=step,
            seqs=table.handles_of(rows),
            rows=rows,
            token_ids=np.concatenate([self._decoded_tokens(), *chunks]),
            positions=np.concatenate([part.positions for part in parts]),
            query_lens=query_lens,
            seq_lens=np.concatenate([part.seq_lens for part in parts]),
            cu_seqlens_q=cu_seqlens_q,
            slot_mapping=np.concatenate([part.slot_mapping for part in parts], axis=1),
            block_tables=_readonly(table.block_tables),
            copies=tuple(np.concatenate([part.copies[group] for part in parts]) for group in groups),
            num_decodes=len(self.decodes),
            logits_indices=logits,
            sampling_seqs=sampling,
            sampling_logits=sampled_from,
        )

    def _decoded_tokens(self) -> Int32Array:
        table, rows = self._manager.table, self.decodes
        tokens: Int32Array = table.token_ids[rows, table.num_tokens[rows] - 1]  # what decodes computes the one token that has no slot yet
        return tokens

    def _logits(self, rows: Int64Array, cu_seqlens_q: Int32Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Which packed tokens need logits, which sequences sample, and from which of those logits."""
        table = self._manager.table
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


def plan_of_decodes(
    step: int, manager: KVCacheManager, running: RunningSet, decodes: tuple[Int64Array, Int64Array, Int32Array], extension: Extension
) -> StepPlan:
    """The plan of a step in which every sequence computes one token and samples: their handles, rows and tokens are ``decodes``."""
    seqs, rows, token_ids = decodes
    count = len(rows)
    every = running.long_numbers[:count]
    return StepPlan(
        step=step,
        seqs=seqs,
        rows=rows,
        token_ids=token_ids,
        positions=extension.positions,
        query_lens=running.ones[:count],
        seq_lens=extension.seq_lens,
        cu_seqlens_q=running.numbers[: count + 1],
        slot_mapping=extension.slot_mapping,
        block_tables=_readonly(manager.table.block_tables),
        copies=extension.copies,
        num_decodes=count,
        logits_indices=every,
        sampling_seqs=every,
        sampling_logits=every,
    )


def _readonly(array: Int32Array) -> Int32Array:
    view = array.view()
    view.setflags(write=False)
    return view
