"""A manager whose pools say, one after the other before every extension, that they have no blocks: it must be refused and change nothing.

Owns no bookkeeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagedkv.core import Allocation, BlockPool, Extension, KVCacheManager
from pagedkv.errors import OutOfBlocksError
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.testing.violations import ViolationError


class _FailingPool(BlockPool):
    """A pool that has nothing to give while it fails."""

    failing = False

    @property
    def num_available(self) -> int:
        return 0 if self.failing else super().num_available

    def take(self, count: int) -> Allocation:
        if count and self.failing:
            raise OutOfBlocksError(needed=count, available=0)
        return super().take(count)


class FailingAllocations(KVCacheManager):
    """A ``KVCacheManager`` for ``stress_manager(manager_factory=FailingAllocations)``, with the default eviction policy.

    Attributes:
        num_faults: refusals of extensions that worked afterwards; those that blocks were really lacking for do not count.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.num_faults = 0
        self._pools = [_FailingPool(group.pool.num_blocks) for group in self._groups]
        for group, pool in zip(self._groups, self._pools, strict=True):
            group.pool = pool

    def extend(self, seqs: Sequence[int] | Int64Array, num_new_tokens: int | Sequence[int] | Int32Array) -> Extension:
        """As ``KVCacheManager.extend``, behind a refusal for each pool that it takes blocks from.

        Raises:
            ViolationError: ``"fault"``: a refusal left traces.
        """
        before, num_refusals = self.snapshot(), 0
        for pool in self._pools:
            pool.failing = True
            try:
                extension = super().extend(seqs, num_new_tokens)
                break
            except OutOfBlocksError as error:
                refusal = error
            finally:
                pool.failing = False
            num_refusals += 1
            if self.snapshot() != before:
                raise ViolationError("fault", f"an extension that was refused left traces: {refusal}") from refusal
        else:
            extension = super().extend(seqs, num_new_tokens)
        self.num_faults += num_refusals
        return extension
