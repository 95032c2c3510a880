"""The scheduler's own invariants, and when they are verified: at the manager's check level, after every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scheduling_helpers import complete, make_scheduler, plan_of, run, step, submit

from pagedkv.errors import InvariantError
from pagedkv.scheduling import Scheduler, Status

Corruption = Callable[[Scheduler], object]


def busy_scheduler(check: str = "off") -> Scheduler:
    """A fork of three that runs, another that runs, two that wait; between two steps."""
    scheduler = make_scheduler(41, max_num_seqs=4, max_num_batched_tokens=32, check=check)
    submit(scheduler, "fork", 6, 20, n=3)
    submit(scheduler, "one", 4, 20)
    for name in ("wait", "more"):
        submit(scheduler, name, 3, 4)
    step(scheduler)
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 2)
    return scheduler


def waiter(scheduler: Scheduler) -> object:
    return next(iter(scheduler._waiting))


def lose_sequence(scheduler: Scheduler) -> None:
    scheduler.manager.release([int(scheduler._running.seqs[3])])


def reserve(scheduler: Scheduler) -> None:
    scheduler.manager.extend([int(scheduler._running.seqs[3])], 1)


def outlive(scheduler: Scheduler) -> None:
    scheduler._running.limits[scheduler._running.rows[1]] = 5


def forget_running(scheduler: Scheduler) -> None:
    scheduler._running.drop([int(scheduler._running.rows[3])])


COUNTS: list[tuple[Corruption, str]] = [
    (lose_sequence, "4 branches run, 3 of them hold a sequence, and the manager has 3 sequences"),
    (forget_running, "3 branches run, 3 of them hold a sequence, and the manager has 4 sequences"),
    (reserve, r"row 3: 7 tokens reserved and 6 computed, and no step is under way"),
    (outlive, r"row 0: 7 tokens known, 5 end it, and it runs"),
    (lambda scheduler: scheduler._records.clear(), "0 requests have not ended, 4 branches run and 2 wait"),
]

BRANCHES: list[tuple[Corruption, str]] = [
    (lambda scheduler: setattr(scheduler._records["fork"].branches[1], "index", 0), "'fork': 3 continuations, 3 alive; indices repeat"),
    (lambda scheduler: setattr(scheduler._records["wait"].branches[0], "status", Status.FINISHED), "'wait': 1 continuations, 0 alive"),
    (lambda scheduler: scheduler._records["one"].branches.clear(), "'one': 0 continuations, 0 alive"),
    (
        lambda scheduler: setattr(scheduler._records["one"].branches[0], "row", 0),
        "'one', continuation 0 is running and .* row 0 is not its own",
    ),
    (
        lambda scheduler: setattr(scheduler._records["one"].branches[0], "seq", 5),
        "'one', continuation 0 is running and .* its own, with seq",
    ),
    (lambda scheduler: setattr(scheduler._records["one"].branches[0], "status", Status.WAITING), "is waiting and is 0 times in the queue"),
    (lambda scheduler: setattr(waiter(scheduler), "row", 2), "'wait', continuation 0 is waiting and is 1 times in the queue with row 2"),
    (lambda scheduler: setattr(waiter(scheduler), "seq", 9), "'wait', continuation 0 is waiting and .* with row -1 and sequence 9"),
    (lambda scheduler: setattr(scheduler._running, "num_trunks", 1), r"counted \(4, 2, 1, 0, 0\), found \(4, 2, 0, 0, 0\)"),
    (lambda scheduler: setattr(scheduler._running, "num_preempted", 1), r"counted \(4, 2, 0, 0, 1\), found \(4, 2, 0, 0, 0\)"),
    (
        lambda scheduler: scheduler._waiting.push(waiter(scheduler)) or setattr(scheduler._waiting, "_num_deferred", 1),
        "3 in the queue|found",
    ),
]


@pytest.mark.parametrize(("corrupt", "problem"), COUNTS + BRANCHES, ids=[problem[:40] for _, problem in COUNTS + BRANCHES])
def test_check_broken_books_are_named(corrupt: Corruption, problem: str) -> None:
    scheduler = busy_scheduler()
    scheduler.check()
    corrupt(scheduler)
    with pytest.raises(InvariantError, match=f"scheduler: .*{problem}"):
        scheduler.check()


def test_check_a_trunk_and_the_rows_kept_for_its_forks_are_counted() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    submit(scheduler, "fork", 9, n=3)
    step(scheduler)
    scheduler.check()
    scheduler._running.num_reserved_rows -= 1
    names = "running, waiting, trunks, rows kept for forks, preempted before"
    with pytest.raises(InvariantError, match=rf"^scheduler: {names}: counted \(1, 0, 1, 1, 0\), found \(1, 0, 1, 2, 0\), and 0 in"):
        scheduler.check()


def test_check_during_a_step_is_refused() -> None:
    scheduler = busy_scheduler()
    plan = plan_of(scheduler)
    with pytest.raises(InvariantError, match=r"^a plan is outstanding: complete or undo it first$"):
        scheduler.check()
    scheduler.undo(plan)
    scheduler.check()


def count_too_many(scheduler: Scheduler) -> None:
    scheduler._running.num_preempted += 1


def end_too_early(scheduler: Scheduler) -> None:
    scheduler._running.limits[scheduler._running.rows[3]] = 5


@pytest.mark.parametrize(("level", "sees"), [("off", 0), ("step", 1), ("audit", 2)])
def test_check_level_is_the_managers_and_holds_after_each_step(level: str, sees: int) -> None:
    for number, corrupt in enumerate((end_too_early, count_too_many)):
        for undone in (False, True):
            scheduler = busy_scheduler(level)
            plan = plan_of(scheduler)
            corrupt(scheduler)
            if number >= sees:
                end(scheduler, undone, plan)
                continue
            with pytest.raises(InvariantError, match="scheduler: "):
                end(scheduler, undone, plan)


def end(scheduler: Scheduler, undone: bool, plan: object) -> None:
    if undone:
        scheduler.undo(plan)  # type: ignore[arg-type]
    else:
        complete(scheduler, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["step", "audit"])
def test_check_level_whole_load_is_silent_and_plans_as_without(level: str) -> None:
    plans = []
    for check in ("off", level):
        scheduler = make_scheduler(13, max_num_seqs=8, max_num_batched_tokens=9, check=check)
        for number in range(8):
            submit(scheduler, f"r{number}", [1, 2, 3, 4, 5, 6 + number // 2], 12, n=1 + number % 2)
        plans.append(run(scheduler))
        assert scheduler.num_preemptions > 0
    for plain, watched in zip(*plans, strict=True):
        assert np.array_equal(plain.slot_mapping, watched.slot_mapping)
        assert np.array_equal(plain.token_ids, watched.token_ids)
