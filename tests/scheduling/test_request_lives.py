"""From submission to the end: completing, undoing, aborting and finishing at every moment, and what is told of it."""

from __future__ import annotations

import numpy as np
import pytest
from scheduling_helpers import complete, events, make_scheduler, only_branch, plan_of, record_of, run, step, submit

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError, InvariantError, PagedKVError, StepError
from pagedkv.scheduling import EventKind, Scheduler, SchedulerConfig, Status, WaitReason


def ended(scheduler: Scheduler) -> list[tuple[str, int, str | None]]:
    """Branches that ended since the last call."""
    return [(branch.request.request_id, branch.index, branch.finish_reason) for branch in scheduler.take_ended()]


# Completing and undoing


def test_plan_while_one_is_outstanding_is_refused() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3)
    plan = plan_of(scheduler)
    with pytest.raises(InvariantError, match=r"^the last plan is outstanding: complete or undo it first$"):
        scheduler.plan()
    complete(scheduler, plan)


@pytest.mark.parametrize("command", ["complete", "undo"])
def test_plan_that_is_not_outstanding_is_refused(command: str) -> None:
    scheduler, other = make_scheduler(), make_scheduler()
    for each in (scheduler, other):
        submit(each, "a", 3)
    plan, foreign = plan_of(scheduler), plan_of(other)
    arguments = ([7],) if command == "complete" else ()
    with pytest.raises(InvalidRequestError, match=r"^this plan is not the outstanding one: each plan is completed or undone exactly once$"):
        getattr(scheduler, command)(foreign, *arguments)
    getattr(scheduler, command)(plan, *arguments)
    with pytest.raises(InvalidRequestError, match=r"^this plan is not the outstanding one: each plan is completed or undone exactly once$"):
        getattr(scheduler, command)(plan, *arguments)
    run(scheduler)


@pytest.mark.parametrize("tokens", [[], [7], [7, 7, 7, 7], [[7, 7, 7]]])
def test_complete_with_a_wrong_number_of_tokens_is_refused_and_the_plan_stays(tokens: list[object]) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    for request_id, prompt in (("a", 3), ("b", 3), ("c", 3), ("d", 9)):
        submit(scheduler, request_id, prompt)
    plan = plan_of(scheduler)
    assert (plan.num_seqs, len(plan.sampling_seqs)) == (4, 3)  # one token too many is one for each sequence
    before = scheduler.manager.snapshot()
    with pytest.raises(InvalidRequestError, match=r"token_ids.*(expected 3|flat list)"):
        scheduler.complete(plan, np.array(tokens))
    assert scheduler.manager.snapshot() == before
    complete(scheduler, plan)
    run(scheduler)


def test_complete_with_a_token_below_minus_one_is_refused_and_the_plan_stays() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3)
    plan = plan_of(scheduler)
    with pytest.raises(InvalidRequestError, match="below 0"):
        scheduler.complete(plan, np.array([-2], dtype=np.int32))
    scheduler.undo(plan)
    run(scheduler)


def test_complete_steps_are_numbered_and_timed() -> None:
    times = iter(range(100))
    manager = KVCacheManager(num_blocks=9, block_size=4)
    scheduler = Scheduler(manager, SchedulerConfig(max_num_batched_tokens=3), clock=lambda: float(next(times)))
    record = submit(scheduler, "a", 5, 2)
    assert [plan.step for plan in run(scheduler)] == [0, 1, 2]
    assert scheduler.num_steps == 3
    assert (record.arrival_time, record.first_scheduled_time, record.first_token_time, record.finished_time) == (0, 1, 2, 3)


def test_undo_gives_back_slots_and_the_next_plan_is_the_same() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    records = [submit(scheduler, request_id, length) for request_id, length in (("a", 3), ("b", 9))]
    for _ in range(4):
        plan = plan_of(scheduler)
        scheduler.undo(plan)
        scheduler.manager.check()
        again = plan_of(scheduler)
        assert again.step == plan.step + 1
        for name in ("seqs", "token_ids", "positions", "query_lens", "slot_mapping"):
            assert np.array_equal(getattr(plan, name), getattr(again, name)), name
        complete(scheduler, again)
    assert [event.step for event in events(records[0], EventKind.UNDONE)][:2] == [0, 2]


