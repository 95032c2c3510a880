"""Drives a ``Scheduler`` with a model whose next token is a fold of all tokens that it reads through the block tables.

A stale, foreign, permuted, missing or extra slot changes the text, so a request that ends with the text that its prompt alone explains was
never served anything else. Beside that the driver holds the scheduler to its promises: who waits holds no blocks, the oldest is not
preempted, every preemption frees a block, preemptions and steps are bounded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pagedkv.core import KVCacheManager, Window
from pagedkv.errors import OutOfBlocksError, RequestTooLargeError
from pagedkv.plan import StepPlan
from pagedkv.scheduling import (
    Assignment,
    Branch,
    EventKind,
    FirstComeFirstServed,
    LongestCachedPrefix,
    Priority,
    Request,
    RequestRecord,
    Scheduler,
    SchedulerConfig,
    SchedulingPolicy,
    Status,
)

Stamp = tuple[str, int, int]  # namespace, position, token


def next_token(tokens: Sequence[int], index: int, vocabulary: int) -> int:
    """The model: exact, and different for each continuation of a request."""
    state = index * 7 + 3
    for token in tokens:
        state = (state * 1_000_003 + token * 31 + 1) & 0xFFFFFFFF
    return (state >> 7) % vocabulary


def expected_text(request: Request, index: int, vocabulary: int) -> list[int]:
    """Prompt and output of one continuation, from the prompt alone."""
    tokens = request.prompt_token_ids.tolist()
    for count in range(1, request.max_tokens + 1):
        tokens.append(next_token(tokens, index, vocabulary))
        if count >= request.min_tokens and tokens[-1] in request.eos_token_ids + request.stop_token_ids:
            break
    return tokens


def first_seen(window: Window | None, position: int) -> int:
    """The first position that one sees."""
    if window is None:
        return 0
    return max(position - window.size + 1, 0) if window.kind == "sliding" else position - position % window.size


class HashModel:
    """Storage and forward pass in one: writes each token to its slot and reads whole histories back."""

    def __init__(self, block_size: int, windows: Sequence[Window | None], vocabulary: int) -> None:
        self.block_size = block_size
        self.vocabulary = vocabulary
        self.windows = windows
        self.slots: list[dict[int, Stamp]] = [{} for _ in windows]

    def copy_blocks(self, plan: StepPlan) -> None:
        size = self.block_size
        for slots, copies in zip(self.slots, plan.copies, strict=True):
            read = [(target, [slots.get(source * size + offset) for offset in range(size)]) for source, target in copies.tolist()]
            for target, stamps in read:
                slots.update({target * size + offset: stamp for offset, stamp in enumerate(stamps) if stamp is not None})

    def forward(self, plan: StepPlan, owners: dict[int, tuple[str, int]]) -> list[int]:
        """Run a step; ``owners`` gives the namespace and index of each row. Returns the sampled tokens."""
        self.copy_blocks(plan)
        names = np.repeat(plan.rows, plan.query_lens).tolist()
        for slots, places in zip(self.slots, plan.slot_mapping.tolist(), strict=True):
            stamps = zip(plan.positions.tolist(), plan.token_ids.tolist(), strict=True)
            slots.update({place: (owners[row][0], *stamp) for place, row, stamp in zip(places, names, stamps, strict=True)})
        return [self._sample(plan, seq, owners) for seq in plan.sampling_seqs.tolist()]

    def _sample(self, plan: StepPlan, seq: int, owners: dict[int, tuple[str, int]]) -> int:
        row, length = int(plan.rows[seq]), int(plan.seq_lens[seq])
        name, index = owners[row]
        histories = []
        for slots, tables, window in zip(self.slots, plan.block_tables, self.windows, strict=True):
            history = []
            first = first_seen(window, length - int(plan.query_lens[seq]))
            for position in range(first, length):
                block = int(tables[row, position // self.block_size])
                stamp = slots.get(block * self.block_size + position % self.block_size)
                assert stamp is not None, f"row {row} reads block {block}, which nobody wrote, at {position}"
                assert stamp[:2] == (name, position), f"row {row} of namespace {name!r} reads {stamp} at {position}"
                history.append(stamp[2])
            histories.append(history)
        assert all(history == histories[0][length - len(history) :] for history in histories), "the layer groups tell different stories"
        return next_token(histories[0], index, self.vocabulary)


class RowStates:
    """Recurrent state as the tokens that went into it, by row: what one of those ran on that it should not have, shows."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    def follow(self, assignments: Sequence[Assignment]) -> None:
        for each in assignments:
            self.rows[each.row] = [] if each.source_row is None else list(self.rows[each.source_row])

    def verify(self, plan: StepPlan, manager: KVCacheManager, *, whole: bool) -> None:
        """Every row goes on from the state that it has; from one that is not empty, by a token where prompts are whole."""
        for row, end, count in zip(plan.rows.tolist(), plan.seq_lens.tolist(), plan.query_lens.tolist(), strict=True):
            expected = manager.table.token_ids[row, : end - count].tolist()
            assert self.rows[row] == expected, f"row {row} goes on from {self.rows[row]}, its tokens are {expected}"
            assert count == 1 or not (whole and expected), f"row {row} computes {count} tokens behind {len(expected)}"

    def advance(self, plan: StepPlan, lost_row: int | None) -> None:
        """Take in a step that was booked, but for the row that got no token."""
        for seq, row in enumerate(plan.rows.tolist()):
            if row != lost_row:
                self.rows[row].extend(plan.token_ids[plan.cu_seqlens_q[seq] : plan.cu_seqlens_q[seq + 1]].tolist())


