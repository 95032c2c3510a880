"""Bugs of the scheduler and the engine, planted one at a time: the simulation finds each within a few lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planting import Plant, changed

from pagedkv.core import KVCacheManager, Window
from pagedkv.engine import Engine
from pagedkv.outbox import Outbox
from pagedkv.plan import Int32Array, Int64Array, StepPlan
from pagedkv.sampling import Sampler, SamplingParams
from pagedkv.scheduling import Assignment, Branch, Scheduler
from pagedkv.scheduling.admission import Admission
from pagedkv.scheduling.planning import PlanBuilder
from pagedkv.scheduling.request import Request
from pagedkv.scheduling.running import RunningSet, SteadyRows
from pagedkv.scheduling.waiting import WaitingQueue
from pagedkv.testing.hash_model import HashStorage
from pagedkv.testing.simulation import simulate
from pagedkv.testing.violations import ViolationError

MAX_LIVES = 150


def publish_what_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def complete_all(scheduler: Scheduler, plan: StepPlan, sampled: Int32Array) -> None:
        next_ids = np.full(plan.num_seqs, -1, dtype=np.int32)
        next_ids[plan.sampling_seqs] = sampled
        scheduler.manager.complete(plan.seqs, next_ids)

    monkeypatch.setattr(Scheduler, "_complete_tables", complete_all)
    monkeypatch.setattr(KVCacheManager, "distrust", lambda manager, seqs: 0)


def undo_without_cancel(right: Callable[..., None], scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.manager.complete(plan.seqs)
    right(scheduler, plan)


def assigned(change: Callable[[tuple[Assignment, ...]], tuple[Assignment, ...]]) -> Plant:
    """The scheduler shows other assignments."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = Scheduler.assignments.fget
        monkeypatch.setattr(Scheduler, "assignments", property(lambda scheduler: change(right(scheduler))))

    return plant


def forget_output(right: Callable[..., None], scheduler: Scheduler, branches: list[Branch]) -> None:
    right(scheduler, branches)
    for branch in branches:
        branch.token_ids = branch.request.prompt_token_ids


def forget_last_token(right: Callable[..., None], scheduler: Scheduler, branches: list[Branch]) -> None:
    right(scheduler, branches)
    for branch in branches:
        if len(branch.token_ids) > 1:
            branch.token_ids = branch.token_ids[:-1]


def drop_salt(right: Callable[..., Request], engine: Engine, *arguments: object) -> Request:
    return replace(right(engine, *arguments), namespace="")


def budget_and_one(right: Callable[..., int], builder: PlanBuilder, row: int) -> int:
    builder.num_tokens -= 1
    chunk = right(builder, row)
    builder.num_tokens += 1
    return chunk


def sample_from_a_neighbour(right: Callable[..., StepPlan], builder: PlanBuilder, step: int) -> StepPlan:
    plan = right(builder, step)
    return replace(plan, sampling_logits=plan.sampling_logits[::-1].copy())


def lengths_of_chunks_alone(right: Callable[..., StepPlan], builder: PlanBuilder, step: int) -> StepPlan:
    plan = right(builder, step)
    return replace(plan, seq_lens=np.where(plan.query_lens > 1, plan.query_lens, plan.seq_lens).astype(np.int32))


def positions_from_zero(right: Callable[..., StepPlan], builder: PlanBuilder, step: int) -> StepPlan:
    plan = right(builder, step)
    starts = np.repeat(plan.cu_seqlens_q[:-1], plan.query_lens)
    chunk = np.repeat(plan.query_lens > 1, plan.query_lens)
    return replace(plan, positions=np.where(chunk, np.arange(plan.num_tokens) - starts, plan.positions).astype(np.int32))


def deliver_only_what_streams(right: Callable[..., None], outbox: Outbox, touched: dict[str, None]) -> None:
    if not touched:
        outbox._scheduler.take_ended()
    right(outbox, touched)


