"""Who gives way when blocks run out, how often, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scheduling_helpers import (
    complete,
    events,
    make_scheduler,
    only_branch,
    plan_of,
    record_of,
    run,
    step,
    submit,
    wait_reasons,
)

from pagedkv.errors import InvariantError, OutOfBlocksError
from pagedkv.scheduling import (
    Candidate,
    EventKind,
    FirstComeFirstServed,
    LongestCachedPrefix,
    Priority,
    Scheduler,
    SchedulingPolicy,
    Status,
    WaitReason,
)


def pin_blocks(scheduler: Scheduler, count: int, *, release: bool = False) -> int:
    """Fill so many blocks with tokens 0, 1, ... through the scheduler's idle manager, and pin them (or leave them cached)."""
    manager = scheduler.manager
    opened = manager.open([list(range(4 * count))])
    manager.extend(opened.seqs, 4 * count)
    manager.complete(opened.seqs)
    pin, num_tokens = manager.pin(list(range(4 * count)))
    assert num_tokens == 4 * count
    manager.release(opened.seqs)
    if release:
        manager.unpin(pin)
    return pin


def preempted(scheduler: Scheduler, *request_ids: str) -> list[str]:
    """Who was preempted, of these."""
    return [request_id for request_id in request_ids if events(record_of(scheduler, request_id), EventKind.PREEMPTED)]


@pytest.mark.parametrize(
    ("policy", "priorities", "victim"),
    [
        (FirstComeFirstServed(), (0, 0, 0), "c"),
        (FirstComeFirstServed(), (0, 9, 0), "c"),
        (LongestCachedPrefix(), (0, 0, 0), "c"),
        (Priority(), (0, 0, 0), "c"),
        (Priority(), (0, 5, 1), "b"),
        (Priority(), (9, 1, 2), "c"),  # a ranks last, but is the oldest
    ],
)
def test_preemption_takes_the_one_that_ranks_last_but_never_the_oldest(
    policy: SchedulingPolicy, priorities: tuple[int, int, int], victim: str
) -> None:
    scheduler = make_scheduler(7, policy=policy, max_num_seqs=4)
    for request_id, priority in zip("abc", priorities, strict=True):
        submit(scheduler, request_id, 4, 12, priority=priority)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert preempted(scheduler, *"abc") == [victim]
    run(scheduler)
    assert all(len(only_branch(record_of(scheduler, each)).output_token_ids) == 12 for each in "abc")


def test_preemption_gives_back_everything_and_computes_it_again() -> None:
    scheduler = make_scheduler(6, max_num_seqs=2, caching=False)
    submit(scheduler, "a", 4, 12)
    late = submit(scheduler, "b", 4, 8)
    while scheduler.num_preemptions == 0:
        plan = plan_of(scheduler)
        complete(scheduler, plan, token=40)
    branch = only_branch(late)
    (event,) = events(late, EventKind.PREEMPTED)
    assert (branch.status, branch.row, branch.seq) == (Status.WAITING, -1, 0)
    assert dict(event.detail) == {"index": 0, "freed_blocks": 2}
    known = branch.token_ids.tolist()
    assert known[4:] == [40] * (len(known) - 4)
    assert wait_reasons(late) == [WaitReason.PREEMPTION]
    while branch.status is not Status.RUNNING:
        plan = step(scheduler, token=40)
    assert int(plan.query_lens.max()) == len(known)  # from the start, its own output included
    run(scheduler, token=40)
    assert branch.output_token_ids.tolist() == [40] * 8


def test_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make_scheduler(8, max_num_seqs=2)
    submit(scheduler, "a", 8, 12)
    late = submit(scheduler, "b", 8, 8)
    run(scheduler)
    admissions = events(late, EventKind.ADMITTED)
    assert late.num_preemptions == 1
    assert admissions[0].detail["num_cached_tokens"] == 0
    assert int(str(admissions[1].detail["num_cached_tokens"])) >= 4
    assert late.num_cached_tokens == 0  # what its first admission found


def test_preemption_stops_as_soon_as_there_is_room() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4)
    for request_id in "abcd":
        submit(scheduler, request_id, 4, 12)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    # Four sequences of two blocks each fill the pool and need one more each; two of them give way to the other two.
    assert preempted(scheduler, *"abcd") == ["c", "d"]
    freed = [event.detail["freed_blocks"] for request_id in "cd" for event in events(record_of(scheduler, request_id), EventKind.PREEMPTED)]
    assert freed == [2, 2]
    assert scheduler.manager.num_available_blocks == 2


