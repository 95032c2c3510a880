"""Overwriting K/V that nobody may read any more, so that whoever does is found out. Owns no block and no bytes."""

from __future__ import annotations

import numpy as np

from pagedkv.core import GuardedKVCacheManager, KVCacheManager
from pagedkv.plan import StepPlan
from pagedkv.storage import KVStorage

_POISON = float("nan")  # of every floating dtype, which is all that K and V are stored in


class Poison:
    """Fills blocks with NaN that were let go of, or handed out again, since the last time.

    Args:
        manager: at level ``"audit"``, which knows what those are.
        storage: the pools of its blocks.
    """

    def __init__(self, manager: GuardedKVCacheManager, storage: KVStorage) -> None:
        self._manager, self._storage = manager, storage

    @classmethod
    def at_level(cls, manager: KVCacheManager, storage: KVStorage) -> Poison | None:
        """One for a manager that audits itself, none for others."""
        if isinstance(manager, GuardedKVCacheManager) and manager.check_level == "audit":
            return cls(manager, storage)
        return None

    def spread(self, plan: StepPlan) -> None:
        """Fill what became stale; between a step's block copies, which may have to read it, and its first write.

        Args:
            plan: the step, whose ``copies`` have just been made: the targets hold what they should. Sequences that begin in it have no
                recurrent state yet: what their rows hold is another's.

        Cost: O(bytes of those blocks); the first time, of all that are free.
        """
        for group, (block_ids, copied) in enumerate(zip(self._manager.take_stale_blocks(), plan.copies, strict=True)):
            stale = np.setdiff1d(block_ids, copied[:, 1])
            if len(stale):
                self._storage.fill(stale, _POISON, group=group)
        if self._storage.state is not None:
            self._storage.state.fill(plan.rows[plan.seq_lens == plan.query_lens], _POISON)