def forget_stops_of_the_preempted(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    if branch.num_preemptions:
        running._stops[branch.row] = -2


def count_anew_after_preemption(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.limits[branch.row] += len(branch.token_ids) - len(branch.request.prompt_token_ids)


def tokens_for_each_other(right: Callable[..., None], scheduler: Scheduler, plan: StepPlan, token_ids: Int32Array) -> None:
    right(scheduler, plan, token_ids[::-1])


def leak_on_abort(right: Callable[..., None], scheduler: Scheduler, branch: Branch, reason: str, stop: object) -> None:
    if reason == "abort" and branch.seq:
        scheduler.manager.fork(branch.seq, 1)
    right(scheduler, branch, reason, stop)


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


def stop_one_token_late(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.limits[branch.row] += 1


def compute_the_trunks_last_token(right: Callable[..., None], running: RunningSet, branch: Branch) -> None:
    right(running, branch)
    running.hold[branch.row] = 0


def overlook_ends(right: Callable[..., bool], steady: SteadyRows, token_ids: Int32Array) -> bool:
    return True


def forget_min_tokens(right: Callable[..., None], sampler: Sampler, row: int, params: SamplingParams, **options: object) -> None:
    right(sampler, row, replace(params, min_tokens=0), **options)


def retire_a_block_too_many(right: Callable[..., Int32Array], window: Window, num_full: Int32Array, block_size: int) -> Int32Array:
    return right(window, num_full + 1, block_size)


def copy_in_the_first_group_only(right: Callable[..., None], storage: HashStorage, copies: Sequence[Int32Array]) -> None:
    right(storage, [copies[0], *(pairs[:0] for pairs in copies[1:])])


BUGS: Mapping[str, Plant] = {
    "what a step without logits computed is found": publish_what_has_no_token,
    "copies are planned and not made": changed(HashStorage, "copy_blocks", lambda right, *_: None),
    "a failed step counts as computed": changed(Scheduler, "undo", undo_without_cancel),
    "the last of many rows is not seated": assigned(lambda all_of_them: all_of_them[: max(len(all_of_them) - 1, 1)]),
    "an abort leaks a sequence": changed(Scheduler, "_finish", leak_on_abort),
    "preemption forgets the output": changed(Scheduler, "_preempt", forget_output),
    "preemption forgets the last token": changed(Scheduler, "_preempt", forget_last_token),
    "the salt is dropped on the way": changed(Engine, "_request", drop_salt),
    "all continuations draw as the first": assigned(lambda each: tuple(replace(one, index=0) for one in each)),
    "the token budget is off by one": changed(PlanBuilder, "fit_chunk", budget_and_one),
    "a sequence samples from its neighbour's logits": changed(PlanBuilder, "build", sample_from_a_neighbour),
    "a chunk does not count what came before it": changed(PlanBuilder, "build", lengths_of_chunks_alone),
    "a chunk's positions begin at zero": changed(PlanBuilder, "build", positions_from_zero),
    "who ends without a token is not delivered": changed(Outbox, "_collect", deliver_only_what_streams),
    "a preempted request forgets its stop tokens": changed(RunningSet, "add", forget_stops_of_the_preempted),
    "a preempted request may be longer": changed(RunningSet, "add", count_anew_after_preemption),
    "tokens go to each other's sequences": changed(Scheduler, "complete", tokens_for_each_other),
    "nobody ends while all decode": changed(SteadyRows, "all_go_on", overlook_ends),
    "an undone step keeps its slots": changed(KVCacheManager, "cancel", keep_reservations),
    "every chunk samples": changed(PlanBuilder, "_logits", sample_from_every_chunk),
    "a plan loses its copies": changed(PlanBuilder, "build", plan_without_copies),
    "the oldest is preempted": preempt_the_oldest,
    "rows of forks to come are given away": changed(RunningSet, "add", forget_reserved_rows),
    "max_tokens is off by one": changed(RunningSet, "add", stop_one_token_late),
    "a trunk computes the token that its forks should": changed(RunningSet, "add", compute_the_trunks_last_token),
    "who waits for a prefix is never woken": changed(WaitingQueue, "wake", lambda right, *_: None),
    "a windowed group lets go of a block too early": changed(Window, "num_dead_blocks", retire_a_block_too_many),
    "blocks are copied in the first group only": changed(HashStorage, "copy_blocks", copy_in_the_first_group_only),
    "the sampler does not know min_tokens": changed(Sampler, "add", forget_min_tokens),
    "rows are not asked for on admission": changed(Admission, "_has_room", lambda right, *_: True),
}


SLOW = {"a preempted request forgets its stop tokens"}  # some 140 lives


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in BUGS])
def test_simulation_finds_the_bug(name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, Any], None]) -> None:
    BUGS[name](monkeypatch)
    steps = 0
    for seed in range(MAX_LIVES):
        try:
            steps += simulate(seed).num_steps
        except ViolationError as error:
            steps += int(error.__notes__[-1].split("step ")[1].split(",")[0])
            record_property("steps", steps)
            record_property("kind", error.kind)
            return
    pytest.fail(f"{name!r} survived {MAX_LIVES} lives of {steps} steps")
