"""Requests, their records and states, and the scheduler's settings."""

from __future__ import annotations

import numpy as np
import pytest
from scheduling_helpers import make_request

from pagedkv.core import SequenceTable, Window
from pagedkv.errors import ConfigError, InvalidRequestError, InvariantError
from pagedkv.scheduling import (
    Branch,
    Event,
    EventKind,
    FirstComeFirstServed,
    Request,
    RequestRecord,
    SchedulerConfig,
    SchedulingPolicy,
    Status,
    WaitReason,
)
from pagedkv.scheduling.needs import BlockNeeds
from pagedkv.scheduling.running import RunningSet


def test_request_copies_and_freezes_its_prompt() -> None:
    tokens = np.array([1, 2, 3], dtype=np.int32)
    request = Request("r", tokens, 4)
    tokens[0] = 99
    assert request.prompt_token_ids.tolist() == [1, 2, 3]
    assert request.prompt_token_ids.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        request.prompt_token_ids[0] = 5


@pytest.mark.parametrize("prompt", [[], [-1], [2**31], [2**70], [1.5], [[1, 2]], ["a"], [True]])
def test_request_prompt_that_cannot_be_is_refused(prompt: list[object]) -> None:
    with pytest.raises(InvalidRequestError, match="request 'r'"):
        Request("r", np.array(prompt), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": float("nan")}, "max_tokens is nan"),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 2**40}, "min_tokens is 1099511627776"),
        ({"n": 0}, "n is 0"),
        ({"n": float("inf")}, "n is inf"),
        ({"eos_token_ids": (-1,)}, "stop id is -1"),
        ({"stop_token_ids": (3, 2**31)}, "stop id is 2147483648"),
        ({"priority": float("nan")}, "priority is nan"),
    ],
)
def test_request_number_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make_request("r", 3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_preemptions", "num_ended_kept"])
@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), float("inf")])
def test_config_number_that_cannot_be_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is {value}: it must be"):
        SchedulerConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("watermark", [-0.1, 1.0, float("nan"), float("inf")])
def test_config_watermark_that_cannot_be_is_refused(watermark: float) -> None:
    with pytest.raises(ConfigError, match=f"^watermark is {watermark}: it must be from 0 to below 1$"):
        SchedulerConfig(watermark=watermark)


def test_config_smallest_values_are_allowed() -> None:
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1, watermark=0, max_preemptions=0, num_ended_kept=0)
    assert config.max_running == 1
    assert SchedulerConfig(max_num_seqs=9, max_num_batched_tokens=4).max_running == 4


def make_record() -> RequestRecord:
    record = RequestRecord(make_request("r", 3), arrival=0, arrival_time=0.0)
    record.branches.append(Branch(record, 0, record.request.prompt_token_ids))
    return record


ALLOWED = {
    (Status.WAITING, Status.DEFERRED),
    (Status.WAITING, Status.RUNNING),
    (Status.WAITING, Status.FINISHED),
    (Status.DEFERRED, Status.WAITING),
    (Status.DEFERRED, Status.FINISHED),
    (Status.RUNNING, Status.WAITING),
    (Status.RUNNING, Status.FINISHED),
}


@pytest.mark.parametrize("old", Status)
@pytest.mark.parametrize("new", Status)
def test_branch_moves_only_along_the_table(old: Status, new: Status) -> None:
    (branch,) = make_record().branches
    branch.status = old
    if (old, new) in ALLOWED:
        branch.move(new)
        assert branch.status is new
    else:
        with pytest.raises(InvariantError, match=f"cannot go from {old} to {new}"):
            branch.move(new)
        assert branch.status is old


def test_branch_output_is_what_stands_behind_the_prompt() -> None:
    (branch,) = make_record().branches
    assert branch.output_token_ids.tolist() == []
    branch.token_ids = np.append(branch.token_ids, [8, 9]).astype(np.int32)
    assert branch.output_token_ids.tolist() == [8, 9]
    assert branch.width == 1


def test_record_keeps_the_first_and_the_last_of_very_many_events() -> None:
    record = make_record()
    for number in range(1000):
        record.note(EventKind.UNDONE, number)
    assert [event.step for event in record.events] == [*range(128), *range(872, 1000)]


def test_record_does_not_repeat_a_wait_for_the_same_reason() -> None:
    record = make_record()
    for reason in (WaitReason.BLOCKS, WaitReason.BLOCKS, WaitReason.SEQUENCES, WaitReason.BLOCKS):
        record.note(EventKind.WAITING, 1, reason=reason)
    record.note(EventKind.UNDONE, 2)
    record.note(EventKind.WAITING, 3, reason=WaitReason.BLOCKS)
    reasons = [event.detail.get("reason") for event in record.events]
    assert reasons == [WaitReason.BLOCKS, WaitReason.SEQUENCES, WaitReason.BLOCKS, None, WaitReason.BLOCKS]


