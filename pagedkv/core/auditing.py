"""The full audit of a manager: what must hold between tables, pools, caches and pins. Owns no state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pagedkv.core.block_pool import NULL_BLOCK
from pagedkv.core.layer_group import LayerGroup
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.errors import InvariantError
from pagedkv.plan import Int32Array


def check(table: SequenceTable, groups: Sequence[LayerGroup], pins: Mapping[int, tuple[Int32Array, ...]]) -> None:
    """Verify all invariants; O(everything).

    Besides those of ``BlockPool.check`` and ``PrefixCache.check``:

    1. computed tokens <= reserved tokens <= known tokens, for every sequence;
    2. a sequence has exactly the blocks that its reserved tokens need, the same number in every group;
    3. behind its blocks, a table holds only the null block; within them, never;
    4. a row without a sequence is empty;
    5. a block's references are its mentions in tables and pins, no more and no fewer;
    6. a sequence's published blocks are its leading ones, full, computed, findable, and in its own namespace;
    7. a half-full last block that is not marked as shared has one holder and is not findable.

    Raises:
        InvariantError: naming the first that is broken, with the row or block.
    """
    for group in groups:
        group.check()
    for problem in _problems(table, groups, pins):
        raise InvariantError(f"manager: {problem}")


def _problems(table: SequenceTable, groups: Sequence[LayerGroup], pins: Mapping[int, tuple[Int32Array, ...]]) -> Iterator[str]:
    live = table.live_rows
    size = table.token_ids.shape[1] // table.block_tables.shape[2]
    dead = np.setdiff1d(np.arange(table.max_num_seqs), live)
    if table.num_tokens[dead].any() or table.num_blocks[dead].any() or table.block_tables[:, dead].any():
        yield "a row without a sequence is not empty"
    if len(dead) != table.num_free_rows:
        yield "free rows and live rows do not sum to all rows"
    for row in live.tolist():
        computed, reserved, known = (int(column[row]) for column in (table.num_computed, table.num_reserved, table.num_tokens))
        if not 0 <= computed <= reserved <= known:
            yield f"row {row}: computed {computed}, reserved {reserved} and known {known} tokens are out of order"
        if int(table.num_blocks[row]) != -(-reserved // size):
            yield f"row {row}: {int(table.num_blocks[row])} blocks for {reserved} reserved tokens"
        if int(table.num_published[row]) > computed // size:
            yield f"row {row}: {int(table.num_published[row])} blocks published of {computed // size} full ones"
    for index, group in enumerate(groups):
        yield from _group_problems(table, index, group, [held[index] for held in pins.values()], size)


def _group_problems(table: SequenceTable, index: int, group: LayerGroup, pinned: list[Int32Array], size: int) -> Iterator[str]:
    mentions = np.zeros(group.pool.num_blocks, dtype=np.int64)
    for ids in pinned:
        np.add.at(mentions, ids, 1)
    for row in table.live_rows.tolist():
        held = int(table.num_blocks[row])
        ids = table.block_tables[index, row]
        if (ids[:held] == NULL_BLOCK).any() or ids[held:].any():
            yield f"row {row}: the null block and the table's {held} blocks are mixed up"
        np.add.at(mentions, ids[:held], 1)
        leading = ids[: int(table.num_published[row])]
        if not group.pool.cached[leading].all():
            yield f"row {row}: a block counted as published is not findable"
        if len(leading) and not np.isin(leading, group.cache.blocks_of(int(table.roots[row]))).all():
            yield f"row {row}: a published block belongs to another namespace"
        if int(table.num_reserved[row]) % size and not table.tail_shared[row] and group.pool.is_shared(ids[held - 1 : held]).any():
            yield f"row {row}: its writable block {int(ids[held - 1])} is shared or findable"
    wrong = np.flatnonzero(mentions != group.pool.references)
    if len(wrong):
        block = int(wrong[0])
        yield f"block {block} has {int(group.pool.references[block])} references and {int(mentions[block])} mentions"