def test_undo_of_a_step_with_a_copy_computes_the_copied_tokens_again() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", [1, 2, 3], n=2)
    step(scheduler)
    scheduler.undo(plan_of(scheduler))
    plan = plan_of(scheduler)
    assert sorted(plan.query_lens.tolist()) == [1, 3]
    assert plan.copies[0].tolist() == []
    complete(scheduler, plan)
    run(scheduler)


def test_undo_in_the_middle_of_decoding_changes_no_token() -> None:
    scheduler = make_scheduler()
    for request_id in "abc":
        submit(scheduler, request_id, 3, 6)
    for token in range(6):
        scheduler.undo(plan_of(scheduler))
        step(scheduler, token=token)
    assert [only_branch(record_of(scheduler, each)).output_token_ids.tolist() for each in "abc"] == [list(range(6))] * 3


# Aborting


def test_abort_of_what_is_not_alive_does_nothing() -> None:
    scheduler = make_scheduler()
    assert not scheduler.abort("nobody")
    submit(scheduler, "a", 3, 1)
    run(scheduler)
    assert not scheduler.abort("a")


def test_abort_of_one_that_waits_takes_it_out_of_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    submit(scheduler, "a", 3, 2)
    waiting = submit(scheduler, "b", 3, 2)
    assert scheduler.abort("b")
    assert ended(scheduler) == [("b", 0, "abort")]
    assert (scheduler.num_waiting, waiting.finished, only_branch(waiting).output_token_ids.tolist()) == (1, True, [])
    run(scheduler)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_abort_of_one_that_runs_keeps_what_it_has(steps: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    record = submit(scheduler, "a", 7, 9)
    for _ in range(steps):
        step(scheduler)
    assert scheduler.abort("a")
    assert only_branch(record).output_token_ids.tolist() == [7] * (steps - 1)
    assert not scheduler.has_unfinished
    assert scheduler.plan() is None
    assert all(group.num_in_use == 0 for group in scheduler.manager.statistics().groups)


@pytest.mark.parametrize("command", ["complete", "undo"])
def test_abort_during_a_step_ends_it_right_after(command: str) -> None:
    scheduler = make_scheduler()
    record = submit(scheduler, "a", 3, 9)
    other = submit(scheduler, "b", 3, 2)
    plan = plan_of(scheduler)
    assert scheduler.abort("a")
    assert scheduler.abort("a")
    assert only_branch(record).status is Status.RUNNING
    if command == "undo":
        scheduler.undo(plan)
    else:
        complete(scheduler, plan)
    assert only_branch(record).finish_reason == "abort"
    assert len(only_branch(record).output_token_ids) == (command == "complete")
    run(scheduler)
    assert only_branch(other).finish_reason == "length"


def test_abort_during_the_step_that_ends_it_anyway_is_no_abort() -> None:
    scheduler = make_scheduler()
    record = submit(scheduler, "a", 3, 1)
    plan = plan_of(scheduler)
    assert scheduler.abort("a")
    complete(scheduler, plan)
    assert only_branch(record).finish_reason == "length"
    assert ended(scheduler) == [("a", 0, "length")]


def test_abort_ends_every_branch_that_has_not_ended() -> None:
    scheduler = make_scheduler()
    record = submit(scheduler, "a", 3, 9, n=3)
    for _ in range(3):
        step(scheduler)
    assert scheduler.finish("a", 1, "stop", stop_reason="END")
    assert scheduler.abort("a")
    assert [branch.finish_reason for branch in record.branches] == ["abort", "stop", "abort"]
    assert record.branches[1].stop_reason == "END"
    assert ended(scheduler) == [("a", 1, "stop"), ("a", 0, "abort"), ("a", 2, "abort")]


def test_abort_and_submit_again_under_the_same_id() -> None:
    scheduler = make_scheduler()
    first = submit(scheduler, "a", 3, 9)
    step(scheduler)
    scheduler.abort("a")
    second = submit(scheduler, "a", 3, 2)
    assert record_of(scheduler, "a") is second is not first
    run(scheduler)
    assert len(only_branch(second).output_token_ids) == 2


# Finishing from outside


def test_finish_ends_one_branch_and_the_others_go_on() -> None:
    scheduler = make_scheduler()
    record = submit(scheduler, "a", 3, 4, n=2)
    for _ in range(2):
        step(scheduler)
    assert scheduler.finish("a", 0, "stop")
    assert not scheduler.finish("a", 0, "stop")
    assert not record.finished
    run(scheduler)
    assert [len(branch.output_token_ids) for branch in record.branches] == [1, 4]


@pytest.mark.parametrize(("request_id", "index"), [("nobody", 0), ("a", 1), ("a", -1)])
def test_finish_of_what_is_not_there_does_nothing(request_id: str, index: int) -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3)
    assert not scheduler.finish(request_id, index, "stop")
    run(scheduler)


