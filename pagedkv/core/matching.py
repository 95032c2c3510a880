"""The longest cached prefix that every layer group can serve. Owns no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedkv.core.layer_group import Group, LayerGroup
from pagedkv.core.window import Window
from pagedkv.plan import Int32Array


@dataclass(frozen=True, slots=True)
class Match:
    """A cached prefix: how many tokens of it, and its blocks in each layer group; of a windowed one, those inside its window at the end."""

    num_tokens: int
    block_ids: tuple[tuple[int, ...], ...]


def find_prefix(groups: Sequence[Group], root: int, token_ids: Int32Array, *, block_size: int) -> Match:
    """The longest prefix, in whole blocks, whose tokens are found in every group that keeps everything, and of which every windowed group
    still has what the next position sees.

    Cost: O(blocks matched) for each group.
    """
    chains = {index: group.cache.match(root, token_ids) for index, group in enumerate(groups) if isinstance(group, LayerGroup)}
    length = min(map(len, chains.values()))
    if len(chains) < len(groups):
        leading = chains[0][:length]
        found = [(group.window, group.cache.find_all(leading)) for group in groups if not isinstance(group, LayerGroup)]
        length = servable_blocks(length, found, block_size)
        windowed = iter(found)
    block_ids = []
    for index in range(len(groups)):
        if index in chains:
            block_ids.append(tuple(chains[index][:length]))
        else:
            window, blocks = next(windowed)
            block_ids.append(tuple(blocks[window.num_dead_blocks(length, block_size) : length]))
    return Match(length * block_size, tuple(block_ids))


def servable_blocks(length: int, found: Sequence[tuple[Window, Sequence[int]]], block_size: int) -> int:
    """The longest prefix of at most ``length`` blocks that every window can serve.

    Args:
        length: blocks of the prefix that is found.
        found: for each windowed group its window, and its ``length`` blocks; the null block where one is not cached any more.
        block_size: tokens in a block.

    Cost: each block is looked at once for each group: windows never reach further back for a shorter prefix.
    """
    present_from = [length] * len(found)  # from here on up to the length, nothing is missing
    before = -1
    while length != before:
        before = length
        for place, (window, blocks) in enumerate(found):
            first, needed = min(present_from[place], length), window.num_dead_blocks(length, block_size)
            while first > needed:
                first -= 1
                if not blocks[first]:  # every longer prefix needs it as well, as far as was asked for
                    length, needed = first, window.num_dead_blocks(first, block_size)
            present_from[place] = first
    return length
