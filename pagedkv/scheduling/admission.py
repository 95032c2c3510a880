"""Whether the next waiting branch may start, and if not, why.

Owns the rules of admission. Does not own the queue or the running set: it asks both.
"""

from __future__ import annotations

import numpy as np

from pagedkv.core import KVCacheManager, Match, Opened
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.scheduling.config import SchedulerConfig
from pagedkv.scheduling.events import EventKind, MissReason, WaitReason
from pagedkv.scheduling.inflight import PrefixesInFlight
from pagedkv.scheduling.needs import BlockNeeds
from pagedkv.scheduling.request import Branch, Request, Status
from pagedkv.scheduling.running import RunningSet
from pagedkv.scheduling.waiting import WaitingQueue


class Admission:
    """Picks waiting branches one by one, when everything they know fits beside what runs, and opens their sequences."""

    def __init__(self, manager: KVCacheManager, config: SchedulerConfig, running: RunningSet, waiting: WaitingQueue) -> None:
        self._manager = manager
        self._config = config
        self._running = running
        self._waiting = waiting
        self._needs = BlockNeeds(manager.table, manager.windows, in_chunks=config.recurrent_state != "whole")
        self._watermark = (np.array(manager.usable_blocks) * config.watermark).astype(np.int64)
        self._in_flight = PrefixesInFlight(manager.block_size, self._is_prefilling)
        self._margin: Int64Array | None = None  # available blocks of each group less what running branches need for the tokens they know

    def begin_step(self) -> None:
        """Forget what was computed for the step before."""
        self._margin = None

    def next(self, step: int, *, preempted: bool) -> Branch | None:
        """The branch whose turn it is and for whom there is room, left in the queue; None when none may start in this step.

        The policy's order is kept: behind one that has to wait for blocks nobody overtakes. Only who waits for a prefix steps aside.
        """
        while True:
            branch = self._waiting.next(lambda waiting: self._match(waiting).num_tokens)
            if branch is None:
                return None
            if preempted:
                branch.record.note(EventKind.WAITING, step, reason=WaitReason.PREEMPTION)
                return None
            match = self._match(branch)
            source = self._computing_same_prefix(branch, match)
            if source is not None:
                row, num_computed = source
                shared_with = self._running.branch(row).request.request_id
                branch.record.note(EventKind.WAITING, step, reason=WaitReason.PREFIX, num_tokens=num_computed, shared_with=shared_with)
                self._waiting.defer(branch, row, num_computed)
                continue
            return branch if self._has_room(branch, match, step) else None

    def open(self, branch: Branch) -> Opened:
        """Open a sequence for a branch that ``next`` gave."""
        request = branch.request
        return self._manager.open([branch.token_ids], [request.namespace], use_cache=not request.wants_prompt_logits)

    def note_started(self, branch: Branch) -> None:
        """Note that an admitted branch has its row and begins to compute its prompt."""
        self._in_flight.add(branch)
        if len(self._in_flight) > 2 * self._manager.max_num_seqs:
            self._in_flight.sweep()

    def miss_reason(self, branch: Branch) -> MissReason:
        """Why nothing was found for a branch that was admitted with no cached tokens."""
        if not self._manager.prefix_caching:
            return MissReason.STATE if self._config.has_state else MissReason.DISABLED
        return MissReason.PROMPT_LOGITS if branch.request.wants_prompt_logits else MissReason.NOT_CACHED

    def _match(self, branch: Branch) -> Match:
        if branch.request.wants_prompt_logits:
            return Match(0, ((),) * self._manager.num_groups)
        return self._manager.match(branch.token_ids[:-1], branch.request.namespace)

    def _has_room(self, branch: Branch, match: Match, step: int) -> bool:
        """The three rules: enough rows, in each group blocks for all known tokens, and after many preemptions enough until the end."""
        manager, running, needs = self._manager, self._running, self._needs
        rows = branch.width + len(running) + running.num_reserved_rows
        if rows > min(self._config.max_running, manager.max_num_seqs):
            branch.record.note(EventKind.WAITING, step, reason=WaitReason.SEQUENCES, running=len(running))
            return False
        if not len(running):
            return True  # alone it fits: that was checked when it was submitted
        held, available = np.array(manager.held_blocks(match)), np.array(manager.available_blocks)
        # One block more for each fork: it gets a copy of the half-full last block, or a new one.
        needed = needs.of_tokens(len(branch.token_ids) + 1) + branch.width - 1 - held
        if self._margin is None:
            self._margin = available - running.outstanding_blocks(needs)
        lacking = needed + self._watermark - self._margin
        if lacking.max() > 0:
            group = int(lacking.argmax())
            branch.record.note(
                EventKind.WAITING, step, reason=WaitReason.BLOCKS, needed=int(needed[group]), available=int(available[group])
            )
            return False
        if self._must_be_sure(branch):
            held[needs.windowed] = 0
            worst = self.worst_case(branch.request, branch.width) - held + running.worst_case_blocks(needs)
            if (worst > available).any():
                group = int((worst - available).argmax())
                branch.record.note(
                    EventKind.WAITING, step, reason=WaitReason.RESERVED, needed=int(worst[group]), available=int(available[group])
                )
                return False
        # What is admitted leaves the margin by what it needs, so that many admissions in a step do not each sum up all that runs.
        self._margin = None if branch.is_trunk else self._margin - needed
        return True

    def worst_case(self, request: Request, width: int) -> Int64Array:
        """``[G]`` blocks of each layer group that ``width`` branches of a request, alone, need at once at most until they end."""
        size, prompt = self._manager.block_size, len(request.prompt_token_ids)
        shared = (prompt - 1) // size if width > 1 else 0
        total = shared + width * (-(-(prompt + request.max_tokens - 1) // size) - shared)
        worst: Int64Array = np.minimum(total, width * self._needs.most[:, 0])
        return worst

    def _must_be_sure(self, branch: Branch) -> bool:
        """Whether all that runs has to fit to its end: this branch, or one that runs, was preempted as often as may be."""
        limit = self._config.max_preemptions
        if branch.num_preemptions >= limit:
            return True
        return self._running.num_preempted > 0 and any(other.num_preemptions >= limit for other in self._running.branches)

    def _computing_same_prefix(self, branch: Branch, match: Match) -> tuple[int, int] | None:
        """A running row that is computing full blocks of this prompt that are not cached yet, and how far they reach."""
        request, size, table = branch.request, self._manager.block_size, self._manager.table
        if request.wants_prompt_logits or not self._manager.prefix_caching:
            return None
        for other in self._in_flight.find(request.namespace, branch.token_ids):
            known = int(table.num_tokens[other.row])
            common = _common_prefix(branch.token_ids[:-1], table.token_ids[other.row, :known])
            reach = min(common, known - int(self._running.hold[other.row])) // size * size
            if reach > max(match.num_tokens, int(table.num_computed[other.row])):
                return other.row, reach
        return None

    def _is_prefilling(self, branch: Branch) -> bool:
        table, row = self._manager.table, branch.row
        if branch.status is not Status.RUNNING or not table.roots[row]:
            return False
        return int(table.num_tokens[row]) - int(self._running.hold[row]) - int(table.num_computed[row]) > 1


def _common_prefix(one: Int32Array, other: Int32Array) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