def test_finish_during_a_step_is_refused() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3)
    plan = plan_of(scheduler)
    with pytest.raises(InvariantError, match=r"^a branch cannot be ended while a plan is outstanding: complete or undo it first$"):
        scheduler.finish("a", 0, "stop")
    complete(scheduler, plan)


@pytest.mark.parametrize("steady", [False, True])
def test_finish_with_an_error_of_one_whose_token_could_not_be_sampled(steady: bool) -> None:
    scheduler = make_scheduler()
    records = [submit(scheduler, request_id, 3, 6, eos_token_ids=(5,)) for request_id in "abc"]
    for _ in range(3 if steady else 0):
        step(scheduler)
    plan = plan_of(scheduler)
    scheduler.complete(plan, np.array([7, -1, 7], dtype=np.int32))
    assert only_branch(records[1]).status is Status.RUNNING
    error: PagedKVError = StepError("no finite logits")
    assert scheduler.finish("b", 0, "error", error=error)
    assert records[1].error is error
    assert only_branch(records[1]).finish_reason == "error"
    run(scheduler)
    assert [only_branch(record).finish_reason for record in records] == ["length", "error", "length"]
    assert only_branch(records[0]).output_token_ids.tolist() == [7] * 6


def test_branch_whose_token_could_not_be_sampled_computes_it_again_until_it_is_ended() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        submit(scheduler, name, 3, max_tokens=10)
    step(scheduler)
    step(scheduler)  # the decode that follows is foreseen from this one
    first = plan_of(scheduler)
    scheduler.complete(first, np.array([7, -1], dtype=np.int32))
    again = plan_of(scheduler)
    assert again.token_ids.tolist() == [7, 7]
    assert again.positions.tolist() == [first.positions[0] + 1, first.positions[1]]
    assert again.slot_mapping[0, 1] == first.slot_mapping[0, 1]


@pytest.mark.parametrize("budget", [64, 6])
def test_blocks_of_a_step_without_a_token_for_their_branch_are_never_found(budget: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget)
    records = {name: submit(scheduler, name, tokens, namespace=name) for name, tokens in (("bad", 9), ("good", 9))}
    prompts = {name: record.request.prompt_token_ids for name, record in records.items()}
    found_before = 0
    while True:
        plan = plan_of(scheduler)
        tokens = [-1 if seq == only_branch(records["bad"]).seq else 7 for seq in plan.seqs[plan.sampling_seqs].tolist()]
        if -1 in tokens:
            break
        scheduler.complete(plan, np.array(tokens, dtype=np.int32))
        found_before = scheduler.manager.match(prompts["bad"], "bad").num_tokens
    scheduler.complete(plan, np.array(tokens, dtype=np.int32))
    scheduler.manager.check()
    assert scheduler.manager.match(prompts["bad"], "bad").num_tokens == found_before < 8
    assert scheduler.finish("bad", 0, "error")
    run(scheduler)
    assert scheduler.manager.match(prompts["bad"], "bad").num_tokens == found_before
    assert scheduler.manager.match(prompts["good"], "good").num_tokens >= 8
    assert scheduler.manager.statistics().groups[0].num_in_use == 0


def test_finish_of_a_waiting_branch_ends_it() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3)
    assert scheduler.finish("a", 0, "error")
    assert not scheduler.has_unfinished


# What is told


def test_record_of_a_life_reads_from_its_submission_to_its_end() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    submit(scheduler, "first", 3, 2)
    record = submit(scheduler, "a", 5, 2)
    run(scheduler)
    assert [str(event) for event in record.events] == [
        "step 0: submitted (num_prompt_tokens=5, max_tokens=2)",
        "step 0: waiting (reason=all sequences are taken: max_num_seqs, running=1)",
        "step 2: admitted (index=0, num_cached_tokens=0, miss=no full block of the prompt is cached in this namespace)",
        "step 4: finished (index=0, finish_reason=length)",
    ]


