"""The full audit of a manager: what must hold between tables, pools, caches and pins. Owns no state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from pagedkv.core.block_pool import NULL_BLOCK
from pagedkv.core.layer_group import Group, LayerGroup
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.errors import InvariantError
from pagedkv.plan import Int32Array


def check(table: SequenceTable, groups: Sequence[Group], pins: Mapping[int, tuple[Int32Array, ...]]) -> None:
    """Verify all invariants; O(everything), about 50 microseconds for a manager of two small groups.

    Of each pool:

    1. no block has a negative count of references;
    2. the null block is neither held nor cached;
    3. the free list names blocks of the pool only, and never the null block;
    4. it names each of them once;
    5. a free block is held by nobody;
    6. a free block is not cached;
    7. the eviction policy holds as many blocks as are cached and held by nobody;
    8. free, evictable and held blocks sum to the pool.

    Of each prefix cache:

    9. the block that a key finds carries that key;
    10. a findable block's parent is findable;
    11. it is in the namespace of its parent;
    12. a block counts as many children as name it for their parent;
    13. only a findable block carries a key or a namespace.

    Between a pool and its cache:

    14. as many blocks are cached as are findable;
    15. a findable block is cached.

    Of the tables, and between them and the rest:

    16. a row without a sequence is empty;
    17. free and live rows sum to all rows;
    18. computed tokens <= reserved tokens <= known tokens, for every sequence;
    19. a sequence has exactly the blocks that its reserved tokens need, the same number in every group;
    20. of its published blocks, all are full and computed;
    21. behind its blocks, and before those inside a window, a table holds only the null block; within them, never;
    22. its published blocks are its leading ones, and findable;
    23. they are in its own namespace;
    24. a half-full last block that is not marked as shared has one holder and is not findable;
    25. tables and pins name blocks of the pool only;
    26. a block's references are its mentions in tables and pins, no more and no fewer.

    Of a windowed group, whose blocks are found by way of the first group's:

    27. the block that another finds belongs to that one;
    28. a block belongs only to one that finds it;
    29. that one is findable itself;
    30. a sequence's published blocks belong to its blocks in the same places of the first group.

    Raises:
        InvariantError: naming the first that is broken, with the row or block.
    """
    for group in groups:
        group.check()
    leading = groups[0].cache.published()
    for group in groups:
        if not isinstance(group, LayerGroup) and not group.cache.leading() <= leading:
            raise InvariantError("window cache: a block belongs to one of the first group that is not findable")
    for problem in _problems(table, groups, pins):
        raise InvariantError(f"manager: {problem}")


def _problems(table: SequenceTable, groups: Sequence[Group], pins: Mapping[int, tuple[Int32Array, ...]]) -> Iterator[str]:
    # Lists, not arrays: audits run after every operation on managers of a few rows and blocks, where an array operation costs more than a
    # look at every item.
    size, live, tables = table.block_size, table.live_rows.tolist(), table.block_tables.tolist()
    known, reserved, computed = table.num_tokens.tolist(), table.num_reserved.tolist(), table.num_computed.tolist()
    held, published = table.num_blocks.tolist(), table.num_published.tolist()
    alive = set(live)
    dead = [row for row in range(table.max_num_seqs) if row not in alive]
    if any(known[row] or held[row] or any(map(any, (blocks[row] for blocks in tables))) for row in dead):
        yield "a row without a sequence is not empty"
    if len(dead) != table.num_free_rows:
        yield "free rows and live rows do not sum to all rows"
    for row in live:
        if not 0 <= computed[row] <= reserved[row] <= known[row]:
            yield f"row {row}: computed {computed[row]}, reserved {reserved[row]} and known {known[row]} tokens are out of order"
        if held[row] != -(-reserved[row] // size):
            yield f"row {row}: {held[row]} blocks for {reserved[row]} reserved tokens"
        if published[row] > computed[row] // size:
            yield f"row {row}: {published[row]} blocks published of {computed[row] // size} full ones"
    marked, roots = table.tail_shared.tolist(), table.roots.tolist()
    for index, group in enumerate(groups):
        gone = [0 if group.window is None else group.window.num_dead_blocks(computed[row] // size, size) for row in live]
        rows = [
            _Row(row, gone, held[row], published[row], roots[row], tables[0][row], bool(reserved[row] % size and not marked[row]))
            for row, gone in zip(live, gone, strict=True)
        ]
        pinned = chain.from_iterable(blocks[index].tolist() for blocks in pins.values())
        yield from _group_problems(group, rows, tables[index], pinned)


class _Row(NamedTuple):
    """A row: its blocks that are gone behind the window, all its blocks, those of them published, its root, its blocks in the first group,
    and whether it owns its last block."""

    row: int
    gone: int
    held: int
    published: int
    root: int
    leading: list[int]
    owns_tail: bool


def _group_problems(group: Group, rows: list[_Row], tables: list[list[int]], pinned: Iterable[int]) -> Iterator[str]:
    """Problems of one group's tables."""
    references, public = group.pool.references.tolist(), group.cache.published()
    shared = {block for block, count in enumerate(references) if count > 1}
    mentioned = list(pinned)
    for row, gone, held, published, root, leading, owns_tail in rows:
        ids = tables[row][gone:held]
        if NULL_BLOCK in ids or any(tables[row][held:]) or any(tables[row][:gone]):
            yield f"row {row}: the null block and the table's {held} blocks are mixed up"
        mentioned += ids
        if published > gone:
            public_ids = ids[: published - gone]
            if not public.issuperset(public_ids):
                yield f"row {row}: a block counted as published is not findable"
            if isinstance(group, LayerGroup):
                if group.cache.roots_of(public_ids).count(root) != len(public_ids):
                    yield f"row {row}: a published block belongs to another namespace"
            elif group.cache.find_all(leading[gone:published]) != public_ids:
                yield f"row {row}: a published block belongs to another one than the row's in the first group"
        if owns_tail and (ids[-1] in shared or ids[-1] in public):
            yield f"row {row}: its writable block {ids[-1]} is shared or findable"
    if mentioned and not NULL_BLOCK < min(mentioned) <= max(mentioned) < len(references):
        yield f"tables name the blocks {min(mentioned)} to {max(mentioned)}, the pool ends with {len(references) - 1}"
    unmentioned = list(references)
    for block in mentioned:
        unmentioned[block] -= 1
    if any(unmentioned):
        block = next(block for block, count in enumerate(unmentioned) if count)
        yield f"block {block} has {references[block]} references and {references[block] - unmentioned[block]} mentions"