def test_preemption_nobody_is_admitted_in_the_same_step() -> None:
    scheduler = make_scheduler(7, max_num_seqs=4, max_num_batched_tokens=64)
    for request_id in "abc":
        submit(scheduler, request_id, 4, 12)
    step(scheduler)
    while scheduler.num_preemptions == 0:
        urgent = submit(scheduler, f"urgent {scheduler.num_steps}", 1, 1)
        plan = step(scheduler)
    assert plan.num_decodes == plan.num_seqs
    assert WaitReason.PREEMPTION in wait_reasons(record_of(scheduler, preempted(scheduler, *"abc")[0])) + wait_reasons(urgent)
    run(scheduler)


@pytest.mark.parametrize("max_preemptions", [0, 1, 3])
@pytest.mark.parametrize("policy", [FirstComeFirstServed(), Priority(), LongestCachedPrefix()], ids=["fcfs", "priority", "prefix"])
def test_preemptions_of_one_request_are_bounded(policy: SchedulingPolicy, max_preemptions: int) -> None:
    scheduler = make_scheduler(10, policy=policy, max_num_seqs=6, max_preemptions=max_preemptions)
    records = [submit(scheduler, f"r{number}", 3 + number % 4, 16 - number, priority=number % 3) for number in range(10)]
    run(scheduler)
    assert max(record.num_preemptions for record in records) <= max_preemptions
    assert all(only_branch(record).finish_reason == "length" for record in records)
    assert (scheduler.num_preemptions > 0) == (max_preemptions > 0)
    assert scheduler.num_preemptions == sum(record.num_preemptions for record in records)


def test_preemptions_used_up_let_a_request_wait_until_all_are_sure_to_fit() -> None:
    scheduler = make_scheduler(6, max_num_seqs=2, max_preemptions=1)
    submit(scheduler, "a", 4, 12)
    late = submit(scheduler, "b", 4, 8)
    step(scheduler)
    assert scheduler.preempt("b")
    step(scheduler)
    (wait,) = events(late, EventKind.WAITING)
    assert dict(wait.detail) == {"reason": WaitReason.RESERVED, "needed": 3 + 2, "available": 3}
    run(scheduler)
    assert late.num_preemptions == 1
    assert only_branch(late).finish_reason == "length"


def test_preemptions_used_up_by_one_that_runs_let_another_wait_until_all_are_sure_to_fit() -> None:
    scheduler = make_scheduler(8, max_num_seqs=4, max_preemptions=1)
    submit(scheduler, "a", 4, 8)
    submit(scheduler, "b", 4, 8)
    step(scheduler)
    assert scheduler.preempt("b")
    step(scheduler)
    assert scheduler.num_running == 2
    late = submit(scheduler, "c", 4, 8)
    step(scheduler)
    assert wait_reasons(late) == [WaitReason.RESERVED]
    run(scheduler)
    assert scheduler.num_preemptions == 1


def test_preemptions_of_zero_admit_only_what_is_sure_to_fit() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4, max_preemptions=0)
    submit(scheduler, "a", 4, 13)
    late = submit(scheduler, "b", 4, 13)
    third = submit(scheduler, "c", 4, 13)
    step(scheduler)
    assert scheduler.num_running == 2
    assert wait_reasons(late) == []
    (wait,) = events(third, EventKind.WAITING)
    assert (wait.detail["reason"], wait.detail["needed"], wait.detail["available"]) == (WaitReason.RESERVED, 10, 6)
    run(scheduler)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "worst"),
    [
        (9, 8, 2 + 3 * 2),  # blocks: two of the prompt are shared, and 16 tokens take 4
        (8, 8, 1 + 3 * 3),  # the last prompt token is each branch's own, and so is its block
        (9, 9, 2 + 3 * 3),
    ],
)
@pytest.mark.parametrize("short_of", [0, 1])
def test_preemptions_of_zero_reckon_with_all_forks_of_one_that_waits(prompt: int, max_tokens: int, worst: int, short_of: int) -> None:
    first = 3  # what the first request, which holds one block, may still take
    scheduler = make_scheduler(1 + 1 + first + worst - short_of, max_num_seqs=8, max_preemptions=0)
    submit(scheduler, "a", 4, 13)
    step(scheduler)
    wide = submit(scheduler, "b", prompt, max_tokens, n=3)
    step(scheduler)
    taken = [dict(event.detail) for event in events(wide, EventKind.WAITING)]
    needed = {"reason": WaitReason.RESERVED, "needed": first - 1 + worst, "available": first - 1 + worst - short_of}
    assert taken == ([needed] if short_of else [])
    run(scheduler)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("prompt", "max_tokens", "worst"), [(9, 8, 8), (8, 8, 10), (9, 9, 11)])
