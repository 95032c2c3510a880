"""Overwriting K/V that nobody may read any more, so that whoever does is found out. Owns no block and no bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedkv.core import GuardedKVCacheManager, KVCacheManager
from pagedkv.plan import Int32Array
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

    def spread(self, copies: Sequence[Int32Array]) -> None:
        """Fill what became stale; between a step's block copies, which may have to read it, and its first write.

        Args:
            copies: per layer group ``[C, 2]`` (source, target) blocks that have just been copied: the targets hold what they should.

        Cost: O(bytes of those blocks); the first time, of all that are free.
        """
        for group, (block_ids, copied) in enumerate(zip(self._manager.take_stale_blocks(), copies, strict=True)):
            stale = np.setdiff1d(block_ids, copied[:, 1])
            if len(stale):
                self._storage.fill(stale, _POISON, group=group)
