"""The arrays of a plan against hand computation, and how many tokens go into a step."""

from __future__ import annotations

import numpy as np
import pytest
from scheduling_helpers import complete, make_scheduler, plan_of, record_of, run, running, step, submit

from pagedkv.core import KVCacheManager, LeastRecentlyUsed
from pagedkv.errors import InvalidRequestError, InvariantError
from pagedkv.plan import Int32Array
from pagedkv.scheduling import Scheduler


def test_plan_of_two_prefills_holds_what_was_worked_out_by_hand() -> None:
    scheduler = make_scheduler(9)
    submit(scheduler, "a", [10, 11, 12, 13, 14])
    submit(scheduler, "b", [20, 21])
    plan = plan_of(scheduler)
    assert plan.step == 0
    assert (plan.num_seqs, plan.num_tokens, plan.num_decodes) == (2, 7, 0)
    assert plan.rows.tolist() == [0, 1]
    assert scheduler.manager.rows_of(plan.seqs).tolist() == [0, 1]
    assert plan.token_ids.tolist() == [10, 11, 12, 13, 14, 20, 21]
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert plan.query_lens.tolist() == [5, 2]
    assert plan.seq_lens.tolist() == [5, 2]
    assert plan.cu_seqlens_q.tolist() == [0, 5, 7]
    assert plan.slot_mapping.tolist() == [[4, 5, 6, 7, 8, 12, 13]]
    assert plan.block_tables[0, :2, :3].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert [copies.tolist() for copies in plan.copies] == [[]]
    assert plan.logits_indices.tolist() == [4, 6]
    assert plan.sampling_seqs.tolist() == [0, 1]
    assert plan.sampling_logits.tolist() == [0, 1]


def test_plan_of_decodes_beside_a_chunk_puts_decodes_first() -> None:
    scheduler = make_scheduler(9, max_num_batched_tokens=6)
    submit(scheduler, "a", [10, 11, 12, 13])
    complete(scheduler, plan_of(scheduler), 14)
    submit(scheduler, "b", list(range(20, 28)))
    plan = plan_of(scheduler)
    assert (plan.step, plan.num_decodes) == (1, 1)
    assert plan.token_ids.tolist() == [14, 20, 21, 22, 23, 24]
    assert plan.positions.tolist() == [4, 0, 1, 2, 3, 4]
    assert plan.query_lens.tolist() == [1, 5]
    assert plan.seq_lens.tolist() == [5, 5]
    assert plan.slot_mapping.tolist() == [[8, 12, 13, 14, 15, 16]]
    assert plan.logits_indices.tolist() == [0]  # the chunk does not reach the end of its prompt
    assert plan.sampling_seqs.tolist() == [0]
    complete(scheduler, plan, 15)
    plan = plan_of(scheduler)
    assert plan.token_ids.tolist() == [15, 25, 26, 27]
    assert plan.positions.tolist() == [5, 5, 6, 7]
    assert plan.logits_indices.tolist() == [0, 3]
    assert plan.sampling_seqs.tolist() == [0, 1]


def test_plan_of_decodes_alone_has_one_token_for_each() -> None:
    scheduler = make_scheduler()
    for request_id in "abc":
        submit(scheduler, request_id, 3, 8)
    step(scheduler, token=70)
    for token in (71, 72):
        plan = plan_of(scheduler)
        assert plan.num_decodes == plan.num_seqs == plan.num_tokens == 3
        assert plan.token_ids.tolist() == [token - 1] * 3
        assert plan.query_lens.tolist() == [1, 1, 1]
        assert plan.cu_seqlens_q.tolist() == [0, 1, 2, 3]
        assert plan.logits_indices.tolist() == plan.sampling_seqs.tolist() == plan.sampling_logits.tolist() == [0, 1, 2]
        complete(scheduler, plan, token)


def test_plan_of_several_groups_maps_slots_in_each() -> None:
    scheduler = make_scheduler([9, 12])
    submit(scheduler, "a", 5)
    plan = plan_of(scheduler)
    assert plan.slot_mapping.shape == (2, 5)
    assert plan.block_tables.shape[0] == 2
    assert [copies.shape for copies in plan.copies] == [(0, 2), (0, 2)]


def test_plan_with_wanted_prompt_logits_lists_every_position_and_samples_from_the_last() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    submit(scheduler, "quiet", 3)
    submit(scheduler, "loud", 9, wants_prompt_logits=True)
    plan = plan_of(scheduler)
    assert plan.query_lens.tolist() == [3, 5]
    assert plan.logits_indices.tolist() == [2, 3, 4, 5, 6, 7]
    assert (plan.sampling_seqs.tolist(), plan.sampling_logits.tolist()) == ([0], [0])
    complete(scheduler, plan)
    plan = plan_of(scheduler)
    assert plan.query_lens.tolist() == [1, 4]
    assert plan.logits_indices.tolist() == [0, 1, 2, 3, 4]
    assert (plan.sampling_seqs.tolist(), plan.sampling_logits.tolist()) == ([0, 1], [0, 4])


