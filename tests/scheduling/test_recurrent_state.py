"""Sequences with recurrent state beside their blocks: whole prompts, forks that say where their state is, and nobody who goes back."""

from __future__ import annotations

import numpy as np
import pytest
from scheduling_helpers import complete, make_scheduler, plan_of, run, step, submit

from pagedkv.core import KVCacheManager, Window
from pagedkv.errors import ConfigError, RequestTooLargeError
from pagedkv.plan import StepPlan
from pagedkv.scheduling import EventKind, MissReason, Scheduler, SchedulerConfig, Status, WaitReason


def make(recurrent_state: str = "whole", num_blocks: int = 33, **options: object) -> Scheduler:
    return make_scheduler(num_blocks, caching=False, recurrent_state=recurrent_state, check="audit", **options)  # type: ignore[arg-type]


def pieces(plans: list[StepPlan], row: int) -> list[tuple[int, int]]:
    """First position and length of what a row computed, step by step."""
    found = []
    for plan in plans:
        for index in np.flatnonzero(plan.rows == row).tolist():
            found.append((int(plan.seq_lens[index] - plan.query_lens[index]), int(plan.query_lens[index])))
    return found


def test_scheduler_with_state_refuses_a_manager_that_caches_prefixes() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4)
    message = "recurrent_state: what a prefix leaves behind is not in its blocks, so the manager must not cache prefixes"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Scheduler(manager, SchedulerConfig(recurrent_state="chunked"))


def test_config_refuses_an_unknown_kind_of_state() -> None:
    with pytest.raises(ConfigError, match="none, chunked, whole"):
        SchedulerConfig(recurrent_state="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("recurrent_state", ["chunked", "whole"])
def test_miss_names_the_state_where_it_is_the_reason(recurrent_state: str) -> None:
    scheduler = make(recurrent_state)
    record = submit(scheduler, "a", 6)
    step(scheduler)
    assert [event.detail["miss"] for event in record.events if event.kind is EventKind.ADMITTED] == [MissReason.STATE]


def test_chunked_state_splits_prompts_as_ever() -> None:
    scheduler = make("chunked", max_num_batched_tokens=4)
    submit(scheduler, "a", 10, max_tokens=2)
    assert pieces(run(scheduler), 0) == [(0, 4), (4, 4), (8, 2), (10, 1)]


def test_whole_prompts_need_all_their_blocks_at_once_inside_a_window_too() -> None:
    windows = [None, Window.sliding(4)]
    for recurrent_state, fits in (("chunked", 17), ("whole", 12)):
        manager = KVCacheManager(num_blocks=[9, 4], block_size=4, max_num_seqs=2, windows=windows, enable_prefix_caching=False)
        limits = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64, recurrent_state=recurrent_state)  # type: ignore[arg-type]
        scheduler = Scheduler(manager, limits)
        if fits < 17:
            with pytest.raises(RequestTooLargeError, match="needs 5 blocks and there can never be more than 3"):
                submit(scheduler, "a", 17, max_tokens=1)
        submit(scheduler, "b", fits, max_tokens=1)
        assert sum(plan.num_tokens for plan in run(scheduler)) == fits


def test_whole_prompts_take_turns_and_decodes_come_on_top() -> None:
    scheduler = make(max_num_batched_tokens=10)
    submit(scheduler, "a", 7, max_tokens=6)
    second = submit(scheduler, "b", 6, max_tokens=2)
    submit(scheduler, "c", 10, max_tokens=2)
    plans = run(scheduler)
    assert [plan.query_lens.tolist() for plan in plans[:3]] == [[7], [1, 6], [1, 1, 10]]
    waits = [event.detail["reason"] for event in second.events if event.kind is EventKind.WAITING]
    assert waits == [WaitReason.TOKENS]
    assert pieces(plans, 0) == [(0, 7), *((7 + place, 1) for place in range(5))]


def test_prompt_that_no_step_could_take_whole_goes_on_token_by_token_and_says_so() -> None:
    scheduler = make(max_num_batched_tokens=8)
    short = submit(scheduler, "a", 8, max_tokens=1)
    long = submit(scheduler, "b", 11, max_tokens=2)
    forked = submit(scheduler, "c", 9, max_tokens=1, n=2)  # whose last prompt token is left to the forks
    plans = run(scheduler)
    assert pieces(plans, 0)[:6] == [(0, 8), (0, 8), (8, 1), (9, 1), (10, 1), (11, 1)]  # of "a", and of "b" behind it
    singly = [
        [event.detail.get("computed_one_by_one") for event in record.events if event.kind is EventKind.ADMITTED]
        for record in (short, long, forked)
    ]
    assert singly == [[None], [3], [1]]