def test_record_of_nobody_is_none() -> None:
    assert make_scheduler().record("a") is None


@pytest.mark.parametrize("kept", [0, 2])
def test_records_of_the_last_ended_requests_are_kept(kept: int) -> None:
    scheduler = make_scheduler(num_ended_kept=kept)
    for request_id in ("a", "b", "c"):
        submit(scheduler, request_id, 3, 1)
        run(scheduler)
    known = [request_id for request_id in "abc" if scheduler.record(request_id) is not None]
    assert known == ["a", "b", "c"][3 - kept :]


def test_records_an_id_that_is_used_again_counts_as_ended_last() -> None:
    scheduler = make_scheduler(num_ended_kept=2)
    for request_id in ("a", "b", "a", "c"):
        submit(scheduler, request_id, 3, 1)
        run(scheduler)
    assert [request_id for request_id in "abc" if scheduler.record(request_id) is not None] == ["a", "c"]


def test_ended_branches_and_assignments_are_handed_out_once() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 1)
    run(scheduler)
    shown = scheduler.assignments
    assert [(each.request_id, each.index) for each in shown] == [("a", 0)]
    assert scheduler.take_assignments() == list(shown)
    assert scheduler.assignments == ()
    assert scheduler.take_assignments() == []
    assert ended(scheduler) == [("a", 0, "length")]
    assert ended(scheduler) == []


def test_scheduler_with_its_defaults_serves() -> None:
    scheduler = Scheduler(KVCacheManager(num_blocks=99))
    record = submit(scheduler, "a", 40, 3)
    run(scheduler)
    assert only_branch(record).finish_reason == "length"
    assert record.finished_time is not None
    assert record.first_scheduled_time is not None
    assert record.finished_time >= record.first_scheduled_time >= record.arrival_time


FIGURES = {
    EventKind.SUBMITTED: {"num_prompt_tokens": int, "max_tokens": int},
    EventKind.ADMITTED: {"index": int, "num_cached_tokens": int},
    EventKind.FORKED: {"n": int},
    EventKind.PREEMPTED: {"index": int, "freed_blocks": int},
    EventKind.UNDONE: {},
    EventKind.FINISHED: {"index": int, "finish_reason": str},
    WaitReason.SEQUENCES: {"reason": WaitReason, "running": int},
    WaitReason.BLOCKS: {"reason": WaitReason, "needed": int, "available": int},
    WaitReason.RESERVED: {"reason": WaitReason, "needed": int, "available": int},
    WaitReason.PREFIX: {"reason": WaitReason, "num_tokens": int, "shared_with": str},
    WaitReason.PREEMPTION: {"reason": WaitReason},
    WaitReason.TOKENS: {"reason": WaitReason, "budget": int},
}


def test_events_are_dated_by_their_step_and_hold_their_figures() -> None:
    seen: set[object] = set()
    for state, max_preemptions in (("none", 3), ("none", 0), ("whole", 3)):
        scheduler = make_scheduler(
            13, max_num_seqs=4, max_num_batched_tokens=9, max_preemptions=max_preemptions, recurrent_state=state, caching=state == "none"
        )
        records = [submit(scheduler, f"r{number}", [1, 2, 3, 4, 5, number // 2], 12, n=1 + number % 2) for number in range(8)]
        while scheduler.has_unfinished:
            before = [len(record.events) for record in records]
            plan = plan_of(scheduler)
            planned = [len(record.events) for record in records]
            if plan.step % 5 == 4:
                scheduler.undo(plan)
            else:
                complete(scheduler, plan)
            for record, begin, end in zip(records, before, planned, strict=True):
                assert {event.step for event in record.events[begin:end]} <= {plan.step}
                assert all(event.step == plan.step + (event.kind is not EventKind.UNDONE) for event in record.events[end:])
        for event in (event for record in records for event in record.events):
            what = event.detail["reason"] if event.kind is EventKind.WAITING else event.kind
            figures = {name: type(value) for name, value in event.detail.items() if name not in ("miss", "computed_one_by_one")}
            assert figures == FIGURES[what], str(event)
            seen.add(what)
    assert seen == FIGURES.keys()