def test_plan_arrays_have_the_types_that_are_promised() -> None:
    scheduler = make_scheduler([33, 33], max_num_batched_tokens=6)
    submit(scheduler, "a", 10, 6, n=2)
    submit(scheduler, "b", 5, 6, wants_prompt_logits=True)
    plans = run(scheduler)
    kinds = {(plan.num_decodes > 0, plan.num_seqs > plan.num_decodes, len(plan.copies[0])) for plan in plans}
    assert kinds >= {(False, True, 0), (True, True, 1), (True, False, 0)}  # prefills alone, a mixture in which a fork copies, decodes alone
    for plan in plans:
        for name in ("token_ids", "positions", "query_lens", "seq_lens", "cu_seqlens_q", "block_tables"):
            assert getattr(plan, name).dtype == np.int32, name
        for name in ("seqs", "rows", "slot_mapping", "logits_indices", "sampling_seqs", "sampling_logits"):
            assert getattr(plan, name).dtype == np.int64, name
        assert all(copies.dtype == np.int32 for copies in plan.copies)
        with pytest.raises(ValueError, match="read-only"):
            plan.block_tables[0, 0, 0] = 1


def test_plan_of_decodes_shows_only_frozen_arrays_since_later_plans_show_them_again() -> None:
    scheduler = make_scheduler()
    for request_id in "ab":
        submit(scheduler, request_id, 3)
    step(scheduler)
    step(scheduler)
    plan = step(scheduler)
    for name in ("seqs", "token_ids", "query_lens", "cu_seqlens_q", "logits_indices", "sampling_seqs", "sampling_logits"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[0] = 9


def test_plan_copies_the_shared_tail_of_a_fork() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", [1, 2, 3], n=2)
    first = step(scheduler)
    assert first.token_ids.tolist() == [1, 2]
    plan = plan_of(scheduler)
    assert plan.token_ids.tolist() == [3, 3]
    assert plan.copies[0].tolist() == [[1, 2]]
    assert plan.slot_mapping.tolist() == [[10, 6]]


def test_plan_when_nothing_is_left_is_none() -> None:
    scheduler = make_scheduler()
    assert scheduler.plan() is None
    submit(scheduler, "a", 3, 1)
    run(scheduler)
    assert scheduler.plan() is None
    assert (scheduler.num_steps, scheduler.num_running, scheduler.num_waiting) == (1, 0, 0)


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 7, 64])
def test_prefill_is_cut_into_chunks_of_the_budget(budget: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget)
    submit(scheduler, "a", 11, 1)
    chunks = [plan.num_tokens for plan in run(scheduler)]
    assert chunks == [budget] * (11 // budget) + ([11 % budget] if 11 % budget else [])


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 7])
def test_mixture_of_decodes_and_prefills_keeps_to_the_budget_and_ends_alike(budget: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=budget)
    prompts = {"a": 3, "b": 9, "c": 1, "d": 5}
    for request_id, length in prompts.items():
        submit(scheduler, request_id, length, 5)
    plans = run(scheduler)
    assert all(0 < plan.num_tokens <= budget for plan in plans)
    assert all((plan.query_lens[: plan.num_decodes] == 1).all() for plan in plans)
    for request_id, length in prompts.items():
        (branch,) = record_of(scheduler, request_id).branches
        assert (branch.finish_reason, len(branch.token_ids)) == ("length", length + 5)
    assert sum(plan.num_tokens for plan in plans) == sum(prompts.values()) + 4 * 4
    assert sum(len(plan.sampling_seqs) for plan in plans) == 4 * 5


def test_mixture_every_running_decode_is_in_every_step() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=3)
    submit(scheduler, "a", 2, 20)
    step(scheduler)
    submit(scheduler, "b", 12, 2)
    for _ in range(4):
        plan = step(scheduler)
        assert running(scheduler, "a")["a"] == plan.rows[:1].tolist()
        assert plan.query_lens.tolist() == [1, 3]


def test_prefill_that_is_running_goes_before_one_that_waits() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    submit(scheduler, "a", 6)
    submit(scheduler, "b", 6)
    assert step(scheduler).query_lens.tolist() == [4]
    assert step(scheduler).query_lens.tolist() == [2, 2]
    assert step(scheduler).query_lens.tolist() == [1, 3]


def test_prefills_that_share_the_budget_are_served_in_order_of_admission() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5, max_num_seqs=3)
    submit(scheduler, "a", 2, 9)
    submit(scheduler, "b", 9, 2)
    assert step(scheduler).query_lens.tolist() == [2, 3]
    submit(scheduler, "c", 9, 2)
    assert step(scheduler).query_lens.tolist() == [1, 4]
    plan = step(scheduler)
    assert plan.rows.tolist() == [running(scheduler, each)[each][0] for each in "abc"]
    assert plan.query_lens.tolist() == [1, 2, 2]


