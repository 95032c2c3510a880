"""What neither a request nor a scheduler takes. Afterwards the same scheduler gives a healthy request the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from malformed_support import Case, named, table

from pagedkv.core import KVCacheManager
from pagedkv.errors import ConfigError, InvalidRequestError, InvariantError, RequestTooLargeError
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig


def request(**options: Any) -> Request:
    return Request(**{"request_id": "r", "prompt_token_ids": [1, 2, 3], "max_tokens": 4, **options})


VALUES = table(
    *(
        (f"scheduler {name} is {value!r}", ConfigError, name, lambda _, n=name, v=value: SchedulerConfig(**{n: v}))
        for name, values in {"max_preemptions": (-1, 1.5, None), "num_ended_kept": (-1, "a"), "max_num_seqs": (False,)}.items()
        for value in values
    ),
    *(
        (f"request {name} is {value!r}", InvalidRequestError, words, lambda _, n=name, v=value: request(**{n: v}))
        for name, words, values in (
            ("request_id", "request id", (5, None, b"r", ["r"])),
            ("prompt_token_ids", "the prompt", ([], [1.5], [True], [True, 2], None, "abc", [[1]], [[1], [1, 2]])),
            ("prompt_token_ids", "token ids must be from 0", ([-1], [2**31])),
            ("max_tokens", "max_tokens", (0, -1, 1.5, "4", None, True, 2**31)),
            ("min_tokens", "min_tokens", (-1, 0.5, None)),
            ("eos_token_ids", "eos_token_ids", ([2], 2, None, "2")),
            ("stop_token_ids", "stop_token_ids", ([2], 2)),
            ("stop_token_ids", "stop id", ((-1,), (1.5,), (True,), ("a",))),
            ("n", "n is", (0, 1.5, "a", True)),
            ("priority", "priority", (1.5, "high", None, True, 2**63, -(2**63) - 1)),
            ("namespace", "namespace", (5, None, b"a")),
            ("wants_prompt_logits", "wants_prompt_logits", (1, None)),
        )
        for value in values
    ),
)


@named(VALUES)
def test_value_that_cannot_be_is_refused_by_name(case: Case) -> None:
    case.hold(None)


def manager() -> KVCacheManager:
    return KVCacheManager(num_blocks=9, block_size=2, max_num_seqs=3)


class Clumsy:
    """Ranks, and cannot choose."""

    lookahead = 1

    def rank(self, candidate: object) -> tuple[int, ...]:
        return (0,)


SCHEDULER = table(
    ("manager None", ConfigError, "manager is None", lambda _: Scheduler(None)),  # type: ignore[arg-type]
    ("manager text", ConfigError, "manager is 'm'", lambda _: Scheduler("m")),  # type: ignore[arg-type]
    ("config dict", ConfigError, "config is {}", lambda _: Scheduler(manager(), {})),  # type: ignore[arg-type]
    ("policy text", ConfigError, "policy is 'fcfs': it has no rank()", lambda _: Scheduler(manager(), policy="fcfs")),  # type: ignore[arg-type]
    ("policy that cannot choose", ConfigError, "it has no choose()", lambda _: Scheduler(manager(), policy=Clumsy())),  # type: ignore[arg-type]
    ("clock 5", ConfigError, "clock is 5", lambda _: Scheduler(manager(), clock=5)),  # type: ignore[arg-type]
    ("submit None", InvalidRequestError, "request is None", lambda s: s.submit(None)),
    ("submit a dict", InvalidRequestError, "request is {'prompt': 'a'}", lambda s: s.submit({"prompt": "a"})),
    ("submit tokens", InvalidRequestError, "request is [1, 2]", lambda s: s.submit([1, 2])),
    ("submit what is too long", RequestTooLargeError, "max_tokens", lambda s: s.submit(request(max_tokens=400))),
    ("submit what is too wide", RequestTooLargeError, "lower n", lambda s: s.submit(request(n=4))),
    ("check_fits of a text", InvalidRequestError, "request is 'a'", lambda s: s.check_fits("a")),
    *((f"abort {v!r}", InvalidRequestError, "request id", lambda s, v=v: s.abort(v)) for v in (5, None, [], b"a")),
    *((f"preempt {v!r}", InvalidRequestError, "request id", lambda s, v=v: s.preempt(v)) for v in (5, None, {})),
    *((f"record {v!r}", InvalidRequestError, "request id", lambda s, v=v: s.record(v)) for v in (5, None, [])),
    ("finish a number", InvalidRequestError, "request id is 5", lambda s: s.finish(5, 0, "stop")),
    ("finish index text", InvalidRequestError, "index is 'a'", lambda s: s.finish("x", "a", "stop")),
    ("finish index float", InvalidRequestError, "index is 0.0", lambda s: s.finish("x", 0.0, "stop")),
    ("finish for no reason", InvalidRequestError, "reason is None", lambda s: s.finish("x", 0, None)),
    (
        "finish for any reason",
        InvalidRequestError,
        "be one of stop, length, abort, error",
        lambda s: s.finish("x", 0, "bored"),
    ),
    ("complete None", InvalidRequestError, "not the outstanding one", lambda s: s.complete(None, [])),
    ("undo None", InvalidRequestError, "not the outstanding one", lambda s: s.undo(None)),
    ("undo a text", InvalidRequestError, "not the outstanding one", lambda s: s.undo("plan")),
)

PLANNED = table(
    *(
        (f"complete with {name}", InvalidRequestError, "token_ids", lambda s, v=value: s.complete(s.outstanding, v))
        for name, value in (
            ("a float", [1.5]),
            ("a float array", np.array([1.0])),
            ("True", [True]),
            ("a bool array", np.array([True])),
            ("None", None),
            ("a text", "a"),
            ("none", []),
            ("two", [1, 2]),
            ("beyond int32", [2**31]),
            ("beyond int64", [2**70]),
            ("lists", [[1]]),
            ("a number", 1),
        )
    ),
    ("complete with a token below -1", InvalidRequestError, "token id -2", lambda s: s.complete(s.outstanding, [-2])),
    ("complete another plan", InvalidRequestError, "not the outstanding one", lambda s: s.complete(object(), [1])),
    ("plan again", InvariantError, "complete or undo it first", lambda s: s.plan()),
)


class Planned(Scheduler):
    """A scheduler that remembers its last plan."""

    outstanding: Any = None


def finish_all(scheduler: Scheduler) -> list[int]:
    """A healthy request's tokens, made up from the positions that the plans name."""
    scheduler.submit(Request("healthy", np.array([1, 2, 3]), max_tokens=3))
    while (plan := scheduler.plan()) is not None:
        scheduler.complete(plan, plan.seq_lens[plan.sampling_seqs] % 7)
    (branch,) = scheduler.take_ended()
    scheduler.take_assignments()
    return list(branch.output_token_ids.tolist())


@pytest.fixture(scope="module")
def scheduler() -> Planned:
    return Planned(manager())


@named(SCHEDULER)
def test_scheduler_with_malformed_input_changes_nothing(case: Case, scheduler: Planned) -> None:
    want, before = finish_all(scheduler), scheduler.manager.snapshot()
    case.hold(scheduler)
    assert scheduler.manager.snapshot() == before
    assert not scheduler.has_unfinished
    assert finish_all(scheduler) == want


@named(PLANNED)
def test_scheduler_with_a_malformed_answer_keeps_its_plan(case: Case, scheduler: Planned) -> None:
    want = finish_all(scheduler)
    scheduler.submit(Request("other", np.array([4, 5]), max_tokens=2))
    scheduler.outstanding = scheduler.plan()
    before = scheduler.manager.snapshot()
    case.hold(scheduler)
    assert scheduler.manager.snapshot() == before
    scheduler.complete(scheduler.outstanding, [6])
    assert scheduler.abort("other")
    assert scheduler.take_ended()[0].token_ids.tolist() == [4, 5, 6]
    scheduler.manager.check()
    assert finish_all(scheduler) == want
