"""Who may start, who waits and why: rows, blocks, shared prefixes, forks, and what is refused at submission."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scheduling_helpers import (
    complete,
    events,
    make_request,
    make_scheduler,
    only_branch,
    plan_of,
    record_of,
    run,
    step,
    submit,
    wait_reasons,
)

from pagedkv.core import KVCacheManager
from pagedkv.errors import DuplicateRequestError, RequestTooLargeError
from pagedkv.scheduling import EventKind, MissReason, Request, Scheduler, Status, WaitReason

# Submission


def test_submit_id_that_is_alive_is_refused_until_it_has_ended() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 1)
    with pytest.raises(DuplicateRequestError, match="request id 'a' is in use"):
        submit(scheduler, "a", 3, 1)
    assert scheduler.num_waiting == 1
    run(scheduler)
    submit(scheduler, "a", 3, 1)
    run(scheduler)


@pytest.mark.parametrize(
    ("prompt", "options", "unit", "needed", "limit", "help"),
    [
        (3, {"n": 5}, "sequences at once (n)", 5, 4, "lower n, or raise max_num_seqs and max_num_batched_tokens"),
        (20, {"max_tokens": 13}, "tokens", 33, 32, "shorten the prompt, lower max_tokens, or raise max_model_len or num_blocks"),
        (9, {"max_tokens": 8, "n": 3}, "blocks", 2 + 3 * 2, 7, "shorten the prompt, lower max_tokens or n, or raise num_blocks"),
        (8, {"max_tokens": 9, "n": 3}, "blocks", 1 + 3 * 3, 7, "shorten the prompt, lower max_tokens or n, or raise num_blocks"),
    ],
)
def test_submit_what_can_never_fit_is_refused_with_the_figures_and_what_would_help(
    prompt: int, options: dict[str, int], unit: str, needed: int, limit: int, help: str
) -> None:
    scheduler = make_scheduler([10, 8], max_num_seqs=4, max_seq_len=32)
    submit(scheduler, "other", 3)
    message = f"request 'a' needs {needed} {unit} and there can never be more than {limit}: {help}"
    with pytest.raises(RequestTooLargeError, match=f"^{re.escape(message)}$") as raised:
        submit(scheduler, "a", prompt, **options)
    assert (raised.value.needed, raised.value.limit, raised.value.unit) == (needed, limit, unit)
    assert scheduler.record("a") is None
    assert len(run(scheduler)) == 4


def test_submit_what_fits_to_the_last_block_is_taken_and_ends() -> None:
    scheduler = make_scheduler(9)
    for options in ({"max_tokens": 23}, {"max_tokens": 8, "n": 3}):
        submit(scheduler, "a", 9, **options)
        run(scheduler)
        assert {branch.finish_reason for branch in record_of(scheduler, "a").branches} == {"length"}
        assert scheduler.num_preemptions == 0


def test_submit_limits_come_from_the_smaller_of_scheduler_and_manager() -> None:
    manager = KVCacheManager(num_blocks=99, max_num_seqs=2)
    scheduler = Scheduler(manager)
    with pytest.raises(RequestTooLargeError, match="sequences at once"):
        scheduler.submit(make_request("a", 3, n=3))
    for request_id in "abc":
        scheduler.submit(make_request(request_id, 3, 2))
    run(scheduler)


def test_submit_during_a_step_waits_for_the_next() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3)
    plan = plan_of(scheduler)
    submit(scheduler, "b", 3)
    complete(scheduler, plan)
    assert step(scheduler).num_seqs == 2


# Rows and blocks


@pytest.mark.parametrize(("max_num_seqs", "budget", "limit"), [(2, 64, 2), (8, 3, 3)])
def test_admission_keeps_to_the_number_of_sequences(max_num_seqs: int, budget: int, limit: int) -> None:
    scheduler = make_scheduler(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    records = [submit(scheduler, request_id, 1, 3) for request_id in "abcd"]
    step(scheduler)
    assert scheduler.num_running == limit
    step(scheduler)
    if max_num_seqs == limit:  # with the budget used up nobody was looked at
        assert wait_reasons(records[limit]) == [WaitReason.SEQUENCES]
        assert events(records[limit], EventKind.WAITING)[0].detail["running"] == limit
    run(scheduler)
    assert all(record.finished for record in records)


def test_admission_waits_for_blocks_and_names_the_figures() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4)
    submit(scheduler, "a", 20, 4)
    late = submit(scheduler, "b", 12, 4)
    step(scheduler)
    assert wait_reasons(late) == [WaitReason.BLOCKS]
    assert dict(events(late, EventKind.WAITING)[0].detail) == {"reason": WaitReason.BLOCKS, "needed": 4, "available": 3}
    run(scheduler)
    assert events(late, EventKind.ADMITTED)[0].step == 4


def test_admission_nobody_overtakes_one_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4)
    submit(scheduler, "a", 20, 4)
    submit(scheduler, "big", 12, 1)
    small = submit(scheduler, "small", 1, 1)
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    run(scheduler)
    assert events(small, EventKind.ADMITTED)[0].step >= 4


def test_admission_watermark_keeps_blocks_free_beside_others_but_not_alone() -> None:
    scheduler = make_scheduler(11, watermark=0.3, max_num_seqs=4)
    submit(scheduler, "a", 27, 2)
    late = submit(scheduler, "b", 4, 1)
    step(scheduler)
    assert wait_reasons(late) == [WaitReason.BLOCKS]
    run(scheduler)
    submit(scheduler, "alone", 36, 4)
    run(scheduler)
    assert record_of(scheduler, "alone").branches[0].finish_reason == "length"


def test_admission_counts_a_cached_prefix_that_is_held_only_once() -> None:
    scheduler = make_scheduler(9, max_num_seqs=4)
    submit(scheduler, "a", list(range(16)), 8)
    step(scheduler)
    submit(scheduler, "b", [*range(16), 99], 4)
    step(scheduler)
    assert scheduler.num_running == 2
    assert record_of(scheduler, "b").num_cached_tokens == 16


@pytest.mark.parametrize("short_of", [0, 1])
def test_admission_to_the_end_counts_a_cached_prefix_that_is_held_only_once(short_of: int) -> None:
    first, second = 6 - 5, 5 - 4  # blocks until their ends, less what the first holds when the second is looked at, and what they share
    scheduler = make_scheduler(1 + 5 + first + second - short_of, max_num_seqs=4, max_preemptions=0)
    submit(scheduler, "a", list(range(16)), 8)
    step(scheduler)
    late = submit(scheduler, "b", [*range(16), 99], 4)
    step(scheduler)
    taken = [dict(event.detail) for event in events(late, EventKind.WAITING)]
    needed = {"reason": WaitReason.RESERVED, "needed": first + second, "available": first + second - short_of}
    assert taken == ([needed] if short_of else [])
    run(scheduler)
    assert scheduler.num_preemptions == 0


def test_admission_of_many_in_one_step_leaves_room_for_the_next_token_of_each() -> None:
    scheduler = make_scheduler(9, max_num_seqs=8)
    for request_id in "abcdefgh":
        submit(scheduler, request_id, 4, 4)
    step(scheduler)
    assert scheduler.num_running == 4
    run(scheduler)
    assert scheduler.num_preemptions == 0


# Shared prefixes


def test_prefix_that_is_being_computed_is_waited_for_and_computed_once() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    first = submit(scheduler, "a", [*range(100, 116), 50], 2)
    second = submit(scheduler, "b", [*range(100, 116), 60, 61], 2)
    plan = plan_of(scheduler)
    assert plan.query_lens.tolist() == [17]
    assert only_branch(second).status is Status.DEFERRED
    complete(scheduler, plan)
    assert only_branch(second).status is Status.WAITING
    (wait,) = events(second, EventKind.WAITING)
    assert dict(wait.detail) == {"reason": WaitReason.PREFIX, "num_tokens": 16, "shared_with": "a"}
    plans = run(scheduler)
    computed = [token for each in (plan, *plans) for token in each.token_ids.tolist()]
    assert all(computed.count(token) == 1 for token in range(100, 116))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert scheduler.manager.statistics().num_deduplicated == 0


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 16, 64])
def test_prefix_of_many_requests_is_computed_once_under_any_budget(budget: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget)
    for request_id in "abc":
        submit(scheduler, request_id, list(range(9)), 2)
    computed = [token for plan in run(scheduler) for token in plan.token_ids.tolist()]
    assert [computed.count(token) for token in range(7)] == [1] * 7  # 7 is what they sample, too
    assert computed.count(8) == 3


def test_prefix_that_ends_in_the_middle_of_a_prompt_is_waited_for_so_far() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(20)), 2)
    second = submit(scheduler, "b", [*range(10), *range(50, 60)], 2)
    step(scheduler)
    (wait,) = events(second, EventKind.WAITING)
    assert wait.detail["num_tokens"] == 8
    assert step(scheduler).query_lens.tolist() == [1, 12]


def test_prefix_of_which_two_tokens_are_left_to_compute_is_waited_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=7)
    submit(scheduler, "a", list(range(9)), 2)
    step(scheduler)
    second = submit(scheduler, "b", list(range(10)), 2)
    assert step(scheduler).query_lens.tolist() == [2]
    assert wait_reasons(second) == [WaitReason.PREFIX]
    run(scheduler)
    assert second.num_cached_tokens == 8


def test_prefix_that_another_is_about_to_fill_by_decoding_is_not_waited_for() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(7)), 4)
    step(scheduler, token=7)
    second = submit(scheduler, "b", list(range(12)), 2)
    assert step(scheduler).query_lens.tolist() == [1, 8]
    assert (wait_reasons(second), second.num_cached_tokens) == ([], 4)


def test_prefix_of_one_that_has_ended_is_not_mistaken_for_that_of_another_namespace() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    submit(scheduler, "ended", list(range(9)), 1)
    step(scheduler)
    submit(scheduler, "old", 2, 4)
    submit(scheduler, "elsewhere", list(range(20)), 2, namespace="other")  # in the last row, where one without a row might be looked for
    late = submit(scheduler, "late", list(range(20)), 2)
    step(scheduler)
    assert wait_reasons(late) == [WaitReason.SEQUENCES]
    run(scheduler)
    assert late.num_cached_tokens == 8


def test_prefix_that_will_not_be_published_any_more_is_not_waited_for() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(13)), 2)
    scheduler.undo(plan_of(scheduler))
    scheduler.manager.purge()
    second = submit(scheduler, "b", list(range(13)), 2)
    assert step(scheduler).query_lens.tolist() == [13, 13]
    assert wait_reasons(second) == []


def test_prefix_wait_lets_others_pass() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    submit(scheduler, "a", list(range(10)), 2)
    submit(scheduler, "b", list(range(10)), 2)
    other = submit(scheduler, "c", 2, 2)
    step(scheduler)
    assert only_branch(other).status is Status.RUNNING


def test_prefix_of_less_than_a_block_is_not_waited_for() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", [0, 1, 2, 50], 2)
    submit(scheduler, "b", [0, 1, 2, 60], 2)
    submit(scheduler, "c", [0, 1, 2, 50, 70], 2)
    assert step(scheduler).num_seqs == 3


@pytest.mark.parametrize("option", [{"namespace": "other"}, {"wants_prompt_logits": True}])
def test_prefix_that_cannot_be_shared_is_not_waited_for(option: dict[str, object]) -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(9)), 2)
    second = submit(scheduler, "b", list(range(9)), 2, **option)
    assert step(scheduler).query_lens.tolist() == [9, 9]
    assert wait_reasons(second) == []


def test_prefix_with_caching_off_is_not_waited_for() -> None:
    scheduler = make_scheduler(caching=False)
    for request_id in "ab":
        submit(scheduler, request_id, list(range(9)), 2)
    assert step(scheduler).query_lens.tolist() == [9, 9]


def test_prefix_of_a_namespace_that_was_purged_is_not_waited_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    submit(scheduler, "a", list(range(13)), 2)
    step(scheduler)
    scheduler.manager.purge()
    second = submit(scheduler, "b", list(range(13)), 2)
    for _ in range(3):
        step(scheduler)
    assert wait_reasons(second) == []
    run(scheduler)


def test_prefix_wait_ends_when_the_one_who_computes_it_ends() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(17)), 2)
    second = submit(scheduler, "b", list(range(17)), 2)
    scheduler.undo(plan_of(scheduler))
    assert only_branch(second).status is Status.DEFERRED
    assert scheduler.num_waiting == 1
    scheduler.abort("a")
    assert only_branch(second).status is Status.WAITING
    assert step(scheduler).query_lens.tolist() == [17]
    run(scheduler)
    assert second.num_cached_tokens == 0


def test_prefix_wait_goes_on_over_a_step_that_is_undone() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(17)), 2)
    second = submit(scheduler, "b", list(range(17)), 2)
    for _ in range(3):
        scheduler.undo(plan_of(scheduler))
    assert only_branch(second).status is Status.DEFERRED
    run(scheduler)
    assert second.num_cached_tokens == 16


def test_prefix_wait_of_a_request_that_is_aborted_is_over() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(17)), 2)
    second = submit(scheduler, "b", list(range(17)), 2)
    scheduler.undo(plan_of(scheduler))
    assert scheduler.abort("b")
    assert (only_branch(second).finish_reason, scheduler.num_waiting) == ("abort", 0)
    run(scheduler)


@pytest.mark.parametrize(("prompt", "reach"), [(9, 8), (8, 4)])  # the last token is left to the forks, and with it the block that it fills
def test_prefix_of_a_forking_request_reaches_to_what_it_computes_before_the_fork(prompt: int, reach: int) -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(prompt)), 2, n=2)
    second = submit(scheduler, "b", [*range(prompt), 99], 2)
    step(scheduler)
    (wait,) = events(second, EventKind.WAITING)
    assert wait.detail["num_tokens"] == reach
    run(scheduler)
    assert second.num_cached_tokens == reach


def test_prefix_index_of_very_many_requests_is_swept() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for number in range(40):
        submit(scheduler, f"r{number}", [number] * 5, 1)
    run(scheduler)
    assert all(record_of(scheduler, f"r{number}").finished for number in range(40))


@pytest.mark.parametrize(
    ("options", "caching", "reason"),
    [
        ({}, True, MissReason.NOT_CACHED),
        ({"wants_prompt_logits": True}, True, MissReason.PROMPT_LOGITS),
        ({}, False, MissReason.DISABLED),
    ],
)
def test_admission_without_cached_tokens_says_why(options: dict[str, bool], caching: bool, reason: MissReason) -> None:
    scheduler = make_scheduler(caching=caching)
    record = submit(scheduler, "a", 9, 1, **options)
    run(scheduler)
    (admitted,) = events(record, EventKind.ADMITTED)
    assert dict(admitted.detail) == {"index": 0, "num_cached_tokens": 0, "miss": reason}


def test_admission_with_cached_tokens_counts_them_and_computes_the_rest() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(9)), 1)
    run(scheduler)
    record = submit(scheduler, "b", list(range(9)), 1)
    plan = step(scheduler)
    assert (plan.token_ids.tolist(), plan.positions.tolist()) == ([8], [8])
    (admitted,) = events(record, EventKind.ADMITTED)
    assert dict(admitted.detail) == {"index": 0, "num_cached_tokens": 8}


def test_cached_prompt_whose_logits_are_wanted_is_computed_whole() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(9)), 1)
    run(scheduler)
    submit(scheduler, "b", list(range(9)), 1, wants_prompt_logits=True)
    assert step(scheduler).query_lens.tolist() == [9]
    assert scheduler.manager.statistics().num_deduplicated == 2


# Several continuations


@pytest.mark.parametrize("prompt", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize("budget", [3, 5, 64])
def test_fork_computes_the_prompt_once(prompt: int, budget: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget, max_num_seqs=3)
    record = submit(scheduler, "a", prompt, 4, n=3)
    plans = run(scheduler)
    tokens = record.request.prompt_token_ids.tolist()
    computed = [token for plan in plans for token in plan.token_ids.tolist()]
    assert [computed.count(token) for token in tokens] == [1] * (prompt - 1) + [3]
    assert [branch.index for branch in record.branches] == [0, 1, 2]
    assert all(len(branch.output_token_ids) == 4 for branch in record.branches)
    (forked,) = events(record, EventKind.FORKED)
    assert forked.detail["n"] == 3


def test_fork_assigns_a_row_to_each_continuation() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 5, 4, n=3)
    step(scheduler)
    step(scheduler)
    taken = [(each.request_id, each.index) for each in scheduler.take_assignments()]
    assert taken == [("a", 0), ("a", 0), ("a", 1), ("a", 2)]
    assert scheduler.take_assignments() == []


def test_fork_of_a_cached_prompt_happens_at_admission() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", list(range(9)), 1)
    run(scheduler)
    submit(scheduler, "b", list(range(9)), 2, n=3)
    plan = step(scheduler)
    assert plan.token_ids.tolist() == [8, 8, 8]
    assert plan.num_seqs == 3


def test_fork_at_admission_lets_others_start_in_the_same_step() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 1, 2, n=2)
    submit(scheduler, "b", 3, 2)
    assert step(scheduler).query_lens.tolist() == [1, 1, 3]


def test_fork_at_admission_keeps_to_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    submit(scheduler, "a", 3, 5)
    record = submit(scheduler, "b", 1, 3, n=3)
    plan = step(scheduler)
    assert plan.query_lens.tolist() == [3, 1]  # one of three continuations
    assert step(scheduler).num_decodes == 4
    run(scheduler)
    assert [len(branch.output_token_ids) for branch in record.branches] == [3, 3, 3]


def test_fork_waits_until_all_its_rows_are_free() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    submit(scheduler, "a", 3, 3)
    wide = submit(scheduler, "b", 3, 3, n=3)
    step(scheduler)
    assert wait_reasons(wide) == [WaitReason.SEQUENCES]
    run(scheduler)
    assert wide.finished


def test_fork_reserves_rows_against_those_who_come_later() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    submit(scheduler, "a", 9, 3, n=2)
    submit(scheduler, "b", 2, 3)
    late = submit(scheduler, "c", 2, 3)
    complete(scheduler, plan_of(scheduler))
    assert scheduler.num_running == 3
    assert wait_reasons(late) == [WaitReason.SEQUENCES]
    run(scheduler)
    assert late.finished


def test_prompt_of_a_fork_in_another_priority_is_a_request_like_any_other() -> None:
    scheduler = make_scheduler()
    scheduler.submit(Request("a", np.array([5]), 1, n=2))
    assert [plan.token_ids.tolist() for plan in run(scheduler)] == [[5, 5]]
