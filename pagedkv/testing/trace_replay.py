"""Replaying a trace through the real scheduler and manager under a virtual clock: made-up tokens, no model, no torch.

Owns the clock and the checks behind each step. The same trace and settings give the same report, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from pagedkv.core import CheckLevel, EvictionPolicy, KVCacheManager
from pagedkv.errors import InvalidRequestError, InvariantError, RequestTooLargeError
from pagedkv.plan import StepPlan
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig, SchedulingPolicy
from pagedkv.testing.traces import Trace
from pagedkv.testing.violations import ViolationError


@dataclass(frozen=True, slots=True)
class StepCost:
    """How long a step lasts on the virtual clock: seconds for itself, and for each token that it computes."""

    step_s: float = 0.01
    token_s: float = 0.0001


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What came of a replay.

    Attributes:
        kind: of the trace.
        num_requests: in the trace.
        num_finished: that ran to their end.
        num_refused: that could never fit and were refused when they came.
        num_steps: steps.
        num_prompt_tokens: prompt tokens looked up in the cache; those of a request that was preempted count again when it comes back.
        num_hit_tokens: of these, found.
        num_output_tokens: tokens generated.
        num_computed_tokens: tokens computed, those computed again included.
        num_preemptions: times that a request was preempted.
        num_evicted_blocks: cached blocks given away.
        peak_running: most requests that ran in one step.
        peak_waiting: most that waited behind one step.
        peak_blocks: most blocks held at once.
        duration_s: virtual seconds from the first arrival to the last end.
        first_token_s: virtual seconds from a request's arrival to its first token, at the 50th, 90th and 99th percentile.
        block_hit_rate: share of the trace's hash ids whose block was found whole, from 0 to 1; 0 where there are none.
        num_checks: steps after which requests, sequences and hits were counted, and were right.
    """

    kind: str
    num_requests: int
    num_finished: int
    num_refused: int
    num_steps: int
    num_prompt_tokens: int
    num_hit_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_preemptions: int
    num_evicted_blocks: int
    peak_running: int
    peak_waiting: int
    peak_blocks: int
    duration_s: float
    first_token_s: tuple[float, ...]
    block_hit_rate: float
    num_checks: int

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the cache, from 0 to 1."""
        return self.num_hit_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    def __str__(self) -> str:
        rows = [(each.name.replace("_", " "), getattr(self, each.name)) for each in fields(self)]
        return "\n".join(f"{name:<20} {value:,}" if isinstance(value, int) else f"{name:<20} {value}" for name, value in rows)


def replay_trace(
    trace: Trace,
    *,
    num_blocks: int,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    policy: SchedulingPolicy | None = None,
    eviction: Callable[[int], EvictionPolicy] | None = None,
    cost: StepCost | None = None,
    check: CheckLevel = "off",
    on_step: Callable[[int, int], object] | None = None,
) -> TraceReport:
    """Serve a trace's requests as they came, each when the virtual clock reaches its arrival.

    Args:
        trace: what to serve; ``Trace.shrink`` makes it cheaper.
        num_blocks: blocks of the pool, the null block included.
        block_size: tokens in a block; choose one that divides ``trace.hash_block_size``.
        max_num_seqs: requests running at once.
        max_num_batched_tokens: tokens computed in a step.
        policy: order of admission; first come, first served when not given.
        eviction: makes the eviction policy for a pool of so many blocks; least recently used when not given.
        cost: what a step takes on the virtual clock.
        check: the manager's and the scheduler's check level, see ``CheckLevel``; unless it is ``"off"``, the replay counts requests,
            sequences and hits after every step as well.
        on_step: called after each step with the requests that have ended, of all of the trace's, and the steps so far.

    Raises:
        ViolationError: a law or an invariant is broken, a request was lost, or a block stays held at the end; the step is in its notes.
        ConfigError: a size that cannot work, or an unknown check level.

    Cost: about 100 microseconds a step and request; with ``"audit"``, O(blocks) more a command.
    """
    manager = KVCacheManager(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_seq_len=max(each.num_prompt_tokens + each.num_output_tokens for each in trace.requests),
        policy=eviction,
        check=check,
    )
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return _Replay(trace, manager, config, policy, cost or StepCost(), check).run(on_step)


def replay_one_by_one(
    trace: Trace, *, num_blocks: int | None = None, eviction: Callable[[int], EvictionPolicy] | None = None, check: CheckLevel = "off"
) -> TraceReport:
    """Serve one request after the other at the trace's own block size, as a cache simulation does: ``block_hit_rate`` is what it is for.

    Args:
        trace: with hash ids; ``trace.as_whole_blocks()`` counts every id as a whole block, at two tokens each.
        num_blocks: blocks that the cache can hold; endless when not given.
        eviction, check: as for ``replay_trace``.

    Raises:
        ViolationError: as for ``replay_trace``.
        InvalidRequestError: a trace without hash ids.
        ConfigError: an unknown check level.
    """
    if not trace.hash_block_size:
        raise InvalidRequestError(f"the {trace.kind} trace has no hash ids: there are no blocks to find")
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace.requests)
    # More than is cached: the null block, and the half-full block that a request's last tokens are in while it runs.
    endless = trace.num_distinct_ids + -(-longest // trace.hash_block_size)
    return replay_trace(
        trace,
        num_blocks=(endless if num_blocks is None else num_blocks) + 2,
        block_size=trace.hash_block_size,
        max_num_seqs=1,
        max_num_batched_tokens=longest,
        eviction=eviction,
        check=check,
    )


class _Replay:
    """One run: the clock, what has come of the requests so far, and the highest marks."""

    def __init__(
        self,
        trace: Trace,
        manager: KVCacheManager,
        config: SchedulerConfig,
        policy: SchedulingPolicy | None,
        cost: StepCost,
        check: CheckLevel,
    ) -> None:
        self._trace, self._manager, self._cost, self._check = trace, manager, cost, check
        self._scheduler = Scheduler(manager, config, policy=policy, clock=lambda: self._now)
        self._now = 0.0
        self._num_submitted = self._num_refused = self._num_finished = self._num_checks = 0
        self._num_output = self._num_computed = 0
        self._peaks = np.zeros(3, dtype=np.int64)  # running, waiting, blocks
        self._first_token_s: list[float] = []
        self._tokens = np.zeros(manager.max_num_seqs, dtype=np.int32)  # by row, what its request generates

    def run(self, on_step: Callable[[int, int], object] | None) -> TraceReport:
        scheduler = self._scheduler
        try:
            while scheduler.has_unfinished or self._num_submitted < len(self._trace.requests):
                self._submit_arrivals()
                plan = scheduler.plan()
                if plan is not None:
                    self._step(plan)
                    if on_step is not None:
                        on_step(self._num_finished + self._num_refused, scheduler.num_steps)
            self._check_end()
        except InvariantError as error:
            violation = ViolationError("audit", str(error))
            for note in (*getattr(error, "__notes__", ()), self._place()):
                violation.add_note(note)
            raise violation from error
        except ViolationError as violation:
            violation.add_note(self._place())
            raise
        return self._report()

    def _submit_arrivals(self) -> None:
        requests = self._trace.requests
        if not self._scheduler.has_unfinished:
            self._now = max(self._now, requests[self._num_submitted].arrival_s)
        while self._num_submitted < len(requests) and requests[self._num_submitted].arrival_s <= self._now:
            index = self._num_submitted
            self._num_submitted += 1
            request = Request(str(index), self._trace.prompt(index), max_tokens=requests[index].num_output_tokens)
            try:
                self._scheduler.submit(request)
            except RequestTooLargeError:
                self._num_refused += 1

    def _step(self, plan: StepPlan) -> None:
        scheduler, manager = self._scheduler, self._manager
        for assigned in scheduler.take_assignments():
            self._tokens[assigned.row] = self._trace.own_token(int(assigned.request_id))
        self._now += self._cost.step_s + self._cost.token_s * plan.num_tokens
        self._num_computed += plan.num_tokens
        self._num_output += len(plan.sampling_seqs)
        held = manager.num_usable_blocks - manager.num_available_blocks
        np.maximum(self._peaks, (scheduler.num_running, scheduler.num_waiting, held), out=self._peaks)
        scheduler.complete(plan, self._tokens[plan.rows[plan.sampling_seqs]])
        for branch in scheduler.take_ended():
            record = branch.record
            if record.first_token_time is None or branch.finish_reason != "length":
                raise ViolationError("liveness", f"request {record.request.request_id} ended for the reason {branch.finish_reason!r}")
            arrival = self._trace.requests[int(record.request.request_id)].arrival_s
            self._first_token_s.append(record.first_token_time - arrival)
            self._num_finished += 1
        if self._check != "off":
            self._check_step()

    def _check_step(self) -> None:
        manager, scheduler = self._manager, self._scheduler
        statistics = manager.statistics()
        alive = self._num_submitted - self._num_refused - self._num_finished
        if scheduler.num_running + scheduler.num_waiting != alive or statistics.num_seqs != scheduler.num_running:
            counts = f"{scheduler.num_running} run, {scheduler.num_waiting} wait, {statistics.num_seqs} sequences are open"
            raise ViolationError("accounting", f"{alive} requests are alive and {counts}")
        if statistics.num_hit_tokens > statistics.num_query_tokens:
            raise ViolationError("accounting", f"{statistics.num_hit_tokens} of {statistics.num_query_tokens} tokens were found")
        self._num_checks += 1

    def _check_end(self) -> None:
        held = self._manager.num_usable_blocks - self._manager.num_available_blocks
        if held or self._num_finished + self._num_refused != len(self._trace.requests):
            ended = f"{self._num_finished} of {len(self._trace.requests)} requests finished and {self._num_refused} were refused"
            raise ViolationError("liveness", f"{held} blocks stay held at the end; {ended}")

    def _place(self) -> str:
        return f"{self._trace.kind} trace, step {self._scheduler.num_steps}, {self._num_submitted} requests submitted"

    def _report(self) -> TraceReport:
        statistics = self._manager.statistics()
        (group,) = statistics.groups
        size, num_ids = self._trace.hash_block_size, sum(len(each.hash_ids) for each in self._trace.requests)
        running, waiting, blocks = self._peaks.tolist()
        first = np.quantile(self._first_token_s, (0.5, 0.9, 0.99)).tolist() if self._first_token_s else []
        return TraceReport(
            kind=self._trace.kind,
            num_requests=len(self._trace.requests),
            num_finished=self._num_finished,
            num_refused=self._num_refused,
            num_steps=self._scheduler.num_steps,
            num_prompt_tokens=statistics.num_query_tokens,
            num_hit_tokens=statistics.num_hit_tokens,
            num_output_tokens=self._num_output,
            num_computed_tokens=self._num_computed,
            num_preemptions=self._scheduler.num_preemptions,
            num_evicted_blocks=group.num_evicted,
            peak_running=running,
            peak_waiting=waiting,
            peak_blocks=blocks,
            duration_s=self._now,
            first_token_s=tuple(round(each, 6) for each in first),
            block_hit_rate=statistics.num_hit_tokens / size / num_ids if num_ids else 0.0,
            num_checks=self._num_checks,
        )
