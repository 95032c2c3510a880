"""Bugs of the manager and the prefix cache, one line each: they are planted one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from planting import Plant, changed

from pagedkv.core import Extension, KVCacheManager, Opened
from pagedkv.core.block_pool import BlockPool
from pagedkv.core.cohort import Cohort
from pagedkv.core.eviction import LeastRecentlyUsed
from pagedkv.core.layer_group import LayerGroup
from pagedkv.core.prefix_cache import Namespaces, PrefixCache
from pagedkv.core.publication import Publication
from pagedkv.core.reservations import Reservations
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.plan import Int32Array, Int64Array


def drop_copies(right: Callable[..., Extension], *arguments: object) -> Extension:
    extension = right(*arguments)
    return replace(extension, copies=tuple(copies[:0] for copies in extension.copies))


def shift_slot_at_block_edge(right: Callable[..., Extension], *arguments: object) -> Extension:
    extension = right(*arguments)
    return replace(extension, slot_mapping=extension.slot_mapping + (extension.slot_mapping % 4 == 3))


def publish_before_compute(right: Callable[..., Extension], manager: KVCacheManager, seqs: Sequence[int], counts: object) -> Extension:
    extension = right(manager, seqs, counts)
    rows = manager.rows_of(seqs)
    if manager.prefix_caching:
        manager._publication.publish(rows, manager.table.num_reserved[rows] // manager.block_size)
    return extension


def publish_half_full_block(
    right: Callable[..., None], publication: Publication, rows: Int64Array, full: Int32Array, *rest: object, **options: object
) -> None:
    held = publication._table.num_blocks[rows]
    right(publication, rows, np.minimum(full + 1, held).astype(np.int32), *rest, **options)


def match_the_last_token(
    right: Callable[..., Opened],
    manager: KVCacheManager,
    prompts: Sequence[Sequence[int]],
    namespaces: Sequence[str] | None = None,
    *,
    use_cache: bool = True,
) -> Opened:
    if any(len(prompt) >= manager.max_seq_len for prompt in prompts):
        return right(manager, prompts, namespaces, use_cache=use_cache)
    opened = right(manager, [[*prompt, 0] for prompt in prompts], namespaces, use_cache=use_cache)
    manager.table.num_tokens[manager.rows_of(opened.seqs)] -= 1
    return opened


def forget_copy_pending(right: Callable[..., None], manager: KVCacheManager, seqs: Sequence[int]) -> None:
    manager.table.copy_pending[manager.rows_of(seqs)] = False
    right(manager, seqs)


def lose_pin(right: Callable[..., tuple[int, int]], manager: KVCacheManager, *arguments: object) -> tuple[int, int]:
    pin, num_tokens = right(manager, *arguments)
    for group, ids in zip(manager._groups, manager._pins[pin], strict=True):
        group.pool.release(ids[::-1])
    manager._pins[pin] = tuple(ids[:0] for ids in manager._pins[pin])
    return pin, num_tokens


def fork_without_marking_tails(right: Callable[..., Int64Array], manager: KVCacheManager, seq: int, count: int) -> Int64Array:
    before = manager.table.tail_shared.copy()
    children = right(manager, seq, count)
    manager.table.tail_shared[:] = before
    return children


def fork_one_reference_short(right: Callable[..., Int64Array], manager: KVCacheManager, seq: int, count: int) -> Int64Array:
    children = right(manager, seq, count)
    row = int(manager.rows_of([seq])[0])
    if manager.table.num_blocks[row]:
        manager._groups[0].pool.release(manager.table.block_tables[0, row, :1])
    return children


def keep_key_of_evicted_block(right: Callable[..., None], cache: PrefixCache, block_ids: Int32Array) -> None:
    keys = [(cache._keys[block], block) for block in block_ids.tolist()]
    right(cache, block_ids)
    cache._blocks.update({key: block for key, block in keys if key is not None})


def evict_the_youngest(right: Callable[..., Int32Array], policy: LeastRecentlyUsed, count: int) -> Int32Array:
    everything = right(policy, len(policy))
    policy.insert(everything[: len(everything) - count])
    return everything[len(everything) - count :]


def check_first_group_only(right: Callable[..., None], reservations: Reservations, needed: list[int]) -> None:
    right(reservations, [needed[0], *(0 for _ in needed[1:])])


def keep_publishing_after_purge(right: Callable[..., int], manager: KVCacheManager, namespace: str = "") -> int:
    roots = manager.table.roots.copy()
    purged = right(manager, namespace)
    manager.table.roots[:] = roots
    return purged


def keep_published_count(right: Callable[..., None], reservations: Reservations, rows: Int64Array, kept: Int32Array) -> None:
    published = reservations._table.num_published[rows]
    right(reservations, rows, kept)
    reservations._table.num_published[rows] = published


def settle_without_reference(right: Callable[..., int], group: LayerGroup, block_ids: Int32Array, holders: Int32Array) -> int:
    num_twins = right(group, block_ids, holders)
    if num_twins:
        group.pool.release(holders[holders != block_ids])
    return num_twins


def one_parent_for_all(right: Callable[..., Int32Array], cache: PrefixCache, parents: Int32Array, *rest: Int32Array) -> Int32Array:
    return right(cache, rest[-1], *rest)


def accept_old_handles(right: Callable[..., Int64Array], table: SequenceTable, seqs: Sequence[int] | Int64Array) -> Int64Array:
    seqs = np.asarray(seqs, dtype=np.int64)
    rows = seqs & 0xFFFFFFFF
    live = table.live_rows
    return right(table, table.handles_of(rows)) if len(seqs) == 1 and rows[0] in live else right(table, seqs)


def let_go_head_first(right: Callable[..., Int32Array], manager: KVCacheManager, index: int, rows: Int64Array, **_: bool) -> Int32Array:
    return right(manager, index, rows)


def copy_without_need(right: Callable[..., Int64Array], reservations: Reservations, index: int, rows: Int64Array) -> Int64Array:
    return rows


def keep_cohort(right: Callable[..., Int64Array], manager: KVCacheManager, seqs: Sequence[int]) -> Int64Array:
    return manager.rows_of(seqs)


def settle_later(right: Callable[..., None], cohort: Cohort, wave: object, publication: Publication) -> None:
    right(cohort, cohort._wave((cohort._clock + 1) % cohort._size), publication)


def open_too_late(right: Callable[..., object], cohort: Cohort, clock: int) -> object:
    return right(cohort, (clock - 1) % int(cohort._size))


def take_tails_for_own(right: Callable[..., bool], manager: KVCacheManager, rows: Int64Array, start: Int32Array) -> bool:
    shared = manager.table.tail_shared[rows]
    manager.table.tail_shared[rows] = False
    answer = right(manager, rows, start)
    manager.table.tail_shared[rows] = shared
    return answer


def one_namespace_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("find", "intern"):
        changed(Namespaces, name, lambda right, names, _: right(names, ""))(monkeypatch)


def leak_the_last_block(right: Callable[..., None], manager: KVCacheManager, seqs: Sequence[int]) -> None:
    rows = manager.rows_of(seqs)
    for group, table in zip(manager._groups, manager.table.block_tables, strict=True):
        group.pool.acquire(table[rows[-1:], manager.table.num_blocks[rows[-1:]] - 1][manager.table.num_blocks[rows[-1:]] > 0])
    right(manager, seqs)


def keep_reservations(right: Callable[..., None], manager: KVCacheManager, seqs: Int64Array) -> None:
    """Nothing is taken back."""


def ignore_the_last_token_of_a_block(right: Callable[..., list[int]], cache: PrefixCache, root: int, token_ids: Int32Array) -> list[int]:
    asked = token_ids.copy()
    size = cache._width // 4
    asked[size - 1 :: size] = 0
    return right(cache, root, asked)


def match_one_block_less(right: Callable[..., list[int]], *arguments: object) -> list[int]:
    return right(*arguments)[:-1]


def forget_only_what_is_named(right: Callable[..., Int32Array], cache: PrefixCache, block_ids: Int32Array) -> Int32Array:
    return np.unique(block_ids)


def keep_publishing_after_distrust(right: Callable[..., int], manager: KVCacheManager, seqs: Sequence[int]) -> int:
    roots, published = manager.table.roots.copy(), manager.table.num_published.copy()
    forgotten = right(manager, seqs)
    manager.table.roots[:], manager.table.num_published[:] = roots, np.where(manager.table.num_published, published, 0)
    return forgotten


def cut_without_marking_tails(right: Callable[..., None], reservations: Reservations, rows: Int64Array, kept: Int32Array) -> None:
    before = reservations._table.tail_shared[rows]
    right(reservations, rows, kept)
    reservations._table.tail_shared[rows] = before


def acquire_each_block_once(right: Callable[..., None], pool: BlockPool, block_ids: Int32Array) -> None:
    right(pool, np.unique(block_ids))


def allow_one_block_too_many(right: Callable[..., None], reservations: Reservations, needed: list[int]) -> None:
    right(reservations, [max(count - 1, 0) for count in needed])


def lose_a_freed_block(right: Callable[..., None], pool: BlockPool, block_ids: Int32Array) -> None:
    right(pool, block_ids[1:] if len(block_ids) > 1 else block_ids)


def evict_without_forgetting(right: Callable[..., Int32Array], group: LayerGroup, count: int) -> Int32Array:
    return group.pool.take(count).block_ids


def overwrite_the_last_token(
    right: Callable[..., None], manager: KVCacheManager, rows: Int64Array, tokens: Int32Array, known: Int32Array
) -> None:
    right(manager, rows, tokens, known - (known % manager.block_size == 0))


def settle_namespaces_backwards(
    right: Callable[..., Opened], manager: KVCacheManager, prompts: Sequence[Sequence[int]], namespaces: Sequence[str] | None = None
) -> Opened:
    return right(manager, prompts, None if namespaces is None else namespaces[::-1])


MANAGER_BUGS: Mapping[str, Plant] = {
    "the copy list is dropped": changed(KVCacheManager, "extend", drop_copies),
    "a slot is off by one at a block's edge": changed(KVCacheManager, "extend", shift_slot_at_block_edge),
    "blocks are published before they are computed": changed(KVCacheManager, "extend", publish_before_compute),
    "a half-full block is published as a full one": changed(Publication, "publish", publish_half_full_block),
    "namespaces share one root": changed(Namespaces, "find", lambda right, names, name: right(names, "")),
    "namespaces are not told apart at all": one_namespace_for_all,
    "the last prompt token is matched as well": changed(KVCacheManager, "open", match_the_last_token),
    "a step that is cancelled forgets its pending copies": changed(KVCacheManager, "cancel", forget_copy_pending),
    "a pin holds nothing": changed(KVCacheManager, "pin", lose_pin),
    "a fork does not say that its tail is shared": changed(KVCacheManager, "fork", fork_without_marking_tails),
    "a fork takes a reference too few": changed(KVCacheManager, "fork", fork_one_reference_short),
    "an evicted block keeps its key": changed(PrefixCache, "remove", keep_key_of_evicted_block),
    "the youngest block is evicted first": changed(LeastRecentlyUsed, "pop", evict_the_youngest),
    "blocks are let go of head first": changed(KVCacheManager, "_table_ids", let_go_head_first),
    "only the first group is asked for room": changed(Reservations, "check_available", check_first_group_only),
    "a purged sequence goes on publishing": changed(KVCacheManager, "purge", keep_publishing_after_purge),
    "a truncated block still counts as published": changed(Reservations, "cut", keep_published_count),
    "a duplicate is swapped without taking a reference": changed(LayerGroup, "settle", settle_without_reference),
    "a block's key does not name its parent": changed(PrefixCache, "publish", one_parent_for_all),
    "released handles are accepted": changed(SequenceTable, "rows_of", accept_old_handles),
    "a cohort outlives other commands": changed(KVCacheManager, "_rows_to_change", keep_cohort),
    "a cohort opens blocks a step late": changed(Cohort, "_wave", open_too_late),
    "a cohort publishes another wave": changed(Cohort, "_publish", settle_later),
    "a cohort writes into shared tails": changed(KVCacheManager, "_may_decode_together", take_tails_for_own),
    "a tail is copied though nobody shares it": changed(Reservations, "_writers_to_copy", copy_without_need),
    "a released sequence keeps its last block": changed(KVCacheManager, "release", leak_the_last_block),
    "a cancelled step keeps its slots": changed(KVCacheManager, "cancel", keep_reservations),
    "the last token of a block is not compared": changed(PrefixCache, "match", ignore_the_last_token_of_a_block),
    "a match is one block short": changed(PrefixCache, "match", match_one_block_less),
    "what continues a wrong block stays findable": changed(PrefixCache, "continuations_of", forget_only_what_is_named),
    "a distrusted sequence goes on publishing": changed(KVCacheManager, "distrust", keep_publishing_after_distrust),
    "a cut into a shared block is not marked": changed(Reservations, "cut", cut_without_marking_tails),
    "a block mentioned twice is held once": changed(BlockPool, "acquire", acquire_each_block_once),
    "one block too many is promised": changed(Reservations, "check_available", allow_one_block_too_many),
    "copies are not counted among the blocks needed": changed(Reservations, "most_copies", lambda right, *_: 0),
    "a freed block is lost": changed(BlockPool, "_push_free", lose_a_freed_block),
    "an evicted block stays findable": changed(LayerGroup, "take", evict_without_forgetting),
    "a block held again can still be evicted": changed(LeastRecentlyUsed, "remove", lambda right, *_: None),
    "a token at a block's edge replaces the last": changed(KVCacheManager, "_append_tokens", overwrite_the_last_token),
    "prompts get each other's namespaces": changed(KVCacheManager, "open", settle_namespaces_backwards),
}
