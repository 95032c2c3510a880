"""The K and V of cross attention: stored once for each different encoder output of a batch, read by every forward of the decoder.

Owns the blocks and bytes of cross attention, which nothing grows: a table of its own beside that of self attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.core import CheckLevel, KVCacheManager
from pagedkv.errors import InvalidRequestError
from pagedkv.generation.dense import ColumnReader, DenseForward
from pagedkv.generation.growth import Growth, NewColumns
from pagedkv.generation.rows import Rows
from pagedkv.plan import Int64Array
from pagedkv.storage import KVStorage, LayerSpec


class CrossPool:
    """Blocks for the cross attention of one model.

    Args:
        layers: geometry of each layer.
        layer_ids: transformers' index of each of them.
        num_blocks, block_size, max_num_seqs, dtype, device, check: as for the pool of self attention.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        layer_ids: Sequence[int],
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
        check: CheckLevel,
    ) -> None:
        self.index = {layer: place for place, layer in enumerate(layer_ids)}
        # Nothing is found by its tokens here: what a block holds follows from the whole input.
        self.manager = KVCacheManager(
            num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, enable_prefix_caching=False, check=check
        )
        self.storage = KVStorage(layers, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device)

    @property
    def num_blocks_in_use(self) -> int:
        """Blocks that caches hold now."""
        return self.manager.num_usable_blocks - self.manager.num_available_blocks


class CrossAttention:
    """The cross attention of one batch; follows the rows of its self attention.

    Args:
        pool: has the blocks.

    Attributes:
        is_updated: by layer, whether its K and V are stored; the model writes it.
    """

    def __init__(self, pool: CrossPool) -> None:
        self._pool = pool
        self._rows = Rows(pool.manager, "", pool.storage.copy_blocks, private=False)
        self._growth: Growth | None = None
        self._forward: DenseForward | None = None
        self._reader: ColumnReader | None = None
        self.is_updated: dict[int, bool] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored yet."""
        return not self._rows.num_rows

    @property
    def num_columns(self) -> int:
        """Columns of the encoder's input, padding included."""
        return self._rows.num_columns

    @property
    def num_blocks(self) -> int:
        """Blocks that the batch holds, each counted once."""
        return self._rows.num_blocks

    def begin(self, arguments: Mapping[str, Any], num_rows: int) -> Int64Array:
        """Reserve blocks for the encoder's output of the first forward.

        Returns:
            ``[R]`` int64, rows of one number have the same input.

        Raises:
            InvalidRequestError: neither tokens nor output of the encoder, or of other rows.
            OutOfBlocksError: fewer blocks than needed.
        """
        source = _encoder_source(arguments)
        if source is None or source.shape[0] != num_rows:
            raise InvalidRequestError(f"{num_rows} rows of the decoder need as many of input_ids or encoder_outputs in their first forward")
        mask = arguments.get("attention_mask")
        seen = torch.ones(source.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        same = (source[1:] == source[:-1]).flatten(1).all(dim=1).cpu() & (seen[1:] == seen[:-1]).all(dim=1).cpu()
        owner = np.concatenate([[0], np.cumsum(~same.numpy())])
        columns = np.broadcast_to(owner[:, None], source.shape[:2])
        self._growth = self._rows.grow(NewColumns(seen.cpu().numpy(), columns, may_skip=False))
        pool = self._pool
        self._forward = DenseForward(self._growth, pool.manager, pool.storage.layers, pool.index, has_past=False)
        return self._growth.owner

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store K and V ``[R, Hkv, S, D]`` of a layer; returns the same two."""
        if self._forward is None:
            raise InvalidRequestError(f"layer {layer} stores K and V of cross attention outside of the first forward of its batch")
        return self._forward.update(key, value, layer)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[R, Hkv, S, D]`` of a layer, zeros where the encoder's input is padding."""
        if self._reader is None:
            self._reader = ColumnReader(self._rows.snapshot(), self._pool.manager, self._pool.storage.device)
        return self._reader.read(self._pool.storage.layers[self._pool.index[layer]])

    def commit(self) -> None:
        """The first forward is through."""
        if self._growth is not None and self._forward is not None:
            self._forward.finish(None)
            self._rows.commit(self._growth)
            self._growth = self._forward = None

    def select(self, indices: Int64Array) -> None:
        """Make row ``i`` what row ``indices[i]`` was."""
        self._rows.select(indices)
        self._reader = None

    def crop(self, num_columns: int) -> None:
        """Nothing: the input stays."""

    def fork(self) -> CrossAttention:
        """The same once more, over the same blocks."""
        other = CrossAttention(self._pool)
        other._rows, other.is_updated = self._rows.fork(), dict(self.is_updated)
        return other

    def reset(self) -> None:
        """Give every block back."""
        if self._growth is not None:
            self._rows.cancel(self._growth)
        self._rows.release()
        self._growth = self._forward = self._reader = None
        self.is_updated.clear()


def _encoder_source(arguments: Mapping[str, Any]) -> Tensor | None:
    outputs = arguments.get("encoder_outputs")
    if outputs is None:
        tokens = arguments.get("input_ids")
        return tokens if isinstance(tokens, Tensor) else None
    source = outputs[0] if isinstance(outputs, tuple) else outputs.last_hidden_state
    return source if isinstance(source, Tensor) else None
