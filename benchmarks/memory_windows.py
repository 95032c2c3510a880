"""What long sequences hold of a model whose layers have windows: with a table for each layer group, and with one for all layers.

The scheduler and its books run alone, without a model: blocks depend on lengths only. Shapes are those of published models, as their
configs state them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedkv.core import KVCacheManager, Window
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig

BLOCK_SIZE = 16
CHUNK = 2_048


@dataclass(frozen=True, slots=True)
class Shape:
    """K/V of one model: layers that read everything, layers with a window, and bytes of one token in one layer."""

    name: str
    num_full: int
    num_windowed: int
    window: Window
    nbytes: int

    @property
    def nbytes_per_token(self) -> int:
        """Of all layers."""
        return (self.num_full + self.num_windowed) * self.nbytes


# bfloat16: K and V, K/V heads, elements, bytes. gemma-3-4b: every sixth of 34 layers reads everything; gpt-oss-20b: every second of 24.
SHAPES = (
    Shape("gemma3-4b", 5, 29, Window.sliding(1_024), 2 * 4 * 256 * 2),
    Shape("gpt-oss-20b", 12, 12, Window.sliding(128), 2 * 8 * 64 * 2),
)


@dataclass(frozen=True, slots=True)
class Holding:
    """What was held while requests ran.

    Attributes:
        peak_nbytes: most bytes at once, during a step.
        end_nbytes: bytes in the last step in which all of them decode.
        end_blocks: blocks of each layer group in that step, of all sequences.
        num_hit_tokens: prompt tokens of one more request that were found, of ``num_tokens``: it goes on where the first ended.
        num_tokens: of that request's prompt.
    """

    peak_nbytes: int
    end_nbytes: int
    end_blocks: tuple[int, ...]
    num_hit_tokens: int
    num_tokens: int


def hold(shape: Shape, *, num_seqs: int, num_tokens: int, num_new: int, windowed: bool) -> Holding:
    """Serve requests of one length together, with one table for all layers or one for each group."""
    columns = -(-(num_tokens + num_new + CHUNK) // BLOCK_SIZE)
    total = (num_seqs + 1) * columns + 1
    windows = [None, shape.window] if windowed else [None]
    layers = [shape.num_full, shape.num_windowed] if windowed else [shape.num_full + shape.num_windowed]
    step_blocks = CHUNK // BLOCK_SIZE + 1
    sizes = [total, num_seqs * shape.window.most_blocks(BLOCK_SIZE) + step_blocks + 1] if windowed else [total]
    manager = KVCacheManager(num_blocks=sizes, windows=windows, block_size=BLOCK_SIZE, max_num_seqs=num_seqs)
    scheduler = Scheduler(manager, SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=CHUNK, watermark=0.0))
    prompts = [np.random.default_rng(index).integers(0, 2**30, num_tokens, dtype=np.int32) for index in range(num_seqs)]
    for index, prompt in enumerate(prompts):
        scheduler.submit(Request(str(index), prompt, max_tokens=num_new))
    peak, last, blocks, steps = 0, 0, (0,) * len(sizes), 0
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        if plan is None:
            continue
        steps += 1
        held = tuple(usable - available for usable, available in zip(manager.usable_blocks, manager.available_blocks, strict=True))
        nbytes = sum(count * BLOCK_SIZE * shape.nbytes * share for count, share in zip(held, layers, strict=True))
        peak = max(peak, nbytes)
        if plan.num_decodes == num_seqs:
            last, blocks = nbytes, held
        scheduler.complete(plan, np.full(len(plan.sampling_seqs), steps, dtype=np.int32))
    record = scheduler.record(str(num_seqs - 1))
    follow_up = np.zeros(0, dtype=np.int32) if record is None else record.branches[0].token_ids
    found = manager.match(follow_up).num_tokens
    return Holding(peak, last, blocks, found, len(follow_up))
