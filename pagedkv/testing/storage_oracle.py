"""The token oracle over real storage: stamps are stored as K and V through a ``KVStorage`` and gathered from it.

So a manager's programs try the storage as well: what it writes where, what it copies, and what it gives back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.storage import KVStorage, LayerSpec
from pagedkv.testing.token_oracle import EMPTY, TokenOracle

_HEADS, _KEY_DIM = 2, 2
_VALUE_DIMS = (2, 1)  # of the two layers in each group: pools lay out equal and unequal widths in different ways
_NUMBERS = 8  # different numbers for one stamp, at most


class StorageOracle(TokenOracle):
    """A ``TokenOracle`` whose slots are those of a storage with two layers in each group.

    Every element of K and V is another number that follows from the stamp, exact in float64, so that a head, a dimension or a layer that is
    left out shows as much as a slot.

    Args:
        num_blocks: blocks of each layer group.
        block_size: tokens in a block.

    Attributes:
        storage: the subject.
    """

    def __init__(self, num_blocks: Sequence[int], block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        layers = [LayerSpec(_HEADS, _KEY_DIM, width, group=group) for group in range(len(num_blocks)) for width in _VALUE_DIMS]
        self.storage = KVStorage(layers, num_blocks=list(num_blocks), block_size=block_size, dtype=torch.float64, device="cpu")

    def write(self, slot_mapping: Sequence[Sequence[int]] | npt.NDArray[np.int64], stamps: Sequence[int]) -> None:
        """Store tokens in all layers; arguments as for ``TokenOracle.write``."""
        for layer, pool in enumerate(self.storage.layers):
            slots = torch.as_tensor(slot_mapping[pool.spec.group], dtype=torch.int64)
            self.storage.write(layer, *_keys_and_values(torch.tensor(stamps), pool.spec.value_dim), slots)

    def copy_blocks(self, copies: Sequence[npt.NDArray[np.int32]]) -> None:
        """Copy blocks in all layers."""
        self.storage.copy_blocks(copies)

    def poison(self, group: int, block_ids: Iterable[int]) -> None:
        """Fill blocks that nobody may read any more with NaN."""
        self.storage.fill(list(block_ids), float("nan"), group=group)

    def _read(self, group: int, block_table: Sequence[int], length: int) -> list[int]:
        """The stamps that all layers hold; a slot whose numbers are not all of one stamp counts as empty."""
        layers = [layer for layer, pool in enumerate(self.storage.layers) if pool.spec.group == group]
        first, *others = [_stamps(*self.storage.gather(layer, block_table, length)) for layer in layers]
        return [stamp if all(stamp == other[place] for other in others) else EMPTY for place, stamp in enumerate(first)]


def _keys_and_values(stamps: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """K ``[T, H, Dk]`` and V ``[T, H, Dv]`` for ``[T]`` stamps."""
    numbers = stamps.double()[:, None] * _NUMBERS + torch.arange(_HEADS * (_KEY_DIM + value_dim))
    keys = _HEADS * _KEY_DIM
    return numbers[:, :keys].reshape(-1, _HEADS, _KEY_DIM), numbers[:, keys:].reshape(-1, _HEADS, value_dim)


def _stamps(key: Tensor, value: Tensor) -> list[int]:
    """The stamps of what was gathered, K ``[H, T, Dk]`` and V ``[H, T, Dv]``; empty where they do not belong together."""
    stamps = (key[0, :, 0].nan_to_num(EMPTY) / _NUMBERS).long()
    expected = _keys_and_values(stamps, value.shape[2])
    whole = [(found.transpose(0, 1) == right).flatten(1).all(dim=1) for found, right in zip((key, value), expected, strict=True)]
    read: list[int] = torch.where(whole[0] & whole[1], stamps, EMPTY).tolist()
    return read
