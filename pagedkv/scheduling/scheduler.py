"""Which branch computes which tokens in the next step, and what becomes of it after.

Owns queues, status, budgets and the liveness promise: what can never fit is refused when it is submitted; the oldest running request is
never preempted; every preemption frees a block, or leaves one less needed; preemptions of one request are bounded; waiting requests hold no
blocks. Does not own blocks (``KVCacheManager``) and does not choose tokens.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np

from pagedkv.checks import integer, shown, text
from pagedkv.core import CheckLevel, KVCacheManager
from pagedkv.core.arguments import as_counts
from pagedkv.core.transaction import Transaction
from pagedkv.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    InvariantError,
    OutOfBlocksError,
    PagedKVError,
    RequestTooLargeError,
)
from pagedkv.plan import Int32Array, Int64Array, StepPlan
from pagedkv.scheduling.admission import Admission
from pagedkv.scheduling.auditing import Books
from pagedkv.scheduling.config import SchedulerConfig
from pagedkv.scheduling.events import EventKind, WaitReason
from pagedkv.scheduling.planning import PlanBuilder, plan_of_decodes
from pagedkv.scheduling.policies import FirstComeFirstServed, SchedulingPolicy, check_policy
from pagedkv.scheduling.preemption import choose_victims
from pagedkv.scheduling.request import Branch, FinishReason, Request, RequestRecord, Status
from pagedkv.scheduling.running import RunningSet
from pagedkv.scheduling.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Assignment:
    """A branch got a row of the manager's table: per-row state of others (sampling, say) belongs to it from now on.

    ``source_row`` is the row whose computed tokens it goes on from, after a fork; None where it starts with nothing computed, or a cached
    prefix. Who keeps state of those tokens copies it from there, in the order of the assignments.
    """

    row: int
    request_id: str
    index: int
    source_row: int | None = None


class Scheduler:
    """Continuous batching over a ``KVCacheManager``: prefill chunks and decodes of many requests in one step under one token budget.

    Call ``plan``, run the forward pass, call ``complete`` with the sampled tokens; or ``undo`` when the pass failed. One plan is
    outstanding at a time. At the manager's check level, the books are verified when a step has been completed or undone: by counts at
    ``"step"``, branch by branch at ``"audit"``.

    Args:
        manager: not used by anybody else.
        config: limits.
        policy: order of admission and preemption; first come, first served when not given.
        clock: seconds, only for the times in the records; decides nothing.

    Raises:
        ConfigError: a part that is not what it should be; names it.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        config: SchedulerConfig | None = None,
        *,
        policy: SchedulingPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = SchedulerConfig() if config is None else config
        self.manager = manager
        self._policy: SchedulingPolicy = FirstComeFirstServed() if policy is None else policy
        _check_parts(manager, self.config, clock)
        check_policy(self._policy)
        if self.config.has_state and manager.prefix_caching:
            raise ConfigError("recurrent_state: what a prefix leaves behind is not in its blocks, so the manager must not cache prefixes")
        self._clock = clock
        # A token that the manager refuses is the one refusal found out inside: it checks before it changes anything.
        self._change = Transaction("the scheduler", refusals=(InvalidRequestError,))
        self._manager_change = manager.table.change
        self._running = RunningSet(manager.table)
        self._waiting = WaitingQueue(self._policy, self._change)
        self._admission = Admission(manager, self.config, self._running, self._waiting)
        self._records: dict[str, RequestRecord] = {}
        self._books = books = Books(manager, self._running, self._waiting, self._records)
        verifiers: dict[CheckLevel, Callable[[], None]] = {"step": books.check_counts, "audit": books.check}
        self._verify = verifiers.get(manager.check_level)
        self._ended: OrderedDict[str, RequestRecord] = OrderedDict()
        self._assignments: list[Assignment] = []
        self._newly_ended: list[Branch] = []
        self._outstanding: StepPlan | None = None
        self._doomed: dict[str, None] = {}
        self._arrivals = 0
        self._step = 0
        self._num_preemptions = 0

    # Questions.

    @property
    def num_running(self) -> int:
        """Branches that hold a sequence."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Branches that wait."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """Preemptions since the start."""
        return self._num_preemptions

    @property
    def num_steps(self) -> int:
        """Steps planned since the start."""
        return self._step

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._records)

    @property
    def outstanding(self) -> StepPlan | None:
        """The plan that has been neither completed nor undone yet."""
        return self._outstanding

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """What ``take_assignments`` would return."""
        return tuple(self._assignments)

    @property
    def is_broken(self) -> bool:
        """Whether a command was stopped in the middle, here or in the manager, so that all are refused from now on."""
        return self._change.depth > 0 or self._manager_change.depth > 0

    def record(self, request_id: str) -> RequestRecord | None:
        """The books on a request, alive or among the last ended; to read, never to write."""
        request_id = _as_id(request_id)
        return self._records.get(request_id) or self._ended.get(request_id)

    def check(self) -> None:
        """Verify every invariant of queues and records, between two steps; ``Books.check`` lists them. The manager has a check of its own.

        Raises:
            InvariantError: naming the first that is broken; or a plan is outstanding, or a command was stopped in the middle.

        Cost: O(branches).
        """
        self._check_whole()
        if self._outstanding is not None:
            raise InvariantError("a plan is outstanding: complete or undo it first")
        self._books.check()

    def check_fits(self, request: Request) -> None:
        """Raise what ``submit`` would raise, but for a duplicate id.

        Raises:
            RequestTooLargeError: prompt and ``max_tokens`` can never fit, or ``n`` is over the running limit.
        """
        if not isinstance(request, Request):
            raise InvalidRequestError(f"request is {shown(request)}: it must be a Request")
        name, manager = f"request {request.request_id!r}", self.manager
        if request.n > min(self.config.max_running, manager.max_num_seqs):
            limit = min(self.config.max_running, manager.max_num_seqs)
            change = "lower n, or raise max_num_seqs and max_num_batched_tokens"
            raise RequestTooLargeError(name, needed=request.n, limit=limit, unit="sequences at once (n)", change=change)
        prompt = len(request.prompt_token_ids)
        total = prompt + request.max_tokens
        if total > manager.max_seq_len:
            change = "shorten the prompt, lower max_tokens, or raise max_model_len or num_blocks"
            raise RequestTooLargeError(name, needed=total, limit=manager.max_seq_len, unit="tokens", change=change)
        worst = zip(self._admission.worst_case(request, request.n).tolist(), manager.usable_blocks, strict=True)
        needed, limit = max(worst, key=lambda each: each[0] - each[1])  # in the layer group that lacks most
        if needed > limit:
            change = "shorten the prompt, lower max_tokens or n, or raise num_blocks"
            raise RequestTooLargeError(name, needed=needed, limit=limit, unit="blocks", change=change)

    # Commands.

    def submit(self, request: Request) -> RequestRecord:
        """Queue a request.

        Returns:
            the books on it; to read, never to write.

        Raises:
            DuplicateRequestError: a request of this id has not ended.
            RequestTooLargeError: it can never fit; others are not disturbed.
        """
        self._check_whole()
        self.check_fits(request)
        if request.request_id in self._records:
            raise DuplicateRequestError(f"request id {request.request_id!r} is in use: choose another, or wait for its end")
        record = RequestRecord(request, arrival=self._arrivals, arrival_time=self._clock())
        trunk = Branch(record, 0, request.prompt_token_ids, is_trunk=request.n > 1)
        record.branches.append(trunk)
        record.note(EventKind.SUBMITTED, self._step, num_prompt_tokens=len(request.prompt_token_ids), max_tokens=request.max_tokens)
        with self._change:
            self._arrivals += 1
            self._records[request.request_id] = record
            self._waiting.push(trunk)
            return record

    def plan(self) -> StepPlan | None:
        """Decide the next step and reserve its slots; None when nothing is left to do.

        Raises:
            InvariantError: the last plan was neither completed nor undone; or nothing could be scheduled although work is left.

        Cost: a fixed number of array operations for all decoding branches; Python only for prefills, admissions and preemptions.
        """
        if self._change.depth or self._manager_change.depth:
            self._check_whole()
        if self._outstanding is not None:
            raise InvariantError("the last plan is outstanding: complete or undo it first")
        if not self._records:
            return None
        step = self._step
        try:
            plan = self._plan_as_before() or self._plan_anew()
            if plan is not None:
                self._step += 1
                self._outstanding = plan
            return plan
        except InvariantError:
            raise  # a bug: what shows it is left as it was found
        except BaseException:
            self._take_back(step)  # whatever went wrong, no slots stay reserved for a step that will not come
            raise

    def complete(self, plan: StepPlan, token_ids: Int32Array) -> None:
        """Book a step that has run: what it computed is published, what it sampled is appended, who is done ends.

        Args:
            plan: the outstanding one.
            token_ids: ``[Q]`` int32 new tokens in the order of ``plan.sampling_seqs``; -1 where none could be sampled: what the
                step computed of that branch is taken back, so that nobody ever finds it; it is computed again unless ``finish`` ends it.

        Raises:
            InvalidRequestError: another plan, another number of tokens, or a token below -1; the plan stays outstanding.
        """
        self._check_outstanding(plan)
        sampled = as_counts(token_ids, len(plan.sampling_seqs), "token_ids").copy()  # the next plan shows it
        sampled.setflags(write=False)
        steady, change = self._running.steady, self._change
        if steady is not None and steady.all_go_on(sampled):
            change.depth += 1  # by hand: ``with`` would take a tenth of the scheduler's part of such a step
            try:
                self.manager.complete(plan.seqs, sampled)
            except InvalidRequestError:  # a token that it refuses, before it changes anything
                change.depth -= 1
                raise
            self._outstanding = None
            steady.go_on(sampled)
            change.depth -= 1
        else:
            with change:
                lost = self._complete_tables(plan, sampled)
                self._outstanding = None
                rows = plan.rows if len(sampled) == plan.num_seqs else plan.rows[plan.sampling_seqs]
                if steady is None:
                    self._after_prefills(rows)
                self._end_branches(rows, sampled)
                self._running.note_tokens(rows, sampled)
                if lost:
                    self._preempt(lost)
        if self._doomed:
            with change:
                self._end_doomed()
        if self._verify is not None:
            self._verify()

    def undo(self, plan: StepPlan) -> None:
        """Take back a plan whose step failed: requests, tables and blocks are as before it, and the next ``plan`` tries again."""
        self._check_outstanding(plan)
        with self._change:
            lost = self._cancel(plan.seqs)
            self._outstanding = None
            for row in plan.rows.tolist():
                self._running.branch(row).record.note(EventKind.UNDONE, plan.step)
            if lost:
                self._preempt(lost)
            if self._doomed:
                self._end_doomed()
        if self._verify is not None:
            self._verify()

    def abort(self, request_id: str) -> bool:
        """End a request now, keeping what it has; during a step, right after it.

        Returns:
            False when no such request is alive (a no-op).
        """
        self._check_whole()
        record = self._records.get(_as_id(request_id))
        if record is None:
            return False
        if self._outstanding is not None:
            self._doomed[request_id] = None
            return True
        with self._change:
            self._abort(record)
        return True

    def preempt(self, request_id: str) -> bool:
        """Take a running request's sequences away now: it waits again and computes what is not cached any more, to the same tokens.

        For callers who need its blocks, and for tests; ``plan`` preempts by itself when blocks run out.

        Returns:
            False when no such request is running (a no-op).

        Raises:
            InvariantError: a plan is outstanding.
        """
        self._check_whole()
        record = self._records.get(_as_id(request_id))
        running = [branch for branch in record.branches if branch.status is Status.RUNNING] if record else []
        if not running:
            return False
        if self._outstanding is not None:
            raise InvariantError("a request cannot be preempted while a plan is outstanding: complete or undo it first")
        with self._change:
            self._preempt(running)
        return True

    def finish(
        self, request_id: str, index: int, reason: FinishReason, *, stop_reason: str | None = None, error: PagedKVError | None = None
    ) -> bool:
        """End one branch from outside: a stop string was found, or something of its own failed.

        Returns:
            False when the branch has ended already (a no-op).
        """
        self._check_whole()
        record = self._records.get(_as_id(request_id))
        index = integer("index", index, least=-(2**63), error=InvalidRequestError)
        if reason not in get_args(FinishReason):
            raise InvalidRequestError(f"reason is {shown(reason)}: it must be one of {', '.join(get_args(FinishReason))}")
        branches = [branch for branch in record.branches if branch.index == index] if record else []
        if record is None or not branches or branches[0].status is Status.FINISHED:
            return False
        if self._outstanding is not None:
            raise InvariantError("a branch cannot be ended while a plan is outstanding: complete or undo it first")
        with self._change:
            if error is not None:
                record.error = error
            self._finish(branches[0], reason, stop_reason)
        return True

    def take_assignments(self) -> list[Assignment]:
        """Rows given to branches since the last call, in order."""
        with self._change:
            taken, self._assignments = self._assignments, []
            return taken

    def take_ended(self) -> list[Branch]:
        """Branches that ended since the last call, for whatever reason, in order."""
        with self._change:
            taken, self._newly_ended = self._newly_ended, []
            return taken

    # How it is done.

    def _plan_as_before(self) -> StepPlan | None:
        """The next decode of all that runs, where nothing has changed since the last; None where there is more to decide."""
        steady = self._running.steady
        if steady is None or len(self._waiting):
            return None
        decodes = (steady.seqs, steady.rows, steady.token_ids)
        try:
            extension = self.manager.extend(steady.seqs, 1)
        except OutOfBlocksError:
            return None
        return plan_of_decodes(self._step, self.manager, self._running, decodes, extension)

    def _plan_anew(self) -> StepPlan | None:
        builder = self._schedule()
        while not builder.num_tokens:
            if not self._records:
                return None
            if not len(self._running):
                raise InvariantError(f"nothing could be scheduled although {self.num_waiting} wait and nothing runs")
            self._make_room(needed=1)
            builder = self._schedule()
        return builder.build(self._step)

    def _schedule(self) -> PlanBuilder:
        builder = PlanBuilder(self.manager, self.config, self._running)
        preempted = self._schedule_decodes(builder)
        self._schedule_prefills(builder)
        self._admit(builder, preempted=preempted)
        return builder

    def _take_back(self, step: int) -> None:
        """Give back what a plan that came to nothing has reserved, unless it was stopped in the middle of a change."""
        table = self.manager.table
        if self._change.depth or self._manager_change.depth:
            return
        with self._change:
            rows = self._running.rows
            self._step, self._outstanding = step, None
            lost = self._cancel(table.handles_of(rows[table.num_reserved[rows] != table.num_computed[rows]]))
            if lost:
                self._preempt(lost)

    def _cancel(self, seqs: Int64Array) -> list[Branch]:
        """Take back what is reserved; returns who must start again: of whom more than that is gone, where recurrent state cannot follow."""
        if not self.config.has_state:
            self.manager.cancel(seqs)
            return []
        rows = self.manager.rows_of(seqs)
        before = self.manager.table.num_computed[rows]
        self.manager.cancel(seqs)
        return [self._running.branch(row) for row in rows[self.manager.table.num_computed[rows] < before].tolist()]

    def _complete_tables(self, plan: StepPlan, sampled: Int32Array) -> list[Branch]:
        """Book the step in the tables. Who should have got a token and got none may have computed K/V that are no good: take it back.

        Returns:
            of those, who must start again.
        """
        next_ids = sampled
        if len(sampled) < plan.num_seqs:
            next_ids = np.full(plan.num_seqs, -1, dtype=np.int32)
            next_ids[plan.sampling_seqs] = sampled
        lost = plan.sampling_seqs[sampled == -1]
        if not len(lost):
            self.manager.complete(plan.seqs, next_ids)
            return []
        good = np.ones(plan.num_seqs, dtype=np.bool_)
        good[lost] = False
        self.manager.complete(plan.seqs[good], next_ids[good])  # first, as it may refuse
        return self._cancel(plan.seqs[lost])

    def _after_prefills(self, sampled_rows: Int64Array) -> None:
        """What only a step with prompt tokens can bring: first tokens, prefixes that others wait for, trunks ready to fork."""
        first = self._running.at_first_token(sampled_rows)
        if len(first):
            self._note_first_tokens(first.tolist())
        for row in self._waiting.deferred_rows:
            self._waiting.wake(row, int(self.manager.table.num_computed[row]))
        if self._running.num_trunks:
            self._fork_ready()

    def _end_branches(self, rows: Int64Array, token_ids: Int32Array) -> None:
        ends, stopped = self._running.ended(rows, token_ids)
        for row, token, stop in zip(rows[ends].tolist(), token_ids[ends].tolist(), stopped.tolist(), strict=True):
            branch = self._running.branch(row)
            stop_reason = token if stop and token not in branch.request.eos_token_ids else None
            self._finish(branch, "stop" if stop else "length", stop_reason)

    def _decoding_rows(self) -> Int64Array:
        rows = self._running.rows
        if self._running.steady is not None:
            return rows
        decoding = self._running.remaining() == 1
        if self._running.num_trunks:
            decoding &= self._running.hold[rows] == 0
        return rows if decoding.all() else rows[decoding]

    def _schedule_decodes(self, builder: PlanBuilder) -> bool:
        preempted = False
        while True:
            decodes = self._decoding_rows()
            if not len(decodes):
                return preempted
            try:
                builder.add_decodes(decodes)
            except OutOfBlocksError as error:
                preempted = self._make_room(needed=error.needed)
            else:
                return preempted

    def _schedule_prefills(self, builder: PlanBuilder) -> None:
        if len(builder.decodes) == len(self._running):
            return
        decoding = set(builder.decodes.tolist())
        for row in self._running.rows.tolist():
            if row not in decoding:
                chunk = builder.fit_chunk(row)
                if chunk:
                    builder.add_prefill(row, chunk)

    def _make_room(self, *, needed: int) -> bool:
        """Preempt somebody; with nobody left to preempt, end the oldest and say False: what it held is free for others to be admitted."""
        victims = choose_victims(self.manager, self._running, self._policy)
        if victims:
            with self._change:
                self._preempt(victims)
        else:
            self._give_up_oldest(needed)
        return bool(victims)

    def _give_up_oldest(self, needed: int) -> None:
        """End the oldest running branch: it has all blocks that can be had, so only pinned prefixes can be in its way."""
        (branch,) = self._running.branches  # anybody else would have been preempted
        num_pins = self.manager.statistics().num_pins
        if not num_pins:
            raise InvariantError(
                f"request {branch.request.request_id!r} runs alone, nothing is pinned, and still nothing can be scheduled: "
                "the manager is used by somebody else, too, or this is a bug"
            )
        change = f"{num_pins} pinned prefixes are held: unpin some, or raise num_blocks"
        error = OutOfBlocksError(needed=needed, available=self.manager.num_available_blocks, change=change)
        with self._change:
            branch.record.error = error
            self._finish(branch, "error", None)

    def _preempt(self, victims: list[Branch]) -> None:
        freed = self.manager.num_exclusive_blocks([branch.seq for branch in victims])
        for branch in victims:
            known = int(self.manager.table.num_tokens[branch.row])
            branch.token_ids = self.manager.table.token_ids[branch.row, :known].copy()
            self._let_go(branch)
            branch.move(Status.WAITING)
            branch.num_preemptions += 1
            self._num_preemptions += 1
            branch.record.note(EventKind.PREEMPTED, self._step, index=branch.index, freed_blocks=freed)
            self._waiting.push(branch)

    def _admit(self, builder: PlanBuilder, *, preempted: bool) -> None:
        if not len(self._waiting):
            return
        self._admission.begin_step()
        while builder.budget > 0:
            branch = self._admission.next(self._step, preempted=preempted)
            if branch is None:
                return
            if not builder.takes(len(branch.token_ids) - branch.is_trunk):
                branch.record.note(EventKind.WAITING, self._step, reason=WaitReason.TOKENS, budget=builder.budget)
                return
            with self._change:
                self._start(branch)
                computed = branch.is_trunk and int(self._running.remaining()[-1]) == 0
                if computed:
                    self._fork(branch)
            if computed:
                for child in branch.record.branches:
                    if builder.fit_chunk(child.row):
                        builder.add_prefill(child.row, 1)
                continue
            chunk = builder.fit_chunk(branch.row)
            if chunk:
                builder.add_prefill(branch.row, chunk)

    def _start(self, branch: Branch) -> None:
        opened = self._admission.open(branch)
        self._waiting.take(branch)
        branch.move(Status.RUNNING)
        self._place(branch, int(opened.seqs[0]))
        self._admission.note_started(branch)
        self._book_admission(branch, int(opened.num_cached_tokens[0]))

    def _book_admission(self, branch: Branch, num_cached_tokens: int) -> None:
        record = branch.record
        if record.first_scheduled_time is None:
            record.first_scheduled_time = self._clock()
            record.num_cached_tokens = num_cached_tokens
        detail: dict[str, object] = {"index": branch.index, "num_cached_tokens": num_cached_tokens}
        if not num_cached_tokens:
            detail["miss"] = self._admission.miss_reason(branch)
        singly = len(branch.token_ids) - self.config.max_num_batched_tokens
        if self.config.recurrent_state == "whole" and singly > 0:
            detail["computed_one_by_one"] = singly
        record.note(EventKind.ADMITTED, self._step, **detail)

    def _place(self, branch: Branch, seq: int, *, source_row: int | None = None) -> None:
        branch.seq = seq
        branch.row = int(self.manager.rows_of([seq])[0])
        self._running.add(branch)
        self._assignments.append(Assignment(branch.row, branch.request.request_id, branch.index, source_row))

    def _fork_ready(self) -> None:
        for row, left in zip(self._running.rows.tolist(), self._running.remaining().tolist(), strict=True):
            branch = self._running.branch(row)
            if branch.is_trunk and left == 0:
                self._fork(branch)

    def _fork(self, trunk: Branch) -> None:
        """Turn a trunk, computed up to its last prompt token, into ``n`` branches that share its blocks."""
        self._running.drop([trunk.row])
        count = trunk.width - 1
        trunk.is_trunk = False
        source = trunk.row
        self._place(trunk, trunk.seq, source_row=source)
        for index, seq in enumerate(self.manager.fork(trunk.seq, count).tolist(), start=1):
            child = Branch(trunk.record, index, trunk.token_ids, status=Status.RUNNING)
            trunk.record.branches.append(child)
            self._place(child, seq, source_row=source)
        trunk.record.note(EventKind.FORKED, self._step, n=count + 1)

    def _finish(self, branch: Branch, reason: FinishReason, stop_reason: int | str | None) -> None:
        if branch.status is Status.FINISHED:
            return
        record = branch.record
        if branch.status is Status.RUNNING:
            known = int(self.manager.table.num_tokens[branch.row])
            branch.token_ids = self.manager.table.token_ids[branch.row, :known].copy()
            self._let_go(branch)
        else:
            self._waiting.remove(branch)
        branch.move(Status.FINISHED)
        branch.finish_reason, branch.stop_reason = reason, stop_reason
        self._newly_ended.append(branch)
        record.note(EventKind.FINISHED, self._step, index=branch.index, finish_reason=reason)
        if record.finished:
            record.finished_time = self._clock()
            del self._records[record.request.request_id]
            self._ended[record.request.request_id] = record
            self._ended.move_to_end(record.request.request_id)  # an id that was used before is among the last again
            while len(self._ended) > self.config.num_ended_kept:
                self._ended.popitem(last=False)

    def _let_go(self, branch: Branch) -> None:
        """Give back a running branch's sequence and wake who waited for it."""
        self._running.drop([branch.row])
        self.manager.release([branch.seq])
        self._waiting.wake(branch.row)
        branch.seq, branch.row = 0, -1

    def _note_first_tokens(self, rows: list[int]) -> None:
        now = self._clock()
        for row in rows:
            record = self._running.branch(row).record
            if record.first_token_time is None:
                record.first_token_time = now

    def _check_outstanding(self, plan: StepPlan) -> None:
        if self._change.depth or self._manager_change.depth:
            self._check_whole()
        if plan is None or plan is not self._outstanding:
            raise InvalidRequestError("this plan is not the outstanding one: each plan is completed or undone exactly once")

    def _end_doomed(self) -> None:
        """End what was aborted during the step."""
        doomed, self._doomed = self._doomed, {}
        for request_id in doomed:
            record = self._records.get(request_id)
            if record is not None:
                self._abort(record)

    def _abort(self, record: RequestRecord) -> None:
        for branch in list(record.branches):
            self._finish(branch, "abort", None)

    def _check_whole(self) -> None:
        """Raise ``InvariantError`` if the scheduler or its manager was stopped in the middle of a command."""
        self._change.check()
        self._manager_change.check()


def _as_id(request_id: object) -> str:
    return request_id if type(request_id) is str else text("request id", request_id, error=InvalidRequestError)


def _check_parts(manager: object, config: object, clock: object) -> None:
    for name, part, kind in (("manager", manager, KVCacheManager), ("config", config, SchedulerConfig)):
        if not isinstance(part, kind):
            raise ConfigError(f"{name} is {shown(part)}: it must be a {kind.__name__}")
    if not callable(clock):
        raise ConfigError(f"clock is {shown(clock)}: it must give seconds when it is called")
