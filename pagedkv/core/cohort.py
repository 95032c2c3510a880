"""Sequences that decode together, step after step: every step's slots follow from those of the step before, and are not looked up anew.

Owns no truth: the table is written in every step as by any other command, and the manager forgets the cohort before another command changes
a row. What a cohort saves is finding out: as long as nothing else happens, every length grows by one, every slot is the one behind the
last, and who fills a block in which step is known ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pagedkv.core.publication import Publication
from pagedkv.core.reservations import Extension, Reservations
from pagedkv.core.retirement import Retirement
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.errors import OutOfBlocksError
from pagedkv.plan import Int32Array, Int64Array

_Array = TypeVar("_Array", Int32Array, Int64Array)


class Cohort:
    """Decode steps, one after the other, of sequences that all have one known token without a slot and whose other tokens are computed.

    Args:
        seqs: ``[n]`` int64 the frozen array that stands for the cohort: it is recognised by identity.
        rows: ``[n]`` int64 their rows, at least one; none of their last blocks may be shared.
        table: what is known of all sequences.
        reservations: takes the blocks.
        publication: makes full blocks findable; none where prefix caching is off.
        retirement: gives back the blocks behind windows; none where no group has one.
        max_seq_len: tokens in one sequence at most.
    """

    def __init__(
        self,
        seqs: Int64Array,
        rows: Int64Array,
        *,
        table: SequenceTable,
        reservations: Reservations,
        publication: Publication | None,
        retirement: Retirement | None,
        max_seq_len: int,
    ) -> None:
        self._seqs = seqs
        self._rows = rows
        self._table = table
        self._reservations = reservations
        self._publication = publication
        self._retirement = retirement
        self._minds_full_blocks = publication is not None or retirement is not None
        size = table.block_size
        self._size = np.int64(size)
        self._is_reserved = False
        # Steps are added as arrays: numpy takes twice as long for a single number, and longer still for one of Python's own.
        self._ones_32, self._ones_64 = np.ones(len(rows), dtype=np.int32), np.ones(len(rows), dtype=np.int64)
        positions = table.num_reserved[rows]
        columns = table.token_ids.shape[1]
        # A sequence that outgrows the table's columns, or may not grow any more, is for the manager to deal with.
        self._steps_left = min(columns, max_seq_len) - 1 - int(positions.max())
        self._clock = 0  # steps, modulo the block size
        self._openings = -positions % size  # the time at which each member opens a block
        self._waves: list[_Wave | None] = [None] * size
        # Of the next step: where its tokens stand, and how many tokens have slots after it. Handed out, so replaced and never written.
        self._positions = _frozen(positions)
        self._seq_lens = _frozen(positions + self._ones_32)
        # Of the last step, ``[G + 1, n]``: the slots of its tokens in each group, and the flat places of the tokens that it appended.
        self._places = np.concatenate([self._slots_behind(positions), [rows * columns + positions]])

    def can_extend(self, seqs: object) -> bool:
        """Whether these are the cohort's sequences, and a step of theirs can follow."""
        return seqs is self._seqs and not self._is_reserved and self._steps_left > 0

    def can_complete(self, seqs: object) -> bool:
        """Whether these are the cohort's sequences, and a step of theirs is reserved."""
        return seqs is self._seqs and self._is_reserved

    def extend(self) -> Extension:
        """One more slot for each member; raises ``OutOfBlocksError`` before any change."""
        table, reservations = self._table, self._reservations
        wave = self._waves[self._clock] or self._wave(self._clock)
        count = len(wave.members)
        places = self._places + self._ones_64
        slots = places[:-1]
        if len(slots) > 1:
            reservations.check_available([count] * len(slots))
        change = table.change
        change.depth += 1  # by hand, here and below: ``with`` takes a tenth as long as all the rest
        if count:
            try:
                self._open_blocks(wave, slots)
            except OutOfBlocksError:  # a single group refuses by itself, before it changes anything
                change.depth -= len(slots) == 1
                raise
        table.num_reserved[self._rows] = self._seq_lens
        self._places = places
        self._is_reserved = True
        change.depth -= 1
        return Extension(_frozen(slots), self._positions, self._seq_lens, reservations.no_copies)

    def complete(self, token_ids: Int32Array) -> None:
        """The step is computed and every member gets a token: ``[n]`` int32, none below 0."""
        table, rows = self._table, self._rows
        change = table.change
        change.depth += 1
        table.num_computed[rows] = self._seq_lens
        table.flat_token_ids[self._places[-1]] = token_ids
        self._positions, self._seq_lens = self._seq_lens, _frozen(self._seq_lens + self._ones_32)
        table.num_tokens[rows] = self._seq_lens
        self._is_reserved = False
        self._steps_left -= 1
        self._clock = (self._clock + 1) % len(self._waves)
        if self._minds_full_blocks:
            wave = self._waves[self._clock] or self._wave(self._clock)  # who opens a block next has just filled the last
            if len(wave.members):
                if self._publication is not None:
                    self._publish(wave, self._publication)
                if self._retirement is not None:
                    self._retirement.give_back(wave.rows, wave.num_blocks - self._ones_32[: len(wave.rows)], wave.num_blocks)
        change.depth -= 1

    def _open_blocks(self, wave: _Wave, slots: Int64Array) -> None:
        """A new block for each member whose turn it is; their slots begin there."""
        count = len(wave.members)
        wave.cells += self._ones_64[:count]
        wave.num_blocks += self._ones_32[:count]
        opened = self._reservations.open_blocks(wave.cells)
        for own, ids in zip(slots, opened, strict=True):
            own[wave.members] = ids.astype(np.int64) * self._size  # of one type: numpy is slower where it has to cast on the way
        wave.parents, wave.blocks = wave.blocks, [ids.tolist() for ids in opened]
        self._table.num_blocks[wave.rows] = wave.num_blocks

    def _publish(self, wave: _Wave, publication: Publication) -> None:
        if wave.is_public:
            wave.blocks = publication.publish_singles(wave.cells, wave.parents, wave.blocks, wave.roots)
            self._table.num_published[wave.rows] = wave.num_blocks
        else:
            publication.publish(wave.rows, wave.num_blocks)

    def _slots_behind(self, positions: Int32Array) -> Int64Array:
        """``[G, n]`` the slots of the last tokens that have one; where a block is opened next, what stands here does not matter."""
        table, columns = self._table, (positions - 1) // self._size
        blocks = table.block_tables.reshape(len(table.block_tables), -1)[:, table.cells(self._rows, columns)]
        return blocks * self._size + (positions - 1) % self._size

    def _wave(self, clock: int) -> _Wave:
        """Find out who opens a block at this time, and what is known of them now."""
        table = self._table
        members = (self._openings == clock).nonzero()[0]
        rows = self._rows[members]
        num_blocks, roots = table.num_blocks[rows], table.roots[rows]
        cells = table.cells(rows, num_blocks - 1)
        blocks, parents = (table.blocks_at(cells - back, num_blocks - 1 - back, roots) for back in (0, 1))
        is_public = np.count_nonzero(roots) == len(roots)
        wave = self._waves[clock] = _Wave(members, rows, cells, num_blocks, parents, blocks, roots.tolist(), is_public)
        return wave


@dataclass(slots=True, eq=False)
class _Wave:
    """The members that open a block in the same step, and so fill it in the same step, ``w`` of them.

    Attributes:
        members: ``[w]`` int64 places in the cohort.
        rows: ``[w]`` int64 rows of the table.
        cells: ``[w]`` int64 flat places of their last blocks in a group's block table.
        num_blocks: ``[w]`` int32 blocks that they hold.
        parents, blocks: per layer group, the ids of their last blocks but one and of their last blocks; the root where there is none.
        roots: their namespace roots.
        is_public: whether all of them may publish.
    """

    members: Int64Array
    rows: Int64Array
    cells: Int64Array
    num_blocks: Int32Array
    parents: list[list[int]]
    blocks: list[list[int]]
    roots: list[int]
    is_public: bool


def _frozen(array: _Array) -> _Array:
    array.setflags(write=False)
    return array
