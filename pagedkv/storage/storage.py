"""The K/V bytes of a whole model: one pool per layer, made together, written, copied and given back together.

It owns the tensors. It does not own whose slot is whose, nor the order of writing and copying inside a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.checks import integer, integers, shown
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, PoolAllocationError
from pagedkv.plan import Int32Array
from pagedkv.storage.memory import physical_memory
from pagedkv.storage.pool import LayerPool, check_geometry
from pagedkv.storage.spec import LayerSpec
from pagedkv.storage.state import StateStorage

BlockIds = Tensor | Sequence[int] | npt.NDArray[np.int32] | npt.NDArray[np.int64]


class KVStorage:
    """Zero-filled pools for every layer of a model.

    Args:
        layers: one geometry per layer, in model order; their groups are 0, 1, ... without a hole, but that the first may have no layers.
        num_blocks: blocks per layer including the null block 0: one number, or one per layer group.
        block_size: tokens in one block.
        dtype: floating dtype of K and V.
        device: where the pools live.
        state: recurrent state that goes with them; closed with them.

    Attributes:
        state: as given.

    Raises:
        ConfigError: no layers and no state, a hole in the groups, or a size out of range.
        PoolAllocationError: the device refused the memory. Nothing is kept.

    Cost: ``nbytes`` of memory, written once.

    >>> storage = KVStorage([LayerSpec(2, 8, 8)], num_blocks=4, block_size=16, dtype=torch.float32, device="cpu")
    >>> storage.nbytes, storage.layers[0].key.shape
    (8192, torch.Size([4, 2, 16, 8]))
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        num_blocks: int | Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        state: StateStorage | None = None,
    ) -> None:
        if not isinstance(layers, Sequence) or not all(isinstance(layer, LayerSpec) for layer in layers):
            raise ConfigError(f"layers is {shown(layers)}: it must be a list of LayerSpec")
        if not layers and state is None:
            raise ConfigError("layers is empty: a storage holds at least one layer, or recurrent state")
        groups = sorted({0, *(layer.group for layer in layers)})  # without a layer, blocks only count positions
        if groups != list(range(len(groups))):
            raise ConfigError(f"the layers' groups are {groups}: they are counted 0, 1, ... without a hole")
        counts = tuple(num_blocks) if isinstance(num_blocks, Sequence) and not isinstance(num_blocks, str) else (num_blocks,) * len(groups)
        if len(counts) != len(groups):
            raise ConfigError(f"num_blocks has {len(counts)} entries for {len(groups)} layer groups")
        for count in counts:
            check_geometry(count, block_size=block_size, dtype=dtype)
        self.num_blocks = counts
        self.block_size = block_size
        self.dtype = dtype
        self.device = as_device(device)
        self.state = state
        self.nbytes = sum(counts[layer.group] * block_size * layer.nbytes_per_token(dtype) for layer in layers)
        self._pools: tuple[LayerPool, ...] = self._allocate(layers)
        self._closed = False

    def _allocate(self, layers: Sequence[LayerSpec]) -> tuple[LayerPool, ...]:
        size = f"{self.nbytes:,} bytes: {len(layers)} layers, {self.num_blocks} blocks of {self.block_size} tokens in {self.dtype}"
        # An operating system that overcommits would grant each layer and kill the process when the sum is touched.
        physical = physical_memory() if self.device.type == "cpu" else None
        if physical is not None and self.nbytes > physical:
            raise PoolAllocationError(f"the pools need {size}; this machine has {physical:,} bytes. Use fewer num_blocks")
        pools: list[LayerPool] = []
        try:
            for layer in layers:
                blocks = self.num_blocks[layer.group]
                pools.append(LayerPool(layer, num_blocks=blocks, block_size=self.block_size, dtype=self.dtype, device=self.device))
        except (RuntimeError, MemoryError) as error:
            taken = sum(pool.nbytes for pool in pools)
            pools.clear()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PoolAllocationError(
                f"the pools need {size}; {self.device} refused after {taken:,} bytes ({reason}). Use fewer num_blocks"
            ) from error
        return tuple(pools)

    @property
    def layers(self) -> tuple[LayerPool, ...]:
        """The pools, one per layer in model order. Raises ``ClosedError`` after ``close()``."""
        if self._closed:
            raise ClosedError("the storage is closed, its pools were given back")
        return self._pools

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store the K and V of ``T`` tokens of one layer.

        Args:
            layer: index of the layer.
            key: ``[T, Hkv, Dk]`` in the storage's dtype.
            value: ``[T, Hkv, Dv]`` likewise.
            slots: ``[T]`` int64 ``block_id * block_size + offset``; none lies in the null block.

        Raises:
            InvalidRequestError: no such layer, or shapes, dtypes or slots are wrong; nothing was written.

        Cost: two indexed assignments, and the range check, which waits for the device. A backend's ``write`` inside a
        step uses slots that were checked on the host instead.
        """
        pool = self._pool(layer)
        for name, tensor in (("key", key), ("value", value), ("slots", slots)):
            if not isinstance(tensor, Tensor):
                raise InvalidRequestError(f"{name} is {shown(tensor)}: it must be a tensor")
        if slots.dtype != torch.int64 or slots.ndim != 1:
            raise InvalidRequestError(f"slots are {slots.dtype} {list(slots.shape)}: a flat int64 tensor is needed")
        if slots.numel():
            low, high = (int(bound) for bound in torch.aminmax(slots))
            if low < self.block_size or high >= pool.num_blocks * self.block_size:
                allowed = f"[{self.block_size}, {pool.num_blocks * self.block_size})"
                raise InvalidRequestError(f"slots reach from {low} to {high}: {allowed} may be written, the null block never")
        blocks = slots.div(self.block_size, rounding_mode="floor")
        pool.write(key, value, blocks=blocks, offsets=slots - blocks * self.block_size)

    def copy_blocks(self, copies: Sequence[Int32Array]) -> None:
        """Copy blocks in every layer of each group, before a step writes anything.

        Args:
            copies: per layer group ``[C, 2]`` ``(source, target)`` block ids; targets do not repeat.

        Raises:
            InvalidRequestError: another number of groups, an id out of range, the null block, or a repeated target.
                Nothing was copied.

        Cost: two row copies of each block and layer; nothing at all for an empty list.
        """
        if not isinstance(copies, Sequence):
            raise InvalidRequestError(f"copies is {shown(copies)}: it must be a list of [C, 2] arrays, one for each layer group")
        arrays = [integers(f"copies of group {group}", pairs, ndim=2) for group, pairs in enumerate(copies)]
        if len(copies) != len(self.num_blocks):
            raise InvalidRequestError(f"copies has {len(copies)} entries for {len(self.num_blocks)} layer groups")
        moves: dict[int, tuple[Tensor, Tensor]] = {}
        for group, pairs in enumerate(arrays):
            if pairs.shape[1] != 2:
                raise InvalidRequestError(f"copies of group {group} are {list(pairs.shape)}: [C, 2] is needed")
            if not len(pairs):
                continue
            if len(np.unique(pairs[:, 1])) != len(pairs):
                raise InvalidRequestError(f"copies of group {group} write a block twice: {pairs[:, 1].tolist()}")
            ids = self._block_ids(pairs.reshape(-1), group=group).view(-1, 2)
            moves[group] = (ids[:, 0].contiguous(), ids[:, 1].contiguous())
        for pool in self.layers:
            if pool.spec.group in moves:
                sources, targets = moves[pool.spec.group]
                pool.copy_blocks(sources, targets)

    def gather(self, layer: int, block_ids: BlockIds, length: int) -> tuple[Tensor, Tensor]:
        """Copy one sequence's K and V out of one layer.

        Args:
            layer: index of the layer.
            block_ids: ``[m]`` the sequence's block table, ``m * block_size >= length``.
            length: tokens wanted, from position 0.

        Returns:
            K ``[Hkv, length, Dk]`` and V ``[Hkv, length, Dv]``, fresh tensors.

        Raises:
            InvalidRequestError: no such layer, an id out of range, or fewer blocks than ``length`` needs.
        """
        pool = self._pool(layer)
        ids = self._block_ids(block_ids, group=pool.spec.group, null_too=True)
        integer("length", length, least=0, error=InvalidRequestError)
        if not 0 <= length <= len(ids) * self.block_size:
            raise InvalidRequestError(f"length {length}: {len(ids)} blocks hold 0 to {len(ids) * self.block_size} tokens")
        return pool.gather(ids, length)

    def fill(self, block_ids: BlockIds, value: float, *, group: int = 0) -> None:
        """Set whole blocks to one value in every layer of a group: zero them, or poison them in a test.

        Raises:
            InvalidRequestError: no such group, an id out of range, the null block, or a value that is no number.
        """
        integer("group", group, least=0, most=len(self.num_blocks) - 1, error=InvalidRequestError)
        if not isinstance(value, int | float):
            raise InvalidRequestError(f"value is {shown(value)}: it must be a number, which may be NaN or infinite")
        ids = self._block_ids(block_ids, group=group)
        for pool in self.layers:
            if pool.spec.group == group:
                pool.fill(ids, value)

    def close(self) -> None:
        """Give the memory back. Pools that a caller kept stay alive until the caller drops them. May be called again."""
        self._closed = True
        self._pools = ()
        if self.state is not None:
            self.state.close()

    def _pool(self, layer: int) -> LayerPool:
        pools = self.layers
        return pools[integer("layer", layer, least=0, most=len(pools) - 1, error=InvalidRequestError)]

    def _block_ids(self, block_ids: BlockIds, *, group: int, null_too: bool = False) -> Tensor:
        host = integers("block ids", block_ids.cpu() if isinstance(block_ids, Tensor) else block_ids)
        low, high = 0 if null_too else 1, self.num_blocks[group]
        if host.size and (host.min() < low or host.max() >= high):
            raise InvalidRequestError(f"block ids reach from {host.min()} to {host.max()}: group {group} allows [{low}, {high})")
        return torch.tensor(host.astype(np.int64), device=self.device)


def as_device(device: torch.device | str) -> torch.device:
    """A device by its name; raises ``ConfigError`` for what names none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {shown(device)}: it must name one that torch knows, such as 'cpu' or 'cuda'") from error