@dataclass(frozen=True)
class Setting:
    """One scheduler under test."""

    num_blocks: tuple[int, ...]
    windows: tuple[Window | None, ...]
    block_size: int
    vocabulary: int
    config: SchedulerConfig
    policy: SchedulingPolicy
    caching: bool
    with_pins: bool

    @staticmethod
    def draw(rng: random.Random) -> Setting:
        smallest = rng.choice([rng.randint(3, 12), rng.randint(3, 36)])
        recurrent_state = rng.choice(["none", "none", "none", "chunked", "whole"])
        setting = Setting(
            num_blocks=(smallest,) if rng.random() < 0.8 else (smallest, smallest + 3),
            windows=(),
            block_size=rng.choice([1, 2, 4]),
            vocabulary=rng.choice([2, 3, 8]),
            config=SchedulerConfig(
                max_num_seqs=rng.randint(1, 6),
                max_num_batched_tokens=rng.choice([1, 2, 3, 5, 8, 64]),
                max_preemptions=rng.choice([0, 1, 3]),
                watermark=rng.choice([0.0, 0.01, 0.2]),
                recurrent_state=recurrent_state,
            ),
            policy=rng.choice([FirstComeFirstServed(), Priority(), LongestCachedPrefix(), LongestCachedPrefix(lookahead=3, patience=2)]),
            caching=rng.random() < 0.8 and recurrent_state == "none",
            with_pins=rng.random() < 0.15,
        )
        return setting._with_windows(rng) if len(setting.num_blocks) > 1 and rng.random() < 0.8 else setting

    def _with_windows(self, rng: random.Random) -> Setting:
        windows = [Window(rng.choice(["sliding", "chunked"]), rng.randint(1, 4 * self.block_size)) for _ in range(rng.choice([1, 1, 2]))]
        pools = [rng.choice([window.most_blocks(self.block_size) + rng.randint(1, 6), self.num_blocks[0]]) for window in windows]
        return replace(self, num_blocks=(self.num_blocks[0], *(max(count, 3) for count in pools)), windows=(None, *windows))


