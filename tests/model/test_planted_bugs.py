"""Bugs planted one at a time: the fuzzers are worth what they would notice.

Each bug of the manager must be found by each oracle that is listed with it, while the other oracles are switched off (what a command
returns and refuses is compared in any case). A bug that only one oracle finds says why that oracle is there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scheduler_driver import run_seed

from pagedkv.core import Extension, KVCacheManager, Opened
from pagedkv.core.cohort import Cohort
from pagedkv.core.eviction import LeastRecentlyUsed
from pagedkv.core.layer_group import LayerGroup
from pagedkv.core.prefix_cache import Namespaces, PrefixCache
from pagedkv.core.publication import Publication
from pagedkv.core.reservations import Reservations
from pagedkv.core.sequence_table import SequenceTable
from pagedkv.plan import Int32Array, Int64Array, StepPlan
from pagedkv.scheduling import Branch, Scheduler
from pagedkv.scheduling.admission import Admission
from pagedkv.scheduling.planning import PlanBuilder
from pagedkv.scheduling.running import RunningSet, SteadyRows
from pagedkv.scheduling.waiting import WaitingQueue
from pagedkv.testing.generators import OperationGenerator, random_config
from pagedkv.testing.manager_driver import ORACLES, ManagerDriver
from pagedkv.testing.violations import ViolationError

Plant = Callable[[pytest.MonkeyPatch], None]
Record = Callable[[str, object], None]
MAX_SEEDS, OPERATIONS = 25, 250
MAX_LOADS = 400


@dataclass(frozen=True)
class Bug:
    """How to plant it, and which oracles find it alone."""

    name: str
    plant: Plant
    found_by: tuple[str, ...]


def changed(owner: type, name: str, make: Callable[..., object]) -> Plant:
    """Replace a method; ``make`` gets the right one and its arguments."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **options: make(right, *arguments, **options))

    return plant


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


def accept_old_handles(right: Callable[..., Int64Array], table: SequenceTable, seqs: Int64Array) -> Int64Array:
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


MANAGER_BUGS = [
    Bug("the copy list is dropped", changed(KVCacheManager, "extend", drop_copies), ("tokens",)),
    Bug("a slot is off by one at a block's edge", changed(KVCacheManager, "extend", shift_slot_at_block_edge), ("tokens",)),
    Bug(
        "blocks are published before they are computed",
        changed(KVCacheManager, "extend", publish_before_compute),
        ("audit", "tokens", "reference"),
    ),
    Bug(
        "a half-full block is published as a full one",
        changed(Publication, "publish", publish_half_full_block),
        ("audit", "tokens", "reference"),
    ),
    Bug(
        "namespaces share one root",
        changed(Namespaces, "find", lambda right, names, name: right(names, "")),
        ("audit", "tokens", "reference"),
    ),
    Bug(
        "namespaces are not told apart at all",
        one_namespace_for_all,
        ("tokens", "reference", "ownership"),
    ),
    Bug(
        "the last prompt token is matched as well", changed(KVCacheManager, "open", match_the_last_token), ("audit", "tokens", "reference")
    ),
    Bug(
        "a step that is cancelled forgets its pending copies",
        changed(KVCacheManager, "cancel", forget_copy_pending),
        ("audit", "tokens", "reference"),
    ),
    Bug("a pin holds nothing", changed(KVCacheManager, "pin", lose_pin), ("reference",)),
    Bug(
        "a fork does not say that its tail is shared",
        changed(KVCacheManager, "fork", fork_without_marking_tails),
        ("audit", "tokens", "reference"),
    ),
    Bug("a fork takes a reference too few", changed(KVCacheManager, "fork", fork_one_reference_short), ("audit", "tokens", "reference")),
    Bug("an evicted block keeps its key", changed(PrefixCache, "remove", keep_key_of_evicted_block), ("audit", "tokens", "reference")),
    Bug("the youngest block is evicted first", changed(LeastRecentlyUsed, "pop", evict_the_youngest), ("reference",)),
    Bug("blocks are let go of head first", changed(KVCacheManager, "_table_ids", let_go_head_first), ("audit", "tokens", "reference")),
    Bug(
        "only the first group is asked for room",
        changed(Reservations, "check_available", check_first_group_only),
        ("audit", "tokens", "reference"),
    ),
    Bug("a purged sequence goes on publishing", changed(KVCacheManager, "purge", keep_publishing_after_purge), ("reference",)),
    Bug("a truncated block still counts as published", changed(Reservations, "cut", keep_published_count), ("audit",)),
    Bug(
        "a duplicate is swapped without taking a reference",
        changed(LayerGroup, "settle", settle_without_reference),
        ("audit", "tokens", "reference"),
    ),
    Bug("a block's key does not name its parent", changed(PrefixCache, "publish", one_parent_for_all), ("tokens", "reference")),
    Bug("released handles are accepted", changed(SequenceTable, "rows_of", accept_old_handles), ("audit", "tokens", "reference")),
    Bug("a cohort outlives other commands", changed(KVCacheManager, "_rows_to_change", keep_cohort), ("audit", "tokens", "reference")),
    Bug("a cohort opens blocks a step late", changed(Cohort, "_wave", open_too_late), ("audit", "tokens", "reference")),
    Bug("a cohort publishes another wave", changed(Cohort, "_publish", settle_later), ("audit", "tokens", "reference")),
    Bug("a cohort writes into shared tails", changed(KVCacheManager, "_may_decode_together", take_tails_for_own), ("reference",)),
    Bug(
        "a tail is copied though nobody shares it",
        changed(Reservations, "_writers_to_copy", copy_without_need),
        ("audit", "tokens", "reference"),
    ),
]