@pytest.mark.parametrize("short_of", [0, 1])
def test_preemptions_of_zero_reckon_with_all_forks_of_one_that_runs(prompt: int, max_tokens: int, worst: int, short_of: int) -> None:
    scheduler = make_scheduler(1 + worst + 4 - short_of, max_num_seqs=8, max_preemptions=0)
    submit(scheduler, "a", prompt, max_tokens, n=3)
    late = submit(scheduler, "b", 4, 13)  # 4 blocks
    step(scheduler)  # "a" has two blocks by the time that "b" is looked at, and has not forked yet
    taken = [dict(event.detail) for event in events(late, EventKind.WAITING)]
    assert taken == ([{"reason": WaitReason.RESERVED, "needed": worst - 2 + 4, "available": worst + 2 - short_of}] if short_of else [])
    run(scheduler)
    assert scheduler.num_preemptions == 0


def test_preemption_leaves_the_oldest_alone_while_it_still_computes_its_prompt() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4, max_num_batched_tokens=6, policy=Priority(), caching=False)
    first = submit(scheduler, "a", 20, 8, priority=9)
    urgent = submit(scheduler, "b", 4, 8, priority=0)
    assert step(scheduler).query_lens.tolist() == [4, 2]
    run(scheduler)
    assert (first.num_preemptions, only_branch(first).finish_reason, only_branch(urgent).finish_reason) == (0, "length", "length")


def test_preemption_of_the_oldests_own_branches_is_the_last_resort() -> None:
    scheduler = make_scheduler(10, max_num_seqs=4, caching=False)
    wide = submit(scheduler, "a", 5, 12, n=2)
    late = submit(scheduler, "b", 4, 12)
    run(scheduler)
    assert (wide.num_preemptions, late.num_preemptions) == (0, 1)


def test_preemption_of_a_sibling_leaves_the_oldest_branch() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4)
    pin_blocks(scheduler, 3)
    record = submit(scheduler, "a", 5, 12, n=2)
    while (plan := scheduler.plan()) is not None:
        scheduler.complete(plan, 50 + plan.rows[plan.sampling_seqs])  # branches that say different things share no further block
    assert [(branch.num_preemptions, branch.finish_reason) for branch in record.branches] == [(0, "length"), (1, "length")]


def test_preempted_branches_that_share_all_blocks_go_together() -> None:
    scheduler = make_scheduler(11, max_num_seqs=4)
    manager = scheduler.manager
    pin_blocks(scheduler, 3, release=True)
    submit(scheduler, "a", 16, 9)
    wide = submit(scheduler, "b", 5, 2, n=2)
    step(scheduler)
    assert [manager.num_exclusive_blocks([branch.seq]) for branch in wide.branches] == [0, 0]
    manager.pin(list(range(12)))
    step(scheduler)
    assert [event.detail["freed_blocks"] for event in events(wide, EventKind.PREEMPTED)] == [1, 1]
    run(scheduler)
    assert all(branch.finish_reason == "length" for branch in wide.branches)


# From outside


def test_preempt_from_outside_takes_every_branch_and_gives_the_same_tokens() -> None:
    scheduler = make_scheduler(caching=False)
    record = submit(scheduler, "a", 5, 6, n=2)
    assert not scheduler.preempt("a")
    assert not scheduler.preempt("nobody")
    for _ in range(3):
        step(scheduler)
    assert scheduler.preempt("a")
    assert [branch.status for branch in record.branches] == [Status.WAITING] * 2
    assert scheduler.manager.num_available_blocks == 32
    assert not scheduler.preempt("a")
    run(scheduler)
    assert [len(branch.output_token_ids) for branch in record.branches] == [6, 6]
    assert not scheduler.preempt("a")


def test_preempt_from_outside_during_a_step_is_refused() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 5)
    plan = plan_of(scheduler)
    with pytest.raises(InvariantError, match=r"^a request cannot be preempted while a plan is outstanding: complete or undo it first$"):
        scheduler.preempt("a")
    complete(scheduler, plan)
    run(scheduler)


def test_preempt_from_outside_before_the_fork_computes_the_prompt_again() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    record = submit(scheduler, "a", 9, 2, n=2)
    step(scheduler)
    assert scheduler.preempt("a")
    assert only_branch(record).is_trunk
    run(scheduler)
    assert len(record.branches) == 2


# Pins: held from outside, they may leave too little for anybody


