"""How large a pool should be: what the submitted work can use at once, and never more than a share of the free memory.

Owns no state.
"""

from __future__ import annotations

from collections.abc import Iterable

from pagedkv.checks import integer
from pagedkv.errors import ConfigError

_MOST_BLOCKS = 2**31 - 1  # block ids are int32


def blocks_for_work(lengths: Iterable[tuple[int, int]], *, block_size: int, max_running: int, watermark: float) -> int:
    """Blocks that requests can use at once, the null block included.

    Args:
        lengths: per sequence ``(tokens at its longest, how many such sequences)``.
        block_size: tokens in a block.
        max_running: sequences running at once; the longest ones are counted.
        watermark: share of the pool that admission keeps free.
    """
    each = sorted((-(-tokens // block_size) for tokens, count in lengths for _ in range(min(count, max_running))), reverse=True)
    needed = sum(each[:max_running])
    return int(needed / (1 - watermark)) + 3  # the null block, and the rounding of the watermark


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
