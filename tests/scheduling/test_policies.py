"""The three policies, and the parts that ask them: the waiting queue and the index of prefixes in flight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scheduling_helpers import events, make_request, make_scheduler, only_branch, record_of, run, step, submit

from pagedkv.errors import ConfigError
from pagedkv.scheduling import (
    Branch,
    Candidate,
    EventKind,
    FirstComeFirstServed,
    LongestCachedPrefix,
    Priority,
    RequestRecord,
    SchedulingPolicy,
    Status,
)
from pagedkv.scheduling.inflight import PrefixesInFlight
from pagedkv.scheduling.waiting import WaitingQueue


def candidate(arrival: int, *, priority: int = 0, num_passed_over: int = 0) -> Candidate:
    return Candidate(arrival, priority, num_tokens=5, num_passed_over=num_passed_over)


@pytest.mark.parametrize(
    ("policy", "order"),
    [(FirstComeFirstServed(), [0, 1, 2]), (Priority(), [1, 0, 2]), (LongestCachedPrefix(), [0, 1, 2])],
    ids=["first come", "priority", "longest cached prefix"],
)
def test_policy_ranks_candidates(policy: SchedulingPolicy, order: list[int]) -> None:
    candidates = [candidate(0, priority=5), candidate(1, priority=-1), candidate(2, priority=5)]
    assert [each.arrival for each in sorted(candidates, key=policy.rank)] == order


@pytest.mark.parametrize("policy", [FirstComeFirstServed(), Priority()])
def test_policy_without_lookahead_chooses_the_first(policy: SchedulingPolicy) -> None:
    assert policy.choose([candidate(0), candidate(1)], [0, 99]) == 0


@pytest.mark.parametrize("lookahead", [None, 0, 1.5], ids=["none", "zero", "no integer"])
def test_policy_without_a_lookahead_that_can_be_is_refused(lookahead: object) -> None:
    class Shortsighted:
        rank = choose = staticmethod(lambda *_: 0)

    if lookahead is not None:
        Shortsighted.lookahead = lookahead  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"^the policy's lookahead is {lookahead}\b.* at least 1"):
        make_scheduler(policy=Shortsighted())  # type: ignore[arg-type]


@pytest.mark.parametrize(("cached", "chosen"), [([0, 0, 0], 0), ([0, 8, 4], 1), ([0, 8, 8], 1), ([0, 0, 4], 2)])
def test_longest_cached_prefix_chooses_the_most_cached_and_of_equals_the_first(cached: list[int], chosen: int) -> None:
    assert LongestCachedPrefix().choose([candidate(0), candidate(1), candidate(2)], cached) == chosen


def test_longest_cached_prefix_gives_way_to_who_was_passed_over_too_often() -> None:
    policy = LongestCachedPrefix(patience=3)
    waiting = [candidate(0, num_passed_over=2), candidate(1, num_passed_over=3), candidate(2)]
    assert policy.choose(waiting, [0, 0, 99]) == 1


def branches(*requests: tuple[str, int, int]) -> list[Branch]:
    """Waiting branches from (id, arrival, priority)."""
    made = []
    for request_id, arrival, priority in requests:
        record = RequestRecord(make_request(request_id, 5, priority=priority), arrival, 0.0)
        record.branches.append(Branch(record, 0, record.request.prompt_token_ids))
        made += record.branches
    return made


def names(queue: WaitingQueue) -> list[str]:
    return [branch.request.request_id for branch in queue]


def nothing_cached(_: Branch) -> int:
    return 0


def test_queue_gives_the_best_ranked_and_leaves_it_in() -> None:
    queue = WaitingQueue(Priority())
    assert queue.next(nothing_cached) is None
    waiting = branches(("a", 0, 2), ("b", 1, 1), ("c", 2, 1))
    for branch in waiting:
        queue.push(branch)
    assert queue.next(nothing_cached) is waiting[1]
    assert queue.next(nothing_cached) is waiting[1]
    assert names(queue) == ["b", "c", "a"]
    queue.remove(waiting[1])
    queue.remove(waiting[1])
    assert queue.next(nothing_cached) is waiting[2]
    assert (len(queue), names(queue)) == (2, ["c", "a"])


def test_queue_with_lookahead_asks_the_policy_and_counts_who_was_passed_over() -> None:
    queue = WaitingQueue(LongestCachedPrefix(lookahead=2))
    assert queue.next(nothing_cached) is None
    waiting = branches(("a", 0, 0), ("b", 1, 0), ("c", 2, 0))
    for branch in waiting:
        queue.push(branch)
    cached = {"a": 0, "b": 4, "c": 99}  # c is beyond the lookahead
    assert queue.next(lambda branch: cached[branch.request.request_id]) is waiting[1]
    assert [branch.num_passed_over for branch in waiting] == [0, 0, 0]  # to ask is not to admit
    queue.take(waiting[1])
    assert [branch.num_passed_over for branch in waiting] == [1, 0, 0]
    assert queue.next(lambda branch: cached[branch.request.request_id]) is waiting[2]
    queue.take(waiting[2])
    assert waiting[0].num_passed_over == 2
    assert queue.next(nothing_cached) is waiting[0]
    assert names(queue) == ["a"]


class ShortestFirst(LongestCachedPrefix):
    """A policy as somebody else may write one."""

    def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
        lengths = [candidate.num_tokens for candidate in candidates]
        return lengths.index(min(lengths))


def test_policy_is_told_how_many_tokens_each_waiting_request_knows() -> None:
    scheduler = make_scheduler(policy=ShortestFirst(), max_num_seqs=1)
    for request_id, prompt in (("long", 9), ("short", 4), ("middle", 5)):
        submit(scheduler, request_id, prompt, 4)
    for _ in range(3):
        step(scheduler)
    scheduler.preempt("short")  # it knows seven tokens by now
    order: list[str] = []
    while scheduler.has_unfinished:
        step(scheduler)
        order += [branch.request.request_id for branch in scheduler.take_ended()]
    assert order == ["middle", "short", "long"]


def test_queue_deferred_branch_comes_back_when_enough_is_computed() -> None:
    queue = WaitingQueue(FirstComeFirstServed())
    first, second = branches(("a", 0, 0), ("b", 1, 0))
    for branch in (first, second):
        queue.push(branch)
    queue.defer(first, 3, 8)
    queue.defer(second, 3, 16)
    assert (len(queue), queue.next(nothing_cached), queue.deferred_rows) == (2, None, [3])
    assert names(queue) == ["a", "b"]
    queue.wake(3, 7)
    assert queue.next(nothing_cached) is None
    queue.wake(3, 8)
    assert queue.next(nothing_cached) is first
    assert (first.status, second.status) == (Status.WAITING, Status.DEFERRED)
    queue.wake(3)
    assert names(queue) == ["a", "b"]
    assert queue.deferred_rows == []
    queue.wake(3)


def test_queue_deferred_branch_that_was_removed_does_not_come_back() -> None:
    queue = WaitingQueue(FirstComeFirstServed())
    (branch,) = branches(("a", 0, 0))
    queue.push(branch)
    queue.defer(branch, 3, 8)
    queue.remove(branch)
    branch.move(Status.FINISHED)
    assert names(queue) == []
    queue.wake(3)
    assert (len(queue), queue.next(nothing_cached)) == (0, None)


def test_queue_deferred_branches_come_back_though_one_before_them_was_removed() -> None:
    queue = WaitingQueue(FirstComeFirstServed())
    gone, *others = branches(("a", 0, 0), ("b", 1, 0), ("c", 2, 0))
    for branch in (gone, *others):
        queue.push(branch)
        queue.defer(branch, 3, 8)
    queue.remove(gone)
    gone.move(Status.FINISHED)
    queue.wake(3, 8)
    assert (names(queue), len(queue), queue.deferred_rows) == (["b", "c"], 2, [])


def test_index_finds_by_namespace_and_first_block_only_what_still_prefills() -> None:
    prefilling: set[Branch] = set()
    index = PrefixesInFlight(4, prefilling.__contains__)
    one, two = branches(("a", 0, 0), ("a", 1, 0))
    prefilling |= {one, two}
    for branch in (one, two):
        index.add(branch)
    assert list(index.find("", one.token_ids)) == [one, two]
    assert list(index.find("other", one.token_ids)) == []
    assert list(index.find("", one.token_ids[:4])) == []  # nothing to share: the last token is computed anyway
    prefilling.discard(one)
    assert list(index.find("", one.token_ids)) == [two]
    prefilling.clear()
    assert list(index.find("", one.token_ids)) == []
    assert len(index) == 0


def test_index_sweep_drops_what_has_finished() -> None:
    prefilling: set[Branch] = set()
    index = PrefixesInFlight(4, prefilling.__contains__)
    waiting = branches(("a", 0, 0), ("b", 1, 0), ("c", 2, 0))
    prefilling |= set(waiting[:2])
    for branch in waiting:
        index.add(branch)
    index.sweep()
    assert len(index) == 2
    assert list(index.find("", waiting[1].token_ids)) == [waiting[1]]


def test_index_of_an_endless_stream_of_one_prompt_stays_small() -> None:
    index = PrefixesInFlight(4, lambda branch: False)
    for branch in branches(*[("a", number, 0) for number in range(50)]):
        index.add(branch)
    assert list(index.find("", branch.token_ids)) == []
    (last,) = branches(("a", 50, 0))
    index.add(last)
    assert len(index) == 1


def test_scheduler_priority_admits_the_urgent_first() -> None:
    scheduler = make_scheduler(policy=Priority(), max_num_seqs=1)
    for request_id, priority in (("a", 2), ("b", 1), ("c", 1)):
        submit(scheduler, request_id, 5, 1, priority=priority)
    run(scheduler)
    admitted = {request_id: events(record_of(scheduler, request_id), EventKind.ADMITTED)[0].step for request_id in "abc"}
    assert admitted == {"b": 0, "c": 1, "a": 2}


def test_scheduler_longest_cached_prefix_goes_first_and_patience_ends_it() -> None:
    scheduler = make_scheduler(policy=LongestCachedPrefix(lookahead=8, patience=2), max_num_seqs=1)
    submit(scheduler, "seed", list(range(8)), 1)
    run(scheduler)
    cold = submit(scheduler, "cold", [50] * 9, 1)
    for number in range(4):
        submit(scheduler, f"warm {number}", [*range(8), number], 1)
    order = []
    while scheduler.has_unfinished:
        step(scheduler)
        order += [branch.request.request_id for branch in scheduler.take_ended()]
    assert order[-5:] == ["warm 0", "warm 1", "cold", "warm 2", "warm 3"]
    assert only_branch(cold).num_passed_over == 2
    assert record_of(scheduler, "warm 0").num_cached_tokens == 8


def test_queue_branch_that_comes_back_before_its_old_entry_is_dropped_is_there_once() -> None:
    seen: list[int] = []

    class Counting(LongestCachedPrefix):
        def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
            seen.append(len(candidates))
            return super().choose(candidates, num_cached_tokens)

    queue = WaitingQueue(Counting())
    first, second, third = branches(("a", 0, 0), ("b", 1, 0), ("c", 2, 0))
    for branch in (first, second, third):
        queue.push(branch)
    for _ in range(5):
        queue.defer(second, 3, 8)
        queue.wake(3)
    assert names(queue) == ["a", "b", "c"]
    assert queue.next(nothing_cached) is first
    assert seen == [3]
    queue.remove(second)
    assert names(queue) == ["a", "c"]