@pytest.mark.parametrize("free", [0, 1, 2])
def test_pins_that_leave_too_little_end_the_request_with_an_error_that_names_them(free: int) -> None:
    scheduler = make_scheduler(9)
    pin = pin_blocks(scheduler, 8 - free)
    record = submit(scheduler, "a", 9, 8)
    assert len(run(scheduler)) <= 9
    (branch,) = record.branches
    assert branch.finish_reason == "error"
    assert isinstance(record.error, OutOfBlocksError)
    assert (record.error.needed, record.error.available) == (1, 0)
    assert str(record.error).endswith("1 pinned prefixes are held: unpin some, or raise num_blocks")
    assert not scheduler.has_unfinished
    scheduler.manager.unpin(pin)
    submit(scheduler, "again", 9, 8)
    run(scheduler)
    assert only_branch(record_of(scheduler, "again")).finish_reason == "length"


def test_pins_that_end_one_request_let_the_next_run() -> None:
    scheduler = make_scheduler(9)
    pin_blocks(scheduler, 6)
    submit(scheduler, "large", 5, 8)
    small = submit(scheduler, "small", 3, 4)
    run(scheduler)
    assert only_branch(record_of(scheduler, "large")).finish_reason == "error"
    assert only_branch(small).finish_reason == "length"


def test_pins_that_leave_room_for_one_branch_of_a_fork_run_them_one_after_the_other() -> None:
    scheduler = make_scheduler(9)
    pin_blocks(scheduler, 6)
    record = submit(scheduler, "a", 3, 4, n=3)
    run(scheduler)
    assert [branch.finish_reason for branch in record.branches] == ["length"] * 3
    assert record.num_preemptions > 0
    assert record.error is None


def test_pins_set_while_requests_run_end_the_oldest_and_let_the_others_on() -> None:
    scheduler = make_scheduler(9, max_num_seqs=3)
    pin = pin_blocks(scheduler, 4, release=True)
    first = submit(scheduler, "a", 4, 20)
    second = submit(scheduler, "b", 4, 8)
    step(scheduler)
    pin, num_tokens = scheduler.manager.pin(list(range(16)))
    assert num_tokens == 16
    run(scheduler)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert [only_branch(record).finish_reason for record in (first, second)] == ["error", "length"]
    scheduler.manager.unpin(pin)
    assert all(group.num_in_use == 0 for group in scheduler.manager.statistics().groups)


def test_undo_of_a_chunk_in_a_full_pool_does_not_ask_for_another_block() -> None:
    scheduler = make_scheduler(2, max_num_batched_tokens=1)
    record = submit(scheduler, "a", 3, 1)
    step(scheduler)
    scheduler.undo(plan_of(scheduler))
    assert [plan.token_ids.tolist() for plan in run(scheduler)] == [[token] for token in record.request.prompt_token_ids[1:].tolist()]
    assert only_branch(record).finish_reason == "length"


def test_manager_that_somebody_else_empties_is_a_bug_of_the_caller_and_raised_as_one() -> None:
    scheduler = make_scheduler(num_blocks=5)
    submit(scheduler, "a", 3, max_tokens=8)
    step(scheduler)
    stranger = scheduler.manager.open([list(range(12))]).seqs
    scheduler.manager.extend(stranger, [12])
    step(scheduler)
    with pytest.raises(
        InvariantError, match=r"^request 'a' runs alone, .* scheduled: the manager is used by somebody else, too, or this is a bug$"
    ):
        scheduler.plan()


def test_nothing_to_schedule_although_somebody_waits_is_a_bug_and_raised_as_one() -> None:
    policy = LongestCachedPrefix()
    scheduler = make_scheduler(policy=policy)
    object.__setattr__(policy, "lookahead", 0)  # it looks at nobody any more
    submit(scheduler, "a", 3)
    with pytest.raises(InvariantError, match="nothing could be scheduled although 1 wait and nothing runs"):
        scheduler.plan()


def test_error_in_the_middle_of_planning_leaves_no_slots_reserved() -> None:
    class BrokenError(Exception):
        pass

    class Broken(LongestCachedPrefix):
        def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
            if len(candidates) > 1:
                raise BrokenError
            return 0

    scheduler = make_scheduler(policy=Broken())
    submit(scheduler, "a", 3)
    step(scheduler)
    submit(scheduler, "b", 3)
    submit(scheduler, "c", 3)
    for _ in range(2):
        with pytest.raises(BrokenError):
            scheduler.plan()
        assert scheduler.manager.statistics().num_reserved_tokens == 3
    scheduler.abort("b")
    run(scheduler)
    assert only_branch(record_of(scheduler, "c")).finish_reason == "length"