def test_stop_ids_of_different_numbers_end_their_own_requests() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 9, eos_token_ids=(50,))
    submit(scheduler, "b", 3, 9, eos_token_ids=(51,), stop_token_ids=(52, 53))
    submit(scheduler, "c", 3, 9)
    submit(scheduler, "d", 3, 9, stop_token_ids=(50,), min_tokens=3)
    for token in (50, 53, 50, 51):
        step(scheduler, token=token)
    ends = {
        each: (record_of(scheduler, each).branches[0].finish_reason, record_of(scheduler, each).branches[0].stop_reason) for each in "abcd"
    }
    assert ends == {"a": ("stop", None), "b": ("stop", 53), "c": (None, None), "d": ("stop", 50)}
    assert record_of(scheduler, "d").branches[0].output_token_ids.tolist() == [50, 53, 50]


def test_min_tokens_beyond_max_tokens_lets_only_the_length_end_it() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 2, eos_token_ids=(50,), min_tokens=2**31 - 1)
    run(scheduler, token=50)
    (branch,) = record_of(scheduler, "a").branches
    assert (branch.finish_reason, len(branch.output_token_ids)) == ("length", 2)


def test_stop_id_as_the_last_possible_token_is_a_stop() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 2, eos_token_ids=(50,))
    step(scheduler, token=1)
    step(scheduler, token=50)
    (branch,) = record_of(scheduler, "a").branches
    assert (branch.finish_reason, len(branch.output_token_ids)) == ("stop", 2)


class Moody(LeastRecentlyUsed):
    """An eviction policy that fails when it is told to."""

    fails = False

    def pop(self, count: int) -> Int32Array:
        if self.fails:
            raise RuntimeError("not today")
        return super().pop(count)


def test_plan_in_which_the_eviction_policy_fails_breaks_the_manager_and_says_so() -> None:
    policies: list[Moody] = []

    def policy(num_blocks: int) -> Moody:
        policies.append(Moody(num_blocks))
        return policies[0]

    manager = KVCacheManager(num_blocks=7, block_size=4, max_num_seqs=2, policy=policy)
    scheduler = Scheduler(manager)
    submit(scheduler, "old", 16, 1)
    run(scheduler)
    submit(scheduler, "a", [90, 91, 92, 93, 94], 17)
    for token in range(4):
        plan = step(scheduler, token=token)
    policies[0].fails = True  # the next step opens a block, and all but those of "a" are cached
    with pytest.raises(RuntimeError, match="not today"):
        scheduler.plan()
    policies[0].fails = False  # nobody knows what it has done before it failed
    assert scheduler.is_broken
    for refused in (
        manager.check,
        scheduler.check,
        scheduler.plan,
        lambda: scheduler.undo(plan),
        lambda: submit(scheduler, "b", 4),
        lambda: scheduler.abort("a"),
    ):
        with pytest.raises(InvariantError, match="the manager was stopped in the middle of a command"):
            refused()


def test_plan_in_which_every_row_decodes_has_all_boundaries() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    for request_id in "abc":
        submit(scheduler, request_id, 2)
    step(scheduler)
    assert plan_of(scheduler).cu_seqlens_q.tolist() == [0, 1, 2, 3]


def test_plan_is_outstanding_until_it_is_completed_or_undone() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 6)
    assert scheduler.outstanding is None
    for end in (scheduler.undo, lambda plan: complete(scheduler, plan, token=1)):
        plan = plan_of(scheduler)
        assert scheduler.outstanding is plan
        end(plan)
        assert scheduler.outstanding is None
    assert not scheduler.is_broken


def test_steady_step_with_a_token_that_is_refused_stays_outstanding() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 6)
    for token in range(3):
        step(scheduler, token=token)
    plan = plan_of(scheduler)
    before = scheduler.manager.snapshot()
    with pytest.raises(InvalidRequestError, match="token id -2"):
        scheduler.complete(plan, np.array([-2]))
    assert scheduler.manager.snapshot() == before
    complete(scheduler, plan, token=3)
    run(scheduler, token=4)
    (branch,) = record_of(scheduler, "a").branches
    assert branch.output_token_ids.tolist() == [0, 1, 2, 3, 4, 4]


def test_abort_of_a_request_that_ended_with_the_step_is_no_abort() -> None:
    scheduler = make_scheduler()
    submit(scheduler, "a", 3, 2)
    step(scheduler, token=1)
    plan = plan_of(scheduler)
    assert scheduler.abort("a")
    complete(scheduler, plan, token=2)
    (branch,) = record_of(scheduler, "a").branches
    assert branch.finish_reason == "length"
