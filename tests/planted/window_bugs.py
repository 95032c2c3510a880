"""Bugs of windowed layer groups, one line each: they are planted one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from planting import Plant, changed

from pagedkv.core import Window, matching
from pagedkv.core.cohort import Cohort
from pagedkv.core.layer_group import WindowedGroup
from pagedkv.core.matching import Match, find_prefix
from pagedkv.core.retirement import Retirement
from pagedkv.core.window_cache import WindowCache
from pagedkv.plan import Int32Array, Int64Array


def see_a_block_less(right: Callable[..., Int32Array], window: Window, num_full: Int32Array, block_size: int) -> Int32Array:
    return np.minimum(right(window, num_full, block_size) + 1, num_full)


def see_one_position_more(
    right: Callable[..., int | Int32Array], window: Window, num_full: Int32Array, block_size: int
) -> int | Int32Array:
    return right(Window(window.kind, window.size + 1), num_full, block_size)


def release_and_still_list(
    right: Callable[..., None], retirement: Retirement, rows: Int64Array, before: Int32Array, full: Int32Array
) -> None:
    tables = retirement._table.block_tables[:, rows].copy()
    right(retirement, rows, before, full)
    retirement._table.block_tables[:, rows] = tables


def list_no_more_and_never_release(
    right: Callable[..., None], retirement: Retirement, rows: Int64Array, before: Int32Array, full: Int32Array
) -> None:
    held = [(group, group.pool.references.copy()) for _, group in retirement._windowed]
    right(retirement, rows, before, full)
    for group, references in held:
        lost = np.nonzero((references > 0) & (group.pool.references == 0) & group.pool.cached)[0]
        group.pool.acquire(lost.astype(np.int32))


def decode_without_giving_back(right: Callable[..., None], cohort: Cohort, *arguments: object, **options: object) -> None:
    right(cohort, *arguments, **{**options, "retirement": None})


def ask_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "servable_blocks", lambda length, found, block_size: length)


def take_the_wrong_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(groups: Sequence[object], *arguments: object, **options: int) -> Match:
        match = find_prefix(groups, *arguments, **options)  # type: ignore[arg-type]
        return Match(match.num_tokens, (match.block_ids[0], *(blocks[::-1] for blocks in match.block_ids[1:])))

    monkeypatch.setattr("pagedkv.core.manager.find_prefix", found)


WINDOW_BUGS: Mapping[str, Plant] = {
    "a window is a block short": changed(Window, "num_dead_blocks", see_a_block_less),
    "a window is a position long": changed(Window, "num_dead_blocks", see_one_position_more),
    "nothing behind a window is given back": changed(Retirement, "give_back", lambda right, *_: None),
    "what was given back is still listed": changed(Retirement, "give_back", release_and_still_list),
    "what is behind a window is listed no more and still held": changed(Retirement, "give_back", list_no_more_and_never_release),
    "a cohort gives nothing back": changed(Cohort, "__init__", decode_without_giving_back),
    "a windowed block outlives the one it is found by": changed(WindowedGroup, "drop", lambda right, *_: None),
    "a prefix is served without its window": ask_no_window,
    "the blocks of a window are shared in the wrong order": take_the_wrong_end,
    "truncate goes back behind a window": changed(Retirement, "is_gone", lambda right, *_: False),
    "twins in a windowed group are kept apart": changed(
        WindowCache, "publish", lambda right, cache, leading, ids: [right(cache, leading, ids), list(ids)][1]
    ),
}
