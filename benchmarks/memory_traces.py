"""Reserved and used K/V slots, step by step, of a workload under pages, padded batches and contiguous rows.

Owns the tracing; computes no K/V. Pages are counted in the tables of the scheduler that would serve the requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from workloads import Workload

from pagedkv.core import KVCacheManager
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pagedkv import EngineStatistics

MAX_BATCHED_TOKENS = 2_048
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """One layout's slots over its own steps.

    Attributes:
        label: the layout.
        reserved: ``[steps]`` slots held; one that several requests share counts once.
        used: ``[steps]`` of those, slots that hold a token of an unfinished request, or are about to in this step.
        running: ``[steps]`` unfinished requests that hold slots.
        num_computed: tokens computed in all.
        peak_prefix_blocks: most distinct blocks that held the workload's shared prefix at one step.
    """

    label: str
    reserved: Counts
    used: Counts
    running: Counts
    num_computed: int = 0
    peak_prefix_blocks: int = 0

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return len(self.reserved)

    @property
    def peak_reserved(self) -> int:
        """Most slots held at once."""
        return int(self.reserved.max())

    @property
    def mean_reserved(self) -> float:
        """Slots held, over all steps."""
        return float(self.reserved.mean())

    @property
    def mean_used(self) -> float:
        """Slots used, over all steps."""
        return float(self.used.mean())

    @property
    def mean_running(self) -> float:
        """Requests that hold slots, over all steps."""
        return float(self.running.mean())

    @property
    def waste(self) -> float:
        """Percent of the held slots that hold nothing, over all steps."""
        return 100 * (1 - float(self.used.sum()) / float(self.reserved.sum()))

    @property
    def waste_by_step(self) -> npt.NDArray[np.float64]:
        """``[steps]`` the same, step by step."""
        return 100 * (1 - self.used / np.maximum(self.reserved, 1))


class _Tracer:
    """Counts one step at a time in a manager's tables."""

    def __init__(self, work: Workload, block_size: int) -> None:
        self._size = block_size
        self._prefix_columns = work.num_shared // block_size
        self._steps: list[tuple[int, int, int]] = []
        self._peak_prefix = 0
        self._computed = 0

    def count(self, manager: KVCacheManager, num_tokens: int) -> None:
        """Take a step's tables, while the slots of its new tokens are reserved."""
        table = manager.table
        rows = table.live_rows
        blocks, size = table.num_blocks[rows], self._size
        tables = table.block_tables[0][rows]
        held = np.unique(tables[np.arange(tables.shape[1]) < blocks[:, None]])
        # A slot is used when any of its holders has a token in it: all but the free ends of last blocks, which nobody shares here.
        free = int((blocks.astype(np.int64) * size - table.num_reserved[rows]).sum())
        reserved = len(held) * size
        self._steps.append((reserved, reserved - free, len(rows)))
        self._computed += num_tokens
        if self._prefix_columns:
            prefix = tables[:, : self._prefix_columns]
            self._peak_prefix = max(self._peak_prefix, len(np.unique(prefix[prefix > 0])))

    def timeline(self, label: str) -> Timeline:
        reserved, used, running = np.array(self._steps, dtype=np.int64).T
        return Timeline(label, reserved, used, running, num_computed=self._computed, peak_prefix_blocks=self._peak_prefix)


def paged(work: Workload, *, block_size: int, prefix_caching: bool = True) -> Timeline:
    """Run the scheduler and its books alone; every sampled token is a different id, so that no output is ever shared."""
    longest = max(work.total_lens)
    manager = KVCacheManager(
        num_blocks=_num_blocks(work, block_size),
        block_size=block_size,
        max_num_seqs=work.num_requests,
        max_seq_len=longest,
        enable_prefix_caching=prefix_caching,
    )
    scheduler = Scheduler(manager, SchedulerConfig(max_num_seqs=work.num_requests, max_num_batched_tokens=MAX_BATCHED_TOKENS))
    for index, (prompt, length) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        scheduler.submit(Request(str(index), np.array(prompt, dtype=np.int32), max_tokens=length))
    tracer, sampled = _Tracer(work, block_size), 0
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        if plan is None:
            continue
        tracer.count(manager, plan.num_tokens)
        count = len(plan.sampling_seqs)
        scheduler.complete(plan, np.arange(sampled, sampled + count, dtype=np.int32))
        sampled += count
    return tracer.timeline(f"pages of {block_size}")


def paged_by_engine(work: Workload, model: PreTrainedModel, *, block_size: int) -> tuple[Timeline, EngineStatistics]:
    """Run the requests through an engine on a model and read its account after every step."""
    from pagedkv import Engine, EngineConfig, ModelRunner, SamplingParams

    config = EngineConfig(
        num_blocks=_num_blocks(work, block_size), max_num_batched_tokens=MAX_BATCHED_TOKENS, max_num_seqs=work.num_requests
    )
    runner = ModelRunner(model, block_size=block_size)
    engine = Engine(runner, config)
    for index, (prompt, length) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add_request(str(index), list(prompt), params, stream=False)
    steps = []
    while engine.has_unfinished:
        engine.step()
        cache = engine.statistics().cache
        if cache.num_seqs:
            steps.append((cache.groups[0].num_in_use * block_size, cache.num_reserved_tokens, cache.num_seqs))
    statistics = engine.statistics()
    engine.close()
    runner.close()
    reserved, used, running = np.array(steps, dtype=np.int64).T
    return Timeline("the engine, after each step", reserved, used, running, num_computed=statistics.num_computed_tokens), statistics


def padded(work: Workload, *, batch_size: int) -> Timeline:
    """Padded batches of requests sorted by prompt: every row as wide as the longest, held until the longest output is done."""
    prompts, outputs = np.array([len(prompt) for prompt in work.prompts]), np.array(work.output_lens)
    order = np.lexsort((outputs, prompts))
    steps = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for step in range(int(outputs[batch].max())):
            alive = batch[outputs[batch] > step]
            steps.append((len(batch) * (int(prompts[batch].max()) + step), int(prompts[alive].sum()) + step * len(alive), len(alive)))
    reserved, used, running = np.array(steps, dtype=np.int64).T
    return Timeline(f"padded batches of {batch_size}", reserved, used, running)


def contiguous(ours: Timeline, work: Workload, *, max_model_len: int) -> Timeline:
    """One row of ``max_model_len`` slots for each running request, under the same schedule as ours."""
    if max(work.total_lens) > max_model_len:
        raise ValueError(f"a request needs {max(work.total_lens)} slots, a row has {max_model_len}")
    return Timeline(f"a row of {max_model_len:,} for each", ours.running * max_model_len, ours.used, ours.running)


def _num_blocks(work: Workload, block_size: int) -> int:
    """All requests at their longest at once, some room, and the null block."""
    return int(sum(-(-length // block_size) for length in work.total_lens) * 1.05) + 3
