"""A forward whose layers get K and V back as tensors, laid out in transformers' columns, for the model's own attention and masks.

Owns the index tensors of one forward. Works for every model that keeps K and V in the cache that it is given, since to the
model it is transformers' own cache, with zeros where that one holds the K and V of padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError, UnsupportedModelError
from pagedkv.generation.growth import Growth
from pagedkv.plan import Int64Array
from pagedkv.storage import LayerPool


class ColumnReader:
    """Gathers all columns of a batch's rows out of a layer's pool.

    Args:
        growth: the rows' sequences and stored columns.
        manager: whose tables are read; they must not change as long as this is used.
        device: of the pools.
    """

    def __init__(self, growth: Growth, manager: KVCacheManager, device: torch.device) -> None:
        self._owner = growth.owner
        self._length = growth.num_columns
        self._size = manager.block_size
        self._tables = self._block_tables(growth, manager)
        self._places = self._column_places(growth, device)
        self._rows: dict[tuple[int, int, int], Tensor] = {}

    def read(self, pool: LayerPool) -> tuple[Tensor, Tensor]:
        """K ``[R, Hkv, C, Dk]`` and V ``[R, Hkv, C, Dv]``, zeros for padding and behind a window. Cost: one copy of both."""
        spec = pool.spec
        if self._places is not None:
            blocks, offsets = self._places
            return pool.gather_slots(blocks[spec.group], offsets)
        kind = (spec.group, spec.num_kv_heads, pool.rows_per_block)
        rows = self._rows.get(kind)
        if rows is None:
            heads = np.arange(spec.num_kv_heads)[:, None]
            numbers = self._tables[spec.group, self._owner][:, None, :] * pool.rows_per_block + heads
            rows = self._rows[kind] = torch.from_numpy(numbers.reshape(-1)).to(pool.device)
        key = pool.key_rows.index_select(0, rows).view(len(self._owner), spec.num_kv_heads, -1, spec.key_dim)
        value = pool.value_rows.index_select(0, rows).view(len(self._owner), spec.num_kv_heads, -1, spec.value_dim)
        return key[:, :, : self._length], value[:, :, : self._length]

    def _block_tables(self, growth: Growth, manager: KVCacheManager) -> Int64Array:
        """``[G, U, M]`` block ids of each sequence; the null block where there is none."""
        opened = growth.seqs.nonzero()[0]
        columns = max(1, -(-int(growth.lengths.max()) // self._size))
        tables = np.zeros((manager.num_groups, len(growth.seqs), columns), dtype=np.int64)
        if len(opened):
            tables[:, opened] = manager.table.block_tables[:, manager.rows_of(growth.seqs[opened]), :columns]
        return tables

    def _column_places(self, growth: Growth, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Block ``[G, R, C]`` and offset ``[R, C]`` of every column, the null block for padding; None when rows are whole blocks."""
        stored = growth.stored
        if stored.all():
            return None
        position = np.maximum(np.cumsum(stored, axis=1) - 1, 0)
        blocks = np.where(stored, np.take_along_axis(self._tables, (position // self._size)[None], axis=2), 0)
        offsets = np.where(stored, position % self._size, 0)
        return torch.from_numpy(blocks[:, self._owner]).to(device), torch.from_numpy(offsets[self._owner]).to(device)


class DenseForward:
    """Writes what layers store, and gathers what they read.

    Args:
        growth: the reserved columns.
        manager: whose tables are read; they must not change meanwhile.
        pools: one for each layer that stores K and V.
        index: from transformers' layer index to the place in ``pools``.
        has_past: whether there are columns from before.

    Attributes:
        arguments: of the model in place of the caller's: None, it gets those.
    """

    def __init__(
        self, growth: Growth, manager: KVCacheManager, pools: Sequence[LayerPool], index: Mapping[int, int], *, has_past: bool
    ) -> None:
        self._pools = pools
        self._index = index
        device = pools[0].device
        slots = np.zeros((manager.num_groups, 0), dtype=np.int64) if growth.extension is None else growth.extension.slot_mapping
        self._blocks, self._offsets, self._rows, self._columns = (
            torch.from_numpy(each).to(device) for each in (*np.divmod(slots, manager.block_size), growth.token_rows, growth.token_columns)
        )
        self._reader = ColumnReader(growth, manager, device) if has_past else None
        self._written: set[int] = set()
        self.arguments: dict[str, Any] | None = None

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store the new K and V of a layer and return all of its columns.

        Args:
            key: ``[R, Hkv, Q, Dk]``.
            value: ``[R, Hkv, Q, Dv]``.
            layer: transformers' index.

        Returns:
            K ``[R, Hkv, C + Q, Dk]`` and V ``[R, Hkv, C + Q, Dv]``: without a past the same two tensors.

        Raises:
            InvalidRequestError: a layer that stored nothing when the model was tried, or stores twice.

        Cost: with a past, one copy of all columns of the layer, as transformers' cache makes.
        """
        place = self._index.get(layer)
        if place is None or layer in self._written:
            problem = "twice in one forward" if layer in self._written else "and did not when the model was tried"
            raise InvalidRequestError(f"layer {layer} stores K and V {problem}")
        self._written.add(layer)
        pool = self._pools[place]
        if len(self._rows):
            new_key, new_value = key[self._rows, :, self._columns], value[self._rows, :, self._columns]
            group = pool.spec.group
            pool.write(new_key, new_value, blocks=self._blocks[group], offsets=self._offsets[group])
        return (key, value) if self._reader is None else self._reader.read(pool)

    def finish(self, output: Any) -> Any:
        """The model's output as it is.

        Raises:
            UnsupportedModelError: not every layer was stored.
        """
        missing = len(self._index) - len(self._written)
        if missing:
            raise UnsupportedModelError(f"{missing} of {len(self._index)} layers that store K and V stored none in this forward")
        return output

    def abandon(self) -> None:
        """Nothing was changed outside."""
