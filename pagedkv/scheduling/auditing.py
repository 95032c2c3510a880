"""What must hold between a scheduler's queues, its requests and the manager's sequences. Owns no state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvariantError
from pagedkv.scheduling.request import Branch, RequestRecord, Status
from pagedkv.scheduling.running import RunningSet
from pagedkv.scheduling.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Books:
    """A scheduler's state, to be looked at: who runs, who waits, and the records of all requests that have not ended."""

    manager: KVCacheManager
    running: RunningSet
    waiting: WaitingQueue
    records: Mapping[str, RequestRecord]

    def check_counts(self) -> None:
        """Verify, between two steps, what counts alone can show to be broken:

        1. the running branches are the manager's sequences, each once: who waits holds none;
        2. no slot is reserved: the last step was completed or undone for all;
        3. a running branch knows fewer tokens than it may, or it would have ended;
        4. requests that have not ended have somebody who runs or waits, and nobody else runs or waits.

        Raises:
            InvariantError: naming the law and its numbers.

        Cost: a fixed number of array operations over the running branches.
        """
        for problem in self._count_problems():
            raise InvariantError(f"scheduler: {problem}")

    def check(self) -> None:
        """Verify ``check_counts`` and, branch by branch:

        5. a record has branches of different indices, at least one of which has not ended;
        6. a branch that runs is the one in its row, under the handle that the manager knows, and knows its tokens;
        7. a branch that waits is in the queue, or deferred, once, and holds no row;
        8. trunks, rows kept for their forks, and running branches that were preempted are as many as are counted.

        Raises:
            InvariantError: naming the first that is broken, with the request.

        Cost: O(branches).
        """
        self.check_counts()
        for problem in self._branch_problems():
            raise InvariantError(f"scheduler: {problem}")

    def _count_problems(self) -> Iterator[str]:
        table, rows = self.manager.table, self.running.rows
        listed = np.count_nonzero(table.handles_of(rows))
        if not listed == len(rows) == table.num_live_rows:
            yield f"{len(rows)} branches run, {listed} of them hold a sequence, and the manager has {table.num_live_rows} sequences"
        known, reserved, computed = table.num_tokens[rows], table.num_reserved[rows], table.num_computed[rows]
        if np.count_nonzero(reserved != computed):
            row = int(rows[(reserved != computed).argmax()])
            yield f"row {row}: {table.num_reserved[row]} tokens reserved and {table.num_computed[row]} computed, and no step is under way"
        over = known >= self.running.limits[rows]
        if np.count_nonzero(over):
            row = int(rows[over.argmax()])
            yield f"row {row}: {table.num_tokens[row]} tokens known, {self.running.limits[row]} end it, and it runs"
        active = len(rows) + len(self.waiting)
        if len(self.records) > active or (active and not self.records):
            yield f"{len(self.records)} requests have not ended, {len(rows)} branches run and {len(self.waiting)} wait"

    def _branch_problems(self) -> Iterator[str]:
        waiting: dict[Branch, int] = {}
        for branch in self.waiting:
            waiting[branch] = waiting.get(branch, 0) + 1
        alive: list[Branch] = []
        for request_id, record in self.records.items():
            mine = [branch for branch in record.branches if branch.status is not Status.FINISHED]
            if not mine or len({branch.index for branch in record.branches}) < len(record.branches):
                yield f"request {request_id!r}: {len(record.branches)} continuations, {len(mine)} alive; indices repeat or none is"
            alive += mine
        running = [branch for branch in alive if branch.status is Status.RUNNING]
        for branch in alive:
            problem = self._place_problem(branch, waiting.get(branch, 0))
            if problem:
                yield f"request {branch.request.request_id!r}, continuation {branch.index} is {branch.status} and {problem}"
        counted = (
            len(self.running),
            len(self.waiting),
            self.running.num_trunks,
            self.running.num_reserved_rows,
            self.running.num_preempted,
        )
        trunks = [branch for branch in running if branch.is_trunk]
        preempted = sum(branch.num_preemptions > 0 for branch in running)
        found = (len(running), len(alive) - len(running), len(trunks), sum(branch.width - 1 for branch in trunks), preempted)
        if counted != found or sum(waiting.values()) != len(self.waiting):
            names = "running, waiting, trunks, rows kept for forks, preempted before"
            yield f"{names}: counted {counted}, found {found}, and {sum(waiting.values())} in the queue"

    def _place_problem(self, branch: Branch, times_waiting: int) -> str:
        """What is wrong with where a branch is; nothing when all is well."""
        if branch.status is not Status.RUNNING:
            wrong = times_waiting != 1 or branch.seq != 0 or branch.row != -1
            return f"is {times_waiting} times in the queue with row {branch.row} and sequence {branch.seq}" if wrong else ""
        holder = self.running.holder(branch.row)
        seq = int(self.manager.table.handles_of(np.array([branch.row]))[0])
        if times_waiting or holder is not branch or seq != branch.seq:
            owner = "its own" if holder is branch else "not its own"
            return f"is {times_waiting} times in the queue; row {branch.row} is {owner}, with sequence {seq}"
        return ""
