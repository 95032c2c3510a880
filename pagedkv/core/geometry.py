"""What a manager is asked to be made of, as layer groups; refused by name before anything of that size is made. Owns no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pagedkv import checks
from pagedkv.core.eviction import EvictionPolicy
from pagedkv.core.layer_group import Group, LayerGroup, WindowedGroup
from pagedkv.core.window import Window
from pagedkv.errors import ConfigError

MAX_BLOCKS = 2**31 - 1  # block ids are int32


def parse_groups(num_blocks: object, windows: object) -> tuple[list[int], list[Window | None]]:
    """Blocks and window of each layer group.

    Args:
        num_blocks: one number, or one for each group.
        windows: None, or one for each group: a ``Window`` or None.

    Raises:
        ConfigError: a number out of range, another number of windows, or a first group with one.
    """
    several = _as_list(num_blocks)
    if several is not None and not several:
        raise ConfigError("num_blocks is empty: it must be a number, or one for each layer group")
    if windows is None:
        given: list[object] = [None] * (1 if several is None else len(several))
    else:
        given = _as_list(windows) or []
        if not given or (several is not None and len(several) != len(given)):
            raise ConfigError(f"windows is {checks.shown(windows)}: it must hold a Window or None for each layer group")
    for window in given:
        if window is not None and not isinstance(window, Window):
            raise ConfigError(f"windows holds {checks.shown(window)}: each must be a Window or None")
    if given[0] is not None:
        raise ConfigError(
            "the first layer group has a window: prefixes are found by a group that keeps everything, which has to come first "
            "(it may have no layers, and its blocks then cost no bytes of K/V)"
        )
    sizes = [checks.integer("num_blocks", size, least=2, most=MAX_BLOCKS) for size in several or [num_blocks] * len(given)]
    return sizes, [window for window in given if window is None or isinstance(window, Window)]


def make_groups(
    sizes: Sequence[int], windows: Sequence[Window | None], *, block_size: int, policy: Callable[[int], EvictionPolicy] | None
) -> list[Group]:
    """Fresh groups; the windowed ones follow the first."""
    leader = LayerGroup(sizes[0], block_size=block_size, policy=policy(sizes[0]) if policy else None)
    groups: list[Group] = [leader]
    for size, window in zip(sizes[1:], windows[1:], strict=True):
        order = policy(size) if policy else None
        if window is None:
            groups.append(LayerGroup(size, block_size=block_size, policy=order))
        else:
            groups.append(WindowedGroup(size, window=window, leader=leader, policy=order))
    return groups


def _as_list(value: object) -> list[object] | None:
    """Several of something as a list; None for a single one."""
    many = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    return list(value) if many else None  # type: ignore[call-overload]  # what was just found out