def test_record_does_not_repeat_a_wait_when_many_events_are_kept() -> None:
    record = make_record()
    for number in range(128):
        record.note(EventKind.UNDONE, number)
    for _ in range(5):
        record.note(EventKind.WAITING, 200, reason=WaitReason.BLOCKS)
    assert len(record.events) == 129


def test_event_prints_its_step_and_figures() -> None:
    assert str(Event(EventKind.UNDONE, 3)) == "step 3: undone"
    record = make_record()
    record.note(EventKind.FORKED, 5, n=2, why="so")
    assert str(record.events[0]) == "step 5: forked (n=2, why=so)"
    with pytest.raises(TypeError):
        record.events[0].detail["n"] = 3  # type: ignore[index]


def test_record_is_finished_when_every_branch_is() -> None:
    record = make_record()
    record.branches.append(Branch(record, 1, record.request.prompt_token_ids))
    record.branches[0].move(Status.FINISHED)
    assert not record.finished
    record.branches[1].move(Status.FINISHED)
    assert record.finished
    record.branches[1].num_preemptions = 2
    assert record.num_preemptions == 2


def test_policy_default_is_a_policy() -> None:
    policy: SchedulingPolicy = FirstComeFirstServed()
    assert policy.lookahead == 1


def test_running_set_row_without_a_branch_is_refused() -> None:
    table = SequenceTable(2, num_groups=1, block_size=4, max_blocks=4)
    with pytest.raises(LookupError, match="row 1 has no running branch"):
        RunningSet(table).branch(1)


def test_running_set_holds_the_types_it_promises() -> None:
    running = RunningSet(SequenceTable(2, num_groups=1, block_size=4, max_blocks=4))
    for numbers in (running.ones, running.numbers, running.hold, running.limits, running.minimums):
        assert numbers.dtype == np.int32
    for numbers in (running.long_numbers, running.rows, running.seqs):
        assert numbers.dtype == np.int64
    assert running.prompt_logits.dtype == np.bool_


def test_running_set_worst_case_counts_a_copy_for_each_last_block_that_may_be_shared() -> None:
    table = SequenceTable(3, num_groups=1, block_size=4, max_blocks=8)
    running, needs = RunningSet(table), BlockNeeds(table, [None])
    rows, _ = table.open_rows(2)
    for row in rows.tolist():
        (branch,) = make_record().branches  # 3 tokens known and 4 to come, the last of which needs no slot: 2 blocks
        branch.row = row
        running.add(branch)
    table.num_blocks[rows] = 1
    assert running.worst_case_blocks(needs).tolist() == [2]
    table.mark_tails_shared(rows[:1])
    assert running.worst_case_blocks(needs).tolist() == [3]


def test_running_set_worst_case_counts_what_is_shared_inside_a_window_once() -> None:
    table = SequenceTable(3, num_groups=2, block_size=4, max_blocks=8)
    running, needs = RunningSet(table), BlockNeeds(table, [None, Window.sliding(4)])
    rows, _ = table.open_rows(2)
    for row in rows.tolist():
        (branch,) = make_record().branches
        branch.row = row
        running.add(branch)
    table.num_blocks[rows] = 1
    table.block_tables[:, rows, 0] = 1
    # Each needs its second block. Of the shared one each needs a successor of its own as well, where it goes behind the window.
    assert running.worst_case_blocks(needs).tolist() == [2, 2 * 2 - 1]
    table.block_tables[1, rows[1], 0] = 2
    assert running.worst_case_blocks(needs).tolist() == [2, 2 * 2 - 2]


def test_block_needs_of_a_window_end_at_what_it_reads_unless_a_prompt_is_computed_in_one_step() -> None:
    table = SequenceTable(1, num_groups=2, block_size=4, max_blocks=8)
    windows = [None, Window.sliding(4)]
    assert BlockNeeds(table, windows).of_tokens(17).tolist() == [5, 2]
    assert BlockNeeds(table, windows, in_chunks=False).of_tokens(17).tolist() == [5, 5]


def test_block_needs_count_as_held_what_no_window_has_given_back() -> None:
    table = SequenceTable(2, num_groups=2, block_size=4, max_blocks=8)
    rows, _ = table.open_rows(2)
    table.num_computed[rows], table.num_blocks[rows] = [14, 2], [4, 1]
    held = BlockNeeds(table, [None, Window.sliding(4)]).held(rows)
    assert (held.tolist(), held.dtype) == ([[4, 1], [2, 1]], np.int64)