def test_preempted_branch_computes_one_step_full_and_then_token_by_token() -> None:
    scheduler = make(max_num_batched_tokens=8)
    submit(scheduler, "a", 6, max_tokens=9)
    first = [step(scheduler) for _ in range(6)]
    assert scheduler.preempt("a")
    again = run(scheduler)
    assert pieces(first, 0) == [(0, 6), (6, 1), (7, 1), (8, 1), (9, 1), (10, 1)]
    assert pieces(again, 0) == [(0, 8), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1), (13, 1)]


def test_longer_than_a_step_after_preemption_waits_for_a_step_of_its_own() -> None:
    scheduler = make(max_num_batched_tokens=8)
    submit(scheduler, "a", 6, max_tokens=9)
    for _ in range(6):
        step(scheduler)
    scheduler.preempt("a")
    submit(scheduler, "b", 5, max_tokens=1)
    plans = run(scheduler)
    assert [plan.query_lens.tolist() for plan in plans[:3]] == [[8], [1, 5], [1]]


def test_whole_prompt_waits_for_blocks_rather_than_begin() -> None:
    scheduler = make(num_blocks=9, max_num_batched_tokens=32)  # 8 blocks of 4
    submit(scheduler, "old", 11, max_tokens=8)
    submit(scheduler, "new", 16, max_tokens=2)
    plans = run(scheduler)
    new = [pieces(plans, row) for row in (0, 1)]
    assert all(length in (1, 11, 12, 16, 17) for piece in new for _, length in piece)
    assert all(start == 0 or length == 1 for piece in new for start, length in piece)


def test_forks_say_whose_computed_tokens_they_go_on_from() -> None:
    scheduler = make("chunked")
    submit(scheduler, "a", 6, n=3)
    step(scheduler)
    submit(scheduler, "b", 3)
    step(scheduler)
    taken = [(each.row, each.request_id, each.index, each.source_row) for each in scheduler.take_assignments()]
    assert taken == [(0, "a", 0, None), (0, "a", 0, 0), (1, "a", 1, 0), (2, "a", 2, 0), (3, "b", 0, None)]


def test_undone_first_step_of_forks_starts_those_again_that_would_copy() -> None:
    scheduler = make("chunked")
    record = submit(scheduler, "a", 7, n=3)
    step(scheduler)  # 6 tokens, the second block half full
    plan = plan_of(scheduler)
    assert len(plan.copies[0]) == 2
    scheduler.undo(plan)
    states = [branch.status for branch in record.branches]
    assert sorted(states) == [Status.RUNNING, Status.WAITING, Status.WAITING]
    table = scheduler.manager.table
    assert all(table.num_computed[branch.row] == 6 for branch in record.branches if branch.status is Status.RUNNING)
    plans = run(scheduler)
    assert record.finished
    assert all(len(branch.output_token_ids) == 4 for branch in record.branches)
    assert all(start in (0, 6) or length == 1 for row in range(3) for start, length in pieces(plans, row))


def test_undone_step_without_copies_keeps_everybody() -> None:
    scheduler = make("chunked")
    submit(scheduler, "a", 6)
    step(scheduler)
    scheduler.undo(plan_of(scheduler))
    assert scheduler.num_running == 1
    assert scheduler.num_preemptions == 0
    run(scheduler)


def test_fork_without_a_token_starts_again() -> None:
    scheduler = make("chunked")
    record = submit(scheduler, "a", 7, n=2)
    step(scheduler)
    plan = plan_of(scheduler)
    copying = [index for index, row in enumerate(plan.rows.tolist()) if scheduler.manager.table.copy_pending[row]]
    tokens = np.full(2, 7, dtype=np.int32)
    tokens[copying] = -1
    scheduler.complete(plan, tokens)
    scheduler.check()
    assert scheduler.num_running == 1
    assert scheduler.num_preemptions == 1
    run(scheduler)
    assert [len(branch.output_token_ids) for branch in record.branches] == [4, 4]


def test_plan_that_comes_to_nothing_starts_again_who_would_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make("chunked")
    record = submit(scheduler, "a", 7, n=2)
    step(scheduler)
    with monkeypatch.context() as planted:
        planted.setattr("pagedkv.scheduling.planning.PlanBuilder.build", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.plan()
    scheduler.check()
    assert scheduler.num_preemptions == 1
    run(scheduler)
    assert [len(branch.output_token_ids) for branch in record.branches] == [4, 4]


def _interrupted(*_: object) -> StepPlan:
    raise KeyboardInterrupt


def test_whole_prompts_of_a_full_queue_all_end() -> None:
    scheduler = make(num_blocks=13, max_num_batched_tokens=12, max_num_seqs=4)
    records = [submit(scheduler, f"r{index}", 3 + index % 10, max_tokens=1 + index % 7, n=1 + index % 3 // 2) for index in range(24)]
    plans = []
    while (plan := scheduler.plan()) is not None:
        starts = plan.seq_lens - plan.query_lens
        assert ((starts == 0) | (plan.query_lens == 1)).all()
        assert plan.num_tokens - plan.num_decodes <= 12
        plans.append(plan)
        complete(scheduler, plan)
    assert all(record.finished and record.error is None for record in records)
