"""The running branches as arrays: what the step path needs to know of each, by row of the manager's table.

Owns the admission order and the per-row limits. Does not own blocks, tokens or who waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pagedkv.core import SequenceTable
from pagedkv.plan import BoolArray, Int32Array, Int64Array
from pagedkv.scheduling.needs import BlockNeeds
from pagedkv.scheduling.request import Branch

_NO_TOKEN = -1  # could not be sampled
_NO_STOP = -2
_Array = TypeVar("_Array", Int32Array, Int64Array)


class RunningSet:
    """Rows in order of admission, with their limits.

    Attributes:
        ones, numbers, long_numbers: ``[R]`` ones, ``[R + 1]`` int32 and ``[R]`` int64 counts from 0, of which plans show slices.
        hold: ``[R]`` int32 known tokens not to compute yet: 1 for a trunk, whose last prompt token is left to its forks.
        limits: ``[R]`` int32 known tokens at which the branch ends for its length.
        minimums: ``[R]`` int32 known tokens below which a stop id does not end it.
        prompt_logits: ``[R]`` bool, logits of all prompt tokens are wanted.
    """

    def __init__(self, table: SequenceTable) -> None:
        size = table.max_num_seqs
        self._table = table
        self._members: list[int] = []
        self._rows: Int64Array | None = None
        self._seqs = np.zeros(0, dtype=np.int64)
        self._steady: SteadyRows | None = None
        self.ones = _frozen(np.ones(size, dtype=np.int32))
        self.numbers = _frozen(np.arange(size + 1, dtype=np.int32))
        self.long_numbers = _frozen(np.arange(size, dtype=np.int64))
        self.hold = np.zeros(size, dtype=np.int32)
        self.limits = np.zeros(size, dtype=np.int32)
        self.minimums = np.zeros(size, dtype=np.int32)
        self.prompt_logits = np.zeros(size, dtype=np.bool_)
        self._stops = np.full((size, 1), _NO_STOP, dtype=np.int32)
        self._prompt_lens = np.zeros(size, dtype=np.int32)
        self._branches: list[Branch | None] = [None] * size
        self.num_trunks = 0
        self.num_reserved_rows = 0  # rows that trunks will need for their forks
        self.num_preempted = 0  # running branches that were preempted before

    def __len__(self) -> int:
        return len(self._members)

    @property
    def rows(self) -> Int64Array:
        """``[n]`` int64 rows of running branches, in order of admission; the same array until the set changes."""
        if self._rows is None:
            rows = np.array(self._members, dtype=np.int64)
            seqs = self._table.handles_of(rows)
            seqs.flags.writeable = False
            self._rows, self._seqs = rows, seqs
        return self._rows

    @property
    def seqs(self) -> Int64Array:
        """``[n]`` int64 their handles, frozen: the manager recognises the array."""
        return self._seqs if self._rows is not None else self._table.handles_of(self.rows)

    def branch(self, row: int) -> Branch:
        """The branch that runs in this row."""
        branch = self._branches[row]
        if branch is None:
            raise LookupError(f"row {row} has no running branch")
        return branch

    def holder(self, row: int) -> Branch | None:
        """The branch that runs in this row, if one does."""
        return self._branches[row]

    @property
    def branches(self) -> list[Branch]:
        """Running branches in order of admission."""
        return [self.branch(row) for row in self._members]

    def add(self, branch: Branch) -> None:
        """Note a branch that has just got its row."""
        row, request = branch.row, branch.request
        stops = request.eos_token_ids + request.stop_token_ids
        if len(stops) > self._stops.shape[1]:
            wider = np.full((len(self._stops), len(stops)), _NO_STOP, dtype=np.int32)
            wider[:, : self._stops.shape[1]] = self._stops
            self._stops = wider
        self._stops[row] = _NO_STOP
        self._stops[row, : len(stops)] = stops
        self._prompt_lens[row] = prompt = len(request.prompt_token_ids)
        self.hold[row] = int(branch.is_trunk)
        self.limits[row] = prompt + request.max_tokens
        self.minimums[row] = prompt + min(request.min_tokens, request.max_tokens + 1)  # more is never reached, and may not fit int32
        self.prompt_logits[row] = request.wants_prompt_logits
        self._branches[row] = branch
        self._members.append(row)
        self._rows = self._steady = None
        self.num_preempted += branch.num_preemptions > 0
        if branch.is_trunk:
            self.num_trunks += 1
            self.num_reserved_rows += branch.width - 1

    def drop(self, rows: list[int]) -> None:
        """Forget branches whose rows are about to be given back."""
        for row in rows:
            branch = self.branch(row)
            if branch.is_trunk:
                self.num_trunks -= 1
                self.num_reserved_rows -= branch.width - 1
            self.num_preempted -= branch.num_preemptions > 0
            self._branches[row] = None
            self._members.remove(row)
        self._rows = self._steady = None

    @property
    def steady(self) -> SteadyRows | None:
        """The running rows when it is known that all of them decode: all got a token in the last step, and the set is the same since."""
        return self._steady

    def note_tokens(self, rows: Int64Array, token_ids: Int32Array) -> None:
        """Note what tokens these rows got, -1 for none; the running set is steady from now on if they are all of it, by identity."""
        self._steady = None
        if rows is self._rows and int(token_ids[token_ids.argmin()]) >= 0:
            headroom = self.limits[rows] - self._table.num_tokens[rows]
            stops = self._stops[rows].T
            missing = np.full((1, len(rows)), _NO_TOKEN, dtype=np.int32)
            special = np.concatenate([missing, stops[(stops != _NO_STOP).any(axis=1)]])
            self._steady = SteadyRows(self.seqs, rows, token_ids, tuple(special), int(headroom.min()))

    def remaining(self) -> Int32Array:
        """``[n]`` known tokens of each running row that are still to compute now."""
        rows = self.rows
        left: Int32Array = self._table.num_tokens[rows] - self._table.num_reserved[rows]
        return left - self.hold[rows] if self.num_trunks else left

    def ended(self, rows: Int64Array, token_ids: Int32Array) -> tuple[Int64Array, BoolArray]:
        """Which of these branches end with the tokens that they have just got, and which of those by a stop id, not by their length."""
        known = self._table.num_tokens[rows]
        stopped = (self._stops[rows] == token_ids[:, None]).any(axis=1)
        stopped &= known >= self.minimums[rows]
        ends = (stopped | (known >= self.limits[rows])).nonzero()[0]
        return ends, stopped[ends]

    def at_first_token(self, rows: Int64Array) -> Int64Array:
        """Those rows that have exactly one token behind their prompt."""
        first: Int64Array = rows[self._table.num_tokens[rows] == self._prompt_lens[rows] + 1]
        return first

    def outstanding_blocks(self, needs: BlockNeeds) -> Int64Array:
        """``[G]`` blocks of each layer group that the running rows need for the tokens they know, plus the next one of each."""
        outstanding: Int64Array = self._blocks_short(self._table.num_tokens[self.rows] + 1, needs).sum(axis=1)
        return outstanding

    def worst_case_blocks(self, needs: BlockNeeds) -> Int64Array:
        """``[G]`` blocks of each layer group that the running rows may still need until all of them have ended for their length."""
        last, size = self.limits[self.rows] - 1, self._table.block_size
        short = self._blocks_short(last, needs)
        short += self._table.tail_shared[self.rows]
        widths = np.array([branch.width for branch in self.branches]) if self.num_trunks else self.ones[: len(self.rows)]
        if self.num_trunks:
            own = last - (self._prompt_lens[self.rows] - 1) // size * size
            short += (widths - 1) * needs.of_blocks(-(-own // size))
        worst: Int64Array = short.sum(axis=1)
        for group in needs.windowed:
            worst[group] = (widths * needs.of_blocks(-(-last // size))[group]).sum() - needs.num_distinct(group, self.rows)
        return worst

    def _blocks_short(self, num_tokens: Int32Array, needs: BlockNeeds) -> Int64Array:
        short: Int64Array = needs.of_blocks(-(-num_tokens // self._table.block_size)) - needs.held(self.rows)
        return np.maximum(short, 0)  # a chunk may hold more behind a window for one step than is needed


@dataclass(slots=True, eq=False)
class SteadyRows:
    """Running rows that all get a token in each step, and what there is to know to see that none of them ends.

    Attributes:
        seqs, rows: ``[n]`` int64 their handles and themselves.
        token_ids: ``[n]`` int32 the tokens they got last, frozen.
        special: ``K`` times ``[n]`` int32 ids that need a closer look: those that end each of them, and -1 for a token that is missing.
            One by one, they take numpy less time than together.
        headroom: tokens that each of them may get before the first ends for its length.
    """

    seqs: Int64Array
    rows: Int64Array
    token_ids: Int32Array
    special: tuple[Int32Array, ...]
    headroom: int

    def all_go_on(self, token_ids: Int32Array) -> bool:
        """Whether all have got a token now, and it is plain that none ends with it."""
        return self.headroom > 1 and not any(np.count_nonzero(special == token_ids) for special in self.special)

    def go_on(self, token_ids: Int32Array) -> None:
        """Note the tokens that all have got."""
        self.token_ids = token_ids
        self.headroom -= 1


def _frozen(array: _Array) -> _Array:
    array.flags.writeable = False
    return array
