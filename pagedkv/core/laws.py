"""Conservation laws of a manager: what can be verified after every command without looking at single blocks. Owns no state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pagedkv.core.layer_group import Group
from pagedkv.core.retirement import first_blocks
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.errors import InvariantError
from pagedkv.plan import Int32Array

_WORD = 2**32  # sums of counters are compared modulo this: so they are added without widening, many at once


def check(table: SequenceTable, groups: Sequence[Group], pins: Mapping[int, tuple[Int32Array, ...]]) -> None:
    """Verify the laws that sums alone can show to be broken:

    1. computed tokens <= reserved tokens <= known tokens, in every row;
    2. every row has the blocks that its reserved tokens need, and publishes no more than its full computed ones;
    3. rows with a sequence and free rows sum to all rows;
    4. per group, free, evictable and held blocks sum to the pool;
    5. per group, references sum to the blocks listed in tables and pins, less what is behind the group's window;
    6. per group, the pool and the prefix cache count the same cached blocks.

    What they cannot see: two errors that cancel each other, and which block is wrong. ``auditing.check`` can.

    Raises:
        InvariantError: naming the law and its numbers.

    Cost: some twenty array operations over the rows, and three passes over the counters of each pool (about 0.03 microseconds for
    100 blocks); no loop over sequences or blocks.
    """
    for problem in _row_problems(table):
        raise InvariantError(f"conservation law: {problem}")
    listed = int(table.num_blocks.sum())
    for index, group in enumerate(groups):
        pinned = sum(len(held[index]) for held in pins.values())
        gone = 0 if group.window is None else int(first_blocks(group, table.num_computed, table.block_size).sum())
        for problem in _group_problems(group, listed - gone + pinned):
            raise InvariantError(f"conservation law: group {index}: {problem}")


def _row_problems(table: SequenceTable) -> Iterator[str]:
    computed, reserved, known, size = table.num_computed, table.num_reserved, table.num_tokens, np.int32(table.block_size)
    wrong = (computed < 0) | (computed > reserved) | (reserved > known)
    if np.count_nonzero(wrong):
        row = int(wrong.argmax())
        yield f"row {row}: 0 <= computed {computed[row]} <= reserved {reserved[row]} <= known {known[row]} tokens does not hold"
    room = table.num_blocks * size
    wrong = (room < reserved) | (room - reserved >= size)
    if np.count_nonzero(wrong):
        row = int(wrong.argmax())
        yield f"row {row}: {table.num_blocks[row]} blocks of {size} for {reserved[row]} reserved tokens"
    wrong = table.num_published * size > computed
    if np.count_nonzero(wrong):
        row = int(wrong.argmax())
        yield f"row {row}: {table.num_published[row]} blocks of {size} are published and {computed[row]} tokens computed"
    if table.num_live_rows + table.num_free_rows != table.max_num_seqs:
        yield f"{table.num_live_rows} rows with a sequence and {table.num_free_rows} free ones are not {table.max_num_seqs} rows"


def _group_problems(group: Group, mentions: int) -> Iterator[str]:
    pool = group.pool
    free, evictable, held = pool.num_free, pool.num_evictable, np.count_nonzero(pool.references)
    if free + evictable + held != pool.num_usable:
        yield f"{free} free, {evictable} evictable and {held} held blocks are not the pool's {pool.num_usable}"
    references = int(np.add.reduce(pool.references, dtype=np.int32))
    if (references - mentions) % _WORD:
        yield f"{references} references to blocks, and {mentions} mentions in tables and pins"
    cached = np.count_nonzero(pool.cached)
    if cached != len(group.cache):
        yield f"{cached} blocks are marked as cached, and the prefix cache finds {len(group.cache)}"
