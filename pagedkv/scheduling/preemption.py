"""Who gives way when blocks run out. Owns no state."""

from __future__ import annotations

from pagedkv.core import KVCacheManager
from pagedkv.scheduling.policies import SchedulingPolicy
from pagedkv.scheduling.request import Branch
from pagedkv.scheduling.running import RunningSet
from pagedkv.scheduling.waiting import candidate_of


def choose_victims(manager: KVCacheManager, running: RunningSet, policy: SchedulingPolicy) -> list[Branch]:
    """The fewest branches, worst-ranked first, whose release makes at least one block available, or at least one less needed.

    Never chosen: branches of the oldest running request, as long as any other can make room; its oldest branch, ever. Empty when it runs
    alone. Branches that share all their blocks with each other free nothing alone, so they go together.

    Cost: O(running + blocks that the victims hold), in Python: preemption is an event.
    """
    oldest = min(running.branches, key=lambda branch: (branch.record.arrival, branch.index))
    siblings = [branch for branch in running.branches if branch.record is oldest.record and branch is not oldest]
    others = [branch for branch in running.branches if branch.record is not oldest.record]
    for pool in (others, siblings):
        pool = sorted(pool, key=lambda branch: (policy.rank(candidate_of(branch)), branch.index), reverse=True)
        for count in range(1, len(pool) + 1):
            victims = pool[:count]
            if manager.num_exclusive_blocks([branch.seq for branch in victims]):
                return victims
    # All others share every block with the oldest, as twins do. The last of them frees none, but needs none in this step any more either.
    rivals = others or siblings
    return [max(rivals, key=lambda branch: (policy.rank(candidate_of(branch)), branch.index))] if rivals else []