class SchedulerDriver:
    """Submits, steps, fails, aborts, preempts and pins at random; ``run`` returns when every request has ended."""

    def __init__(self, seed: int, kind: type[Scheduler] = Scheduler) -> None:
        self.rng = random.Random(seed)
        self.setting = setting = Setting.draw(self.rng)
        self.manager = KVCacheManager(
            num_blocks=list(setting.num_blocks),
            windows=setting.windows or None,
            block_size=setting.block_size,
            max_num_seqs=setting.config.max_num_seqs,
            enable_prefix_caching=setting.caching,
        )
        self.scheduler = kind(self.manager, setting.config, policy=setting.policy, clock=lambda: 0.0)
        self.model = HashModel(setting.block_size, self.manager.windows, setting.vocabulary)
        self.states = RowStates()
        self.requests: dict[str, Request] = {}
        self.ended_from_outside: set[tuple[str, int]] = set()
        self.preempted_from_outside: set[str] = set()
        self.owners: dict[int, tuple[str, int]] = {}
        self.pins: list[int] = []
        self.num_refused = self.num_steps = self.work = 0
        self.digest = hashlib.sha256()  # of all plans: the same seed must give the same

    def run(self) -> None:
        left = self.rng.randint(3, 14)
        while left or self.scheduler.has_unfinished:
            while left and self.rng.random() < 0.6:
                left -= 1
                self._submit(f"r{left}")
            self._disturb()
            self._step()
        for pin in self.pins:
            self.manager.unpin(pin)
        self._verify_end()

    # One step.

    def _step(self) -> None:
        oldest = self._oldest_running()
        before = oldest.num_preemptions if oldest is not None else 0
        plan = self.scheduler.plan()
        self._verify_state()
        assert oldest is None or oldest.num_preemptions == before, "the oldest running branch was preempted"
        assignments = self.scheduler.take_assignments()
        for assignment in assignments:
            self.owners[assignment.row] = (self.requests[assignment.request_id].namespace, assignment.index)
        self.states.follow(assignments)
        if plan is None:
            return
        self.num_steps += 1
        assert self.num_steps < 200 + 30 * self.work, f"no end in sight after {self.num_steps} steps for {self.work} tokens"
        self._verify_plan(plan)
        kind = self.rng.random()
        if kind < 0.07:
            if kind < 0.03:
                self.model.copy_blocks(plan)
            self.scheduler.undo(plan)
            self._note_restarts()
        else:
            tokens = self.model.forward(plan, self.owners)
            aborted = self._abort_one() if kind < 0.12 else None
            self._complete(plan, tokens)
            record = self.scheduler.record(aborted) if aborted is not None else None
            assert record is None or record.finished, f"{aborted} was aborted during the step and lives on"
        self._verify_state()

    def _complete(self, plan: StepPlan, tokens: list[int]) -> None:
        """Book the step; now and then one token could not be sampled."""
        lost = self.rng.randrange(len(tokens)) if tokens and self.rng.random() < 0.02 else None
        branch = None
        if lost is not None:
            tokens[lost] = -1
            row = int(plan.rows[plan.sampling_seqs[lost]])
            branch = next(branch for branch in self._branches() if branch.status is Status.RUNNING and branch.row == row)
        lost_row = None if branch is None else branch.row
        if branch is not None:
            self._note_restarts()
        self.scheduler.complete(plan, np.array(tokens, dtype=np.int32))
        self.states.advance(plan, lost_row)
        if branch is not None:
            self._end(branch, "error")

    def _note_restarts(self) -> None:
        """Who starts again because a step failed counts as preempted from outside."""
        if self.setting.config.has_state:
            self.preempted_from_outside |= set(self.requests)

    # Disturbances.

    def _submit(self, request_id: str) -> None:
        rng, size, vocabulary = self.rng, self.setting.block_size, self.setting.vocabulary
        known = [request.prompt_token_ids.tolist() for request in self.requests.values()]
        start = rng.choice(known) if known and rng.random() < 0.6 else []
        prompt = start[: rng.randint(0, len(start))] + [rng.randrange(vocabulary) for _ in range(rng.randint(1, 4 * size))]
        request = Request(
            request_id,
            np.array(prompt),
            max_tokens=rng.randint(1, 6 * size + 2),
            min_tokens=rng.choice([0, 0, 3]),
            eos_token_ids=(rng.randrange(vocabulary),) if rng.random() < 0.3 else (),
            stop_token_ids=tuple(rng.randrange(vocabulary) for _ in range(rng.choice([0, 0, 0, 2]))),
            n=rng.choice([1, 1, 1, 2, 3]),
            priority=rng.randint(0, 3),
            namespace=rng.choice(["", "tenant"]),
            wants_prompt_logits=rng.random() < 0.1,
        )
        try:
            self.scheduler.submit(request)
        except RequestTooLargeError:
            self.num_refused += 1
            return
        self.requests[request_id] = request
        self.work += (len(prompt) + request.max_tokens) * request.n

    def _disturb(self) -> None:
        kind = self.rng.random()
        if kind < 0.05:
            self._abort_one()
        elif kind < 0.07:
            running = [branch for branch in self._branches() if branch.status is Status.RUNNING]
            if running:
                self._end(self.rng.choice(running), "stop")
        elif kind < 0.09 and self.requests:
            request_id = self.rng.choice(list(self.requests))
            if self.scheduler.preempt(request_id):
                self.preempted_from_outside.add(request_id)
        elif self.setting.with_pins and kind < 0.2 and self.requests:
            request = self.rng.choice(list(self.requests.values()))
            self.pins.append(self.manager.pin(request.prompt_token_ids, request.namespace)[0])
        elif self.pins and kind < 0.3:
            self.manager.unpin(self.pins.pop())
        elif kind > 0.99:
            self.manager.purge(self.rng.choice(["", "tenant"]))

    def _abort_one(self) -> str | None:
        """Abort somebody, dead or alive; returns the id if it was alive."""
        if not self.requests:
            return None
        request_id = self.rng.choice(list(self.requests))
        if not self.scheduler.abort(request_id):
            return None
        self.ended_from_outside |= {(request_id, index) for index in range(self.requests[request_id].n)}
        return request_id

    def _end(self, branch: Branch, reason: str) -> None:
        index = range(branch.request.n) if branch.is_trunk else [branch.index]
        assert reason in ("stop", "error")
        if self.scheduler.finish(branch.request.request_id, branch.index, "stop" if reason == "stop" else "error"):
            self.ended_from_outside |= {(branch.request.request_id, each) for each in index}

    # Oracles.

    def _verify_state(self) -> None:
        self.manager.check()
        assert self.manager.statistics().num_seqs == self.scheduler.num_running, "somebody who waits holds a sequence"
        waiting = [branch for branch in self._branches() if branch.status in (Status.WAITING, Status.DEFERRED)]
        assert len(waiting) == self.scheduler.num_waiting

    def _verify_plan(self, plan: StepPlan) -> None:
        size = self.setting.block_size
        whole = self.setting.config.recurrent_state == "whole"
        assert plan.num_tokens > 0
        assert plan.num_tokens - whole * plan.num_decodes <= self.setting.config.max_num_batched_tokens
        if self.setting.config.has_state:
            self.states.verify(plan, self.manager, whole=whole)
        assert plan.num_seqs <= self.setting.config.max_num_seqs
        assert (plan.query_lens[: plan.num_decodes] == 1).all()
        assert (plan.query_lens >= 1).all()
        assert plan.cu_seqlens_q.tolist() == [0, *np.cumsum(plan.query_lens).tolist()]
        assert (plan.logits_indices[plan.sampling_logits] == plan.cu_seqlens_q[1:][plan.sampling_seqs] - 1).all()
        owners = np.repeat(plan.rows, plan.query_lens)
        ends = np.repeat(plan.seq_lens - plan.query_lens - plan.cu_seqlens_q[:-1], plan.query_lens)
        assert (plan.positions == ends + np.arange(plan.num_tokens)).all()
        blocks = plan.block_tables[:, owners, plan.positions // size].astype(np.int64)
        assert (plan.slot_mapping == blocks * size + plan.positions % size).all()
        assert (blocks > 0).all()
        for group, places in enumerate(plan.slot_mapping):
            assert len(set(places.tolist())) == plan.num_tokens, f"two tokens are written to one slot of group {group}"
        for array in (plan.seqs, plan.token_ids, plan.slot_mapping, plan.logits_indices):
            self.digest.update(np.ascontiguousarray(array).tobytes())

    def _verify_end(self) -> None:
        for request_id, request in self.requests.items():
            record = self.scheduler.record(request_id)
            assert record is not None
            assert record.finished
            for branch in record.branches:
                self._verify_branch(request, branch)
            if not any((request_id, index) in self.ended_from_outside for index in range(request.n)) and record.error is None:
                assert len(record.branches) == request.n
            self._verify_events(record)
        account = self.manager.statistics()
        assert account.num_seqs == 0
        assert all(group.num_in_use == 0 for group in account.groups)
        assert self.scheduler.plan() is None

    def _verify_branch(self, request: Request, branch: Branch) -> None:
        expected = expected_text(request, branch.index, self.setting.vocabulary)
        got = branch.token_ids.tolist()
        if (request.request_id, branch.index) in self.ended_from_outside:
            assert got == expected[: len(got)]
        elif branch.record.error is not None:
            assert self.setting.with_pins, f"{request.request_id} ended in {branch.record.error!r} and nothing is pinned"
            assert isinstance(branch.record.error, OutOfBlocksError)
            assert got == expected[: len(got)]
        else:
            assert got == expected, f"{request.request_id} continuation {branch.index}: {got}, expected {expected}"
            stopped = got[-1] in request.eos_token_ids + request.stop_token_ids and len(branch.output_token_ids) >= request.min_tokens
            assert branch.finish_reason == ("stop" if stopped else "length")
            assert branch.stop_reason == (got[-1] if stopped and got[-1] not in request.eos_token_ids else None)
        # Pins make an admission that was sure to fit unsure again, and whoever preempts from outside counts for himself.
        if not self.setting.with_pins and not self.preempted_from_outside:
            assert branch.num_preemptions <= self.setting.config.max_preemptions

    def _verify_events(self, record: RequestRecord) -> None:
        events = record.events
        assert events[0].kind is EventKind.SUBMITTED
        assert sum(event.kind is EventKind.FINISHED for event in events) == len(record.branches)
        if not self.preempted_from_outside:
            # 0 where all of its blocks were shared: then it went because it would have needed one more.
            assert all(event.detail["freed_blocks"] >= 0 for event in events if event.kind is EventKind.PREEMPTED)
        assert sum(event.kind is EventKind.PREEMPTED for event in events) == record.num_preemptions

    def _branches(self) -> list[Branch]:
        records = [self.scheduler.record(request_id) for request_id in self.requests]
        return [branch for record in records if record is not None for branch in record.branches if branch.status is not Status.FINISHED]

    def _oldest_running(self) -> Branch | None:
        running = [branch for branch in self._branches() if branch.status is Status.RUNNING]
        return min(running, key=lambda branch: (branch.record.arrival, branch.index), default=None)


def run_seed(seed: int, kind: type[Scheduler] = Scheduler) -> SchedulerDriver:
    """One whole life of a scheduler; a failure names the seed."""
    driver = SchedulerDriver(seed, kind)
    try:
        driver.run()
    except Exception as error:
        error.add_note(f"seed {seed}, step {driver.num_steps}, {driver.setting}")
        raise
    return driver
