"""How large the pools should be, layer group by layer group: what the work can use at once, and never more than the memory there is.

Owns no state. The pools of a model without windows are one group's, and all of this is about one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagedkv.checks import integer
from pagedkv.core import Window
from pagedkv.errors import ConfigError
from pagedkv.models import ModelRunner
from pagedkv.scheduling import SchedulerConfig

# Of a first group without layers, whose blocks cost no K/V but about 60 bytes of books each.
_MAX_IDLE_BLOCKS = 2**18
_MOST_BLOCKS = 2**31 - 1  # block ids are int32


@dataclass(frozen=True, slots=True)
class PoolGroup:
    """One layer group's part of the memory: ``window`` of its layers, and ``nbytes_per_block`` of all of them."""

    window: Window | None
    nbytes_per_block: int


def pool_groups(runner: ModelRunner, *, windowed: bool = True) -> tuple[PoolGroup, ...]:
    """The layer groups of a model; a single one where windows are not wanted, or prompts have to be computed in one step."""
    if not windowed or runner.recurrent_state == "whole":
        return (PoolGroup(None, sum(runner.group_nbytes)),)
    windows = [None if mask is None or mask.kind == "causal" else Window(mask.kind, mask.size) for mask in runner.windows]
    return tuple(PoolGroup(window, nbytes) for window, nbytes in zip(windows, runner.group_nbytes, strict=True))


def blocks_needed(groups: Sequence[PoolGroup], limits: SchedulerConfig, *, block_size: int, max_model_len: int) -> list[int]:
    """For each group, the blocks with which it is never what is short: no limit where sequences keep everything.

    A windowed group needs what all running sequences read, and what a step's tokens take before it is over.
    """
    step = limits.max_num_batched_tokens // block_size + 1
    needed = []
    for group in groups:
        if group.window is not None:
            running = limits.max_running * group.window.most_blocks(block_size)
            needed.append(_with_watermark(running + step, limits))
        elif group.nbytes_per_block:
            needed.append(_MOST_BLOCKS)
        else:
            longest = -(-max_model_len // block_size)
            needed.append(_with_watermark(max(longest, min(limits.max_running * longest, _MAX_IDLE_BLOCKS)), limits))
    return needed


def blocks_for_work(
    lengths: Iterable[tuple[int, int]], groups: Sequence[PoolGroup], limits: SchedulerConfig, *, block_size: int
) -> list[int]:
    """For each group, the blocks that requests can use at once, the null block included.

    Args:
        lengths: per sequence ``(tokens at its longest, how many such sequences)``.
        groups: of the model.
        limits: of the scheduler; the longest sequences that can run at once are counted.
        block_size: tokens in a block.
    """
    most = limits.max_running
    each = sorted((-(-tokens // block_size) for tokens, count in lengths for _ in range(min(count, most))), reverse=True)[:most]
    step = limits.max_num_batched_tokens // block_size + 1
    needed = []
    for group in groups:
        blocks = sum(each)
        if group.window is not None:
            widest = group.window.most_blocks(block_size)
            blocks = min(blocks, sum(min(count, widest) for count in each) + step)
        needed.append(_with_watermark(blocks, limits))
    return needed


def split_blocks(num_blocks: int, needed: Sequence[int], groups: Sequence[PoolGroup]) -> list[int]:
    """``num_blocks`` for each group that keeps everything, and for each windowed one no more than it needs; at least 2."""
    return [max(2, count if not group.nbytes_per_block else min(num_blocks, count)) for count, group in zip(needed, groups, strict=True)]


def blocks_given(
    num_blocks: int | Sequence[int], groups: Sequence[PoolGroup], limits: SchedulerConfig, *, block_size: int, max_model_len: int
) -> list[int]:
    """The blocks of each group where they are given: of each, or one number that ``split_blocks`` makes theirs.

    Raises:
        ConfigError: numbers for another count of groups.
    """
    if isinstance(num_blocks, Sequence):
        if len(num_blocks) != len(groups):
            raise ConfigError(f"num_blocks is {list(num_blocks)}: the model has {len(groups)} layer groups, give one number or so many")
        return list(num_blocks)
    if len(groups) == 1:
        return [num_blocks]
    return split_blocks(num_blocks, blocks_needed(groups, limits, block_size=block_size, max_model_len=max_model_len), groups)


def blocks_in_memory(nbytes: int, nbytes_per_block: int, *, setting: str, state_nbytes: int = 0) -> int:
    """Blocks that fit in ``nbytes`` beside the recurrent state of all sequences; any number of those that hold nothing.

    Raises:
        ConfigError: naming the setting when not even two do.
    """
    integer(f"{setting} (bytes)", nbytes, least=1)
    left = nbytes - state_nbytes
    if left < 0:
        raise ConfigError(f"{setting} is {nbytes} bytes, the recurrent state of all sequences takes {state_nbytes}: lower max_num_seqs")
    if not nbytes_per_block:
        return _MOST_BLOCKS
    blocks = left // nbytes_per_block
    if blocks < 2:
        raise ConfigError(f"{setting} is {nbytes} bytes, room for {blocks} blocks of {nbytes_per_block} bytes: at least 2 are needed")
    return blocks


def fit_in_memory(nbytes: int, needed: Sequence[int], groups: Sequence[PoolGroup], *, setting: str, state_nbytes: int = 0) -> list[int]:
    """The most blocks for each group that fit in ``nbytes`` together: as many as possible, the same number where not fewer are needed.

    Raises:
        ConfigError: not even two blocks of each fit beside the recurrent state of all sequences; names the setting.
    """
    least = blocks_in_memory(nbytes, sum(group.nbytes_per_block for group in groups), setting=setting, state_nbytes=state_nbytes)
    most = max(max(needed), least)
    while least < most:  # the largest number that fits lies between these, both included
        middle = (least + most + 1) // 2
        blocks = split_blocks(middle, needed, groups)
        if sum(count * group.nbytes_per_block for count, group in zip(blocks, groups, strict=True)) <= nbytes - state_nbytes:
            least = middle
        else:
            most = middle - 1
    return split_blocks(least, needed, groups)


def _with_watermark(blocks: int, limits: SchedulerConfig) -> int:
    return int(blocks / (1 - limits.watermark)) + 3  # the null block, and the rounding of the watermark
