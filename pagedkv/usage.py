"""What an engine has computed and held so far, counted step by step.

Owns the counts. Does not own what is counted: blocks are the manager's, requests the scheduler's, bytes the storage's.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.core import CacheStatistics, KVCacheManager
from pagedkv.scheduling import Scheduler
from pagedkv.storage import KVStorage


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A frozen account of an engine.

    Attributes:
        num_running: sequences that run.
        num_waiting: sequences that wait.
        num_steps: steps completed.
        num_preemptions: preemptions since the start.
        num_computed_tokens: tokens that went through the model.
        num_generated_tokens: tokens sampled.
        peak_blocks_in_use: most blocks held at once, after a step; the sum of what follows.
        peak_group_blocks: the same in each layer group.
        pool_nbytes: bytes of K/V storage.
        state_nbytes: bytes of recurrent state.
        mean_waste: share of the sequences' slots that held no token, over all steps so far.
        cache: the account of blocks, sequences and prefix hits.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_computed_tokens: int
    num_generated_tokens: int
    peak_blocks_in_use: int
    peak_group_blocks: tuple[int, ...]
    pool_nbytes: int
    state_nbytes: int
    mean_waste: float
    cache: CacheStatistics


class Usage:
    """Counts an engine's steps.

    Args:
        manager: of the blocks that they hold.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._num_computed = self._num_generated = self._num_steps = 0
        self._peak_blocks = [0] * len(manager.usable_blocks)
        self._token_steps = self._slot_steps = 0

    def book(self, *, num_computed: int, num_generated: int) -> None:
        """Count a step that was completed, and what is held after it."""
        manager, table = self._manager, self._manager.table
        self._num_steps += 1
        self._num_computed += num_computed
        self._num_generated += num_generated
        use = zip(self._peak_blocks, manager.usable_blocks, manager.available_blocks, strict=True)
        self._peak_blocks = [max(peak, usable - available) for peak, usable, available in use]
        self._token_steps += int(table.num_reserved.sum())
        self._slot_steps += int(table.num_blocks.sum()) * manager.block_size

    def statistics(self, scheduler: Scheduler, storage: KVStorage) -> EngineStatistics:
        """A frozen account, with what runs and what it is held in; O(blocks)."""
        return EngineStatistics(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_computed_tokens=self._num_computed,
            num_generated_tokens=self._num_generated,
            peak_blocks_in_use=sum(self._peak_blocks),
            peak_group_blocks=tuple(self._peak_blocks),
            pool_nbytes=storage.nbytes,
            state_nbytes=0 if storage.state is None else storage.state.nbytes,
            mean_waste=1 - self._token_steps / self._slot_steps if self._slot_steps else 0.0,
            cache=self._manager.statistics(),
        )
