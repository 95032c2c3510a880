"""Short forms that the scheduler's tests share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.core import CheckLevel, KVCacheManager
from pagedkv.plan import StepPlan
from pagedkv.scheduling import Branch, Event, EventKind, Request, RequestRecord, Scheduler, SchedulerConfig, SchedulingPolicy, WaitReason


def make_scheduler(
    num_blocks: int | list[int] = 33,
    *,
    block_size: int = 4,
    caching: bool = True,
    policy: SchedulingPolicy | None = None,
    max_seq_len: int | None = None,
    check: CheckLevel = "off",
    **config: object,
) -> Scheduler:
    """A scheduler over 32 usable blocks of 4 tokens, no watermark, unless told otherwise."""
    limits = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, "watermark": 0.0, **config})  # type: ignore[arg-type]
    manager = KVCacheManager(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=limits.max_num_seqs,
        max_seq_len=max_seq_len,
        enable_prefix_caching=caching,
        check=check,
    )
    return Scheduler(manager, limits, policy=policy, clock=lambda: 0.0)


def make_request(request_id: str, prompt: int | Sequence[int], max_tokens: int = 4, **options: object) -> Request:
    """A request; a number stands for a prompt of that length that shares no block with those of other ids."""
    first = 1000 * (1 + sum(map(ord, request_id)))
    tokens = range(first, first + prompt) if isinstance(prompt, int) else prompt
    return Request(request_id, np.array(tokens), max_tokens, **options)  # type: ignore[arg-type]


def submit(scheduler: Scheduler, request_id: str, prompt: int | Sequence[int], max_tokens: int = 4, **options: object) -> RequestRecord:
    """Submit such a request; returns its record."""
    scheduler.submit(make_request(request_id, prompt, max_tokens, **options))
    return record_of(scheduler, request_id)


def record_of(scheduler: Scheduler, request_id: str) -> RequestRecord:
    """The record of a request that must be known."""
    record = scheduler.record(request_id)
    assert record is not None
    return record


def plan_of(scheduler: Scheduler) -> StepPlan:
    """The next plan, which there must be."""
    plan = scheduler.plan()
    assert plan is not None
    scheduler.manager.check()
    return plan


def complete(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> None:
    """Complete a plan, with the same token for all that sample."""
    scheduler.complete(plan, np.full(len(plan.sampling_seqs), token, dtype=np.int32))
    scheduler.manager.check()


def step(scheduler: Scheduler, token: int = 7) -> StepPlan:
    """Plan and complete one step."""
    plan = plan_of(scheduler)
    complete(scheduler, plan, token)
    return plan


def run(scheduler: Scheduler, token: int = 7, *, limit: int = 10_000) -> list[StepPlan]:
    """Step until nothing is left; returns the plans."""
    plans = []
    while (plan := scheduler.plan()) is not None:
        scheduler.manager.check()
        complete(scheduler, plan, token)
        plans.append(plan)
        assert len(plans) < limit, "no end in sight"
    return plans


def running(scheduler: Scheduler, *request_ids: str) -> dict[str, list[int]]:
    """Rows of the running branches of requests."""
    records = [record_of(scheduler, request_id) for request_id in request_ids]
    return {record.request.request_id: [branch.row for branch in record.branches if branch.row >= 0] for record in records}


def only_branch(record: RequestRecord) -> Branch:
    """The branch of a request with one continuation."""
    (branch,) = record.branches
    return branch


def events(record: RequestRecord, kind: EventKind) -> list[Event]:
    """What happened of one kind."""
    return [event for event in record.events if event.kind is kind]


def wait_reasons(record: RequestRecord) -> list[WaitReason]:
    """Why it waited, in order."""
    return [WaitReason(str(event.detail["reason"])) for event in events(record, EventKind.WAITING)]
