"""A manager whose pools refuse blocks that they have: every extension fails once before it works, and must have changed nothing.

Owns no bookkeeping. Only the first allocation of an extension fails, the one before which nothing was changed yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagedkv.core import Allocation, BlockPool, Extension, KVCacheManager
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.testing.violations import ViolationError


class _FailingPool(BlockPool):
    """A pool whose next allocation can be made to fail."""

    failing = False

    def take(self, count: int) -> Allocation:
        if count and self.failing:
            raise MemoryError("simulated: no block could be allocated")
        return super().take(count)


class FailingAllocations(KVCacheManager):
    """A ``KVCacheManager`` for ``stress_manager(manager_factory=FailingAllocations)``, with the default eviction policy.

    Attributes:
        num_faults: extensions that were made to fail.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.num_faults = 0
        self._pools = [_FailingPool(group.pool.num_blocks) for group in self._groups]
        for group, pool in zip(self._groups, self._pools, strict=True):
            group.pool = pool

    def extend(self, seqs: Sequence[int] | Int64Array, num_new_tokens: int | Sequence[int] | Int32Array) -> Extension:
        """As ``KVCacheManager.extend``, behind a failure where it takes blocks.

        Raises:
            ViolationError: ``"fault"``: the failure left traces.
        """
        before = self.snapshot()
        try:
            self._let_fail(True)
            return super().extend(seqs, num_new_tokens)
        except MemoryError as error:
            self.num_faults += 1
            if self.snapshot() != before:
                raise ViolationError("fault", f"an extension that failed left traces: {error}") from error
        finally:
            self._let_fail(False)
        return super().extend(seqs, num_new_tokens)

    def _let_fail(self, failing: bool) -> None:
        for pool in self._pools:
            pool.failing = failing