def operations_to_find(oracles: tuple[str, ...]) -> int | None:
    """Operations, over several programs, until the driver objects; None when it never does."""
    total = 0
    for seed in range(MAX_SEEDS):
        rng = random.Random(seed)
        config = random_config(rng)
        driver, operations = ManagerDriver(config, oracles=oracles), OperationGenerator(rng, config)
        try:
            while driver.num_operations < OPERATIONS:
                driver.run(operations.draw(driver))
            driver.close()
        except ViolationError:
            return total + driver.num_operations + 1
        total += driver.num_operations
    return None


@pytest.mark.parametrize(
    ("bug", "oracle"), [pytest.param(bug, oracle, id=f"{bug.name}, {oracle}") for bug in MANAGER_BUGS for oracle in bug.found_by]
)
def test_manager_bug_is_found_by_oracle_alone(bug: Bug, oracle: str, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    bug.plant(monkeypatch)
    found = operations_to_find((oracle,))
    assert found is not None, f"{bug.name!r} survived {MAX_SEEDS} programs of {OPERATIONS} operations under {oracle!r}"
    record_property("operations", found)


def test_every_oracle_is_the_only_one_to_find_some_bug() -> None:
    alone = {bug.found_by[0] for bug in MANAGER_BUGS if len(bug.found_by) == 1}
    # A block in two namespaces is a shape that the reference never has, and what a slot holds names its namespace: whoever has neither of
    # these oracles needs the one for ownership.
    assert alone == set(ORACLES) - {"ownership"}


# The scheduler


def keep_reservations(right: Callable[..., None], manager: KVCacheManager, seqs: Int64Array) -> None:
    """Nothing is taken back."""


def sample_from_every_chunk(right: Callable[..., object], builder: PlanBuilder, rows: Int64Array, cu_seqlens_q: Int32Array) -> object:
    every = np.arange(len(rows))
    return cu_seqlens_q[1:].astype(np.int64) - 1, every, every


def plan_without_copies(right: Callable[..., StepPlan], builder: PlanBuilder, step: int) -> StepPlan:
    plan = right(builder, step)
    return replace(plan, copies=tuple(copies[:0] for copies in plan.copies))


def preempt_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    def victims(manager: KVCacheManager, running: RunningSet, policy: object) -> list[Branch]:
        return [min(running.branches, key=lambda branch: branch.record.arrival)] if len(running) > 1 else []

    monkeypatch.setattr("pagedkv.scheduling.scheduler.choose_victims", victims)


def forget_reserved_rows(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.num_reserved_rows = 0


def stop_too_early(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.minimums[branch.row] = 0


def stop_one_token_late(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.limits[branch.row] += 1


def compute_the_trunks_last_token(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.hold[branch.row] = 0


def overlook_ends(right: Callable[..., bool], steady: SteadyRows, token_ids: Int32Array) -> bool:
    return True


SCHEDULER_BUGS = {
    "nobody ends while all decode": changed(SteadyRows, "all_go_on", overlook_ends),
    "an undone step keeps its slots": changed(KVCacheManager, "cancel", keep_reservations),
    "every chunk samples": changed(PlanBuilder, "_logits", sample_from_every_chunk),
    "a plan loses its copies": changed(PlanBuilder, "build", plan_without_copies),
    "the oldest is preempted": preempt_the_oldest,
    "preempted requests are admitted as if they were new": changed(Admission, "_must_be_sure", lambda right, *_: False),
    "rows of forks to come are given away": changed(RunningSet, "add", forget_reserved_rows),
    "min_tokens is ignored": changed(RunningSet, "add", stop_too_early),
    "max_tokens is off by one": changed(RunningSet, "add", stop_one_token_late),
    "a trunk computes the token that its forks should": changed(RunningSet, "add", compute_the_trunks_last_token),
    "an abort during a step is forgotten": changed(Scheduler, "_end_doomed", lambda right, *_: None),
    "who waits for a prefix is never woken": changed(WaitingQueue, "wake", lambda right, *_: None),
}


@pytest.mark.parametrize("name", SCHEDULER_BUGS)
def test_scheduler_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    SCHEDULER_BUGS[name](monkeypatch)
    for seed in range(MAX_LOADS):
        try:
            run_seed(seed)
        except Exception:
            record_property("loads", seed + 1)
            return
    pytest.fail(f"{name!r} survived {MAX_LOADS} loads")
