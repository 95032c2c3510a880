"""The waiting branches: those that may be admitted, in the policy's order, and those deferred until a shared prefix is computed.

Owns queue membership. Does not admit anybody.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from pagedkv.core.transaction import Transaction
from pagedkv.scheduling.policies import Candidate, SchedulingPolicy
from pagedkv.scheduling.request import Branch, Status


class WaitingQueue:
    """A heap by policy rank with lazy removal: an entry whose branch is not waiting any more is skipped.

    Args:
        policy: ranks and chooses.
        change: of whoever owns the queue; its own when not given.

    Cost: O(log n) to add and to take, O(lookahead) more where the policy chooses.
    """

    def __init__(self, policy: SchedulingPolicy, change: Transaction | None = None) -> None:
        self.policy = policy
        self._change = Transaction("the queue") if change is None else change
        self._heap: list[tuple[tuple[int, ...], int, int, Branch]] = []
        self._queued: dict[Branch, int] = {}  # the number of its entry that counts: one that was queued before may still be in the heap
        self._deferred: dict[int, list[tuple[int, Branch]]] = {}
        self._num_deferred = 0
        self._entries = 0
        self._passed_over: list[Branch] = []  # by the last choice

    def __len__(self) -> int:
        """Branches that wait, deferred ones included."""
        return len(self._queued) + self._num_deferred

    def __iter__(self) -> Iterator[Branch]:
        """Queued branches, best first, then deferred ones."""
        for _, _, number, branch in sorted(self._heap):
            if self._queued.get(branch) == number:
                yield branch
        for waiters in self._deferred.values():
            yield from (branch for _, branch in waiters if branch.status is Status.DEFERRED)

    def push(self, branch: Branch) -> None:
        """Queue a waiting branch at its rank."""
        self._entries += 1
        self._queued[branch] = self._entries
        heapq.heappush(self._heap, (self.policy.rank(candidate_of(branch)), branch.index, self._entries, branch))

    def next(self, num_cached_tokens: Callable[[Branch], int]) -> Branch | None:
        """The branch to admit next, left in the queue; None when nobody is queued."""
        self._passed_over = []
        if self.policy.lookahead == 1:
            self._drop_dead()
            return self._heap[0][3] if self._heap else None
        entries: list[tuple[tuple[int, ...], int, int, Branch]] = []
        with self._change:
            while len(entries) < self.policy.lookahead:
                self._drop_dead()
                if not self._heap:
                    break
                entries.append(heapq.heappop(self._heap))
            for entry in entries:
                heapq.heappush(self._heap, entry)
        if not entries:
            return None
        branches = [entry[3] for entry in entries]
        chosen = self.policy.choose([candidate_of(branch) for branch in branches], [num_cached_tokens(branch) for branch in branches])
        self._passed_over = branches[:chosen]
        return branches[chosen]

    def take(self, branch: Branch) -> None:
        """Take out the branch that ``next`` gave, which is admitted; who ranks before it was passed over."""
        for other in self._passed_over:
            other.num_passed_over += 1
        self.remove(branch)

    def remove(self, branch: Branch) -> None:
        """Take a branch out of the queue, or out of those deferred."""
        if branch in self._queued:
            del self._queued[branch]
        elif branch.status is Status.DEFERRED:
            self._num_deferred -= 1

    def defer(self, branch: Branch, row: int, num_computed: int) -> None:
        """Set a queued branch aside until the sequence in ``row`` has computed so many tokens, or is gone."""
        with self._change:
            self.remove(branch)
            branch.move(Status.DEFERRED)
            self._num_deferred += 1
            self._deferred.setdefault(row, []).append((num_computed, branch))

    def wake(self, row: int, num_computed: int | None = None) -> None:
        """Queue again who waits for ``row``: those served by ``num_computed`` tokens, or all when the row's sequence is gone."""
        waiters = self._deferred.pop(row, None)
        if not waiters:
            return
        later = []
        for needed, branch in waiters:
            if branch.status is not Status.DEFERRED:
                continue
            if num_computed is not None and num_computed < needed:
                later.append((needed, branch))
                continue
            self._num_deferred -= 1
            branch.move(Status.WAITING)
            self.push(branch)
        if later:
            self._deferred[row] = later

    @property
    def deferred_rows(self) -> list[int]:
        """Rows that somebody waits for."""
        return list(self._deferred)

    def _drop_dead(self) -> None:
        while self._heap and self._queued.get(self._heap[0][3]) != self._heap[0][2]:
            heapq.heappop(self._heap)


def candidate_of(branch: Branch) -> Candidate:
    """What the policy may know of a branch."""
    record = branch.record
    return Candidate(record.arrival, record.request.priority, len(branch.token_ids), branch.num_passed_over)
