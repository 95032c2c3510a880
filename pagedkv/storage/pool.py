"""One layer's blocks of K and V: the buffer, its strided views, and what is done to it.

It owns the tensor. It does not own which block belongs to whom, nor when anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.checks import integer, shown
from pagedkv.errors import ConfigError, InvalidRequestError
from pagedkv.storage.memory import zeros
from pagedkv.storage.spec import LayerSpec


class LayerPool:
    """The blocks of one layer, K and V as views over one zero-filled buffer.

    Equal widths are laid out ``[N, 2, Hkv, B, D]``, unequal ones ``[N, Hkv, B * (Dk + Dv)]``: either way one block is
    one contiguous row of the buffer, so that copying, filling and moving a block is one row copy, and one head of one
    block is contiguous, so that a kernel streams it. Block 0 is the null block: it holds zeros and is never written.

    Args:
        spec: geometry of the layer.
        num_blocks: blocks including the null block, at least 2.
        block_size: tokens in one block, at least 1.
        dtype: floating dtype of K and V.
        device: where the buffer lives.

    Attributes:
        key: ``[N, Hkv, B, Dk]`` strided view.
        value: ``[N, Hkv, B, Dv]`` strided view.
        key_rows: 2-D view; row ``block * rows_per_block + head``, ``[B * Dk]``, is one head of one block of K.
        value_rows: the same for V, ``[B * Dv]``, by the same row numbers.
        rows_per_block: distance in rows from one block to the next.
        nbytes: bytes of the buffer.

    Raises:
        ConfigError: a size is out of range, or the dtype is not a floating one.
        RuntimeError: the device refused the memory (``KVStorage`` turns this into ``PoolAllocationError``).
    """

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_key_slots",
        "_value_slots",
        "block_size",
        "device",
        "dtype",
        "key",
        "key_rows",
        "num_blocks",
        "rows_per_block",
        "spec",
        "value",
        "value_rows",
    )

    def __init__(self, spec: LayerSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        check_geometry(num_blocks, block_size=block_size, dtype=dtype)
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        heads, key_row, value_row = spec.num_kv_heads, block_size * spec.key_dim, block_size * spec.value_dim
        with torch.inference_mode(False):  # else a pool made in inference mode could not be written outside of it
            self._buffer = zeros(num_blocks, heads * (key_row + value_row), dtype=dtype, device=device)
        if key_row == value_row:
            rows = self._buffer.view(num_blocks * 2 * heads, key_row)
            self.rows_per_block = 2 * heads
            self.key_rows, self.value_rows = rows, rows[heads:]
            blocks = self._buffer.view(num_blocks, 2, heads, block_size, spec.key_dim)
            self.key, self.value = blocks[:, 0], blocks[:, 1]
        else:
            rows = self._buffer.view(num_blocks * heads, key_row + value_row)
            self.rows_per_block = heads
            self.key_rows, self.value_rows = rows[:, :key_row], rows[:, key_row:]
            self.key = self.key_rows.view(num_blocks, heads, block_size, spec.key_dim)
            self.value = self.value_rows.view(num_blocks, heads, block_size, spec.value_dim)
        # [N, B, Hkv, D]: indexed by (block, offset) these take a token's heads in one assignment.
        self._key_slots, self._value_slots = self.key.transpose(1, 2), self.value.transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.numel() * self.dtype.itemsize

    def write(self, key: Tensor, value: Tensor, *, blocks: Tensor, offsets: Tensor) -> None:
        """Store the K and V of ``T`` tokens.

        Args:
            key: ``[T, Hkv, Dk]`` in the pool's dtype and on its device, any strides.
            value: ``[T, Hkv, Dv]`` likewise.
            blocks: ``[T]`` int64 block ids, none of them 0.
            offsets: ``[T]`` int64 places inside the block, in ``[0, B)``.

        Raises:
            InvalidRequestError: shapes or dtypes differ from the pool's, or a gradient is wanted; nothing was written.

        Not checked here, because it would wait for the device: the range of ``blocks`` and ``offsets``. ``BatchBuilder``
        checks them on the host, once per step. Cost: two indexed assignments.
        """
        self.check_rows(key, value, num_tokens=blocks.shape[0])
        self._key_slots.index_put_((blocks, offsets), key)
        self._value_slots.index_put_((blocks, offsets), value)

    def check_rows(self, key: Tensor, value: Tensor, *, num_tokens: int) -> None:
        """Raise ``InvalidRequestError`` unless K ``[T, Hkv, Dk]`` and V ``[T, Hkv, Dv]`` of so many tokens can be stored here."""
        tokens, spec = num_tokens, self.spec
        if key.shape != (tokens, spec.num_kv_heads, spec.key_dim) or value.shape != (tokens, spec.num_kv_heads, spec.value_dim):
            raise InvalidRequestError(
                f"K {list(key.shape)} and V {list(value.shape)} do not fit {tokens} slots of {spec}: "
                f"[{tokens}, {spec.num_kv_heads}, {spec.key_dim}] and [{tokens}, {spec.num_kv_heads}, {spec.value_dim}] are needed"
            )
        if key.dtype != self.dtype or value.dtype != self.dtype:
            raise InvalidRequestError(f"K is {key.dtype} and V is {value.dtype}, the pool stores {self.dtype}")
        if key.requires_grad or value.requires_grad:
            raise InvalidRequestError(
                "K or V requires a gradient, and a cache is for inference: run the model under torch.inference_mode()"
            )

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks; every source is read before any target is written.

        Args:
            sources: ``[C]`` int64 block ids on the pool's device.
            targets: ``[C]`` int64 block ids, no repeats.
        """
        self._buffer.index_copy_(0, targets, self._buffer.index_select(0, sources))

    def gather(self, block_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copy the first ``length`` tokens of a table out of the pool.

        Args:
            block_ids: ``[m]`` int64 block ids on the pool's device, ``m * B >= length``.
            length: tokens wanted.

        Returns:
            K ``[Hkv, length, Dk]`` and V ``[Hkv, length, Dv]``, fresh tensors.
        """
        key = self.key.index_select(0, block_ids).transpose(0, 1).flatten(1, 2)[:, :length]
        value = self.value.index_select(0, block_ids).transpose(0, 1).flatten(1, 2)[:, :length]
        return key, value

    def gather_slots(self, blocks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Copy tokens out of the pool, wherever they lie.

        Args:
            blocks: ``[..., n]`` int64 block ids on the pool's device; 0 gives zeros.
            offsets: ``[..., n]`` int64 places inside the block, in ``[0, B)``.

        Returns:
            K ``[..., Hkv, n, Dk]`` and V ``[..., Hkv, n, Dv]``, fresh contiguous tensors.

        Not checked here, because it would wait for the device: the range of both.
        """
        heads = torch.arange(self.spec.num_kv_heads, device=self.device)[:, None]
        places = (blocks[..., None, :], heads, offsets[..., None, :])
        return self.key[places], self.value[places]

    def fill(self, block_ids: Tensor, value: float) -> None:
        """Set every element of some blocks, K and V, to one value."""
        self._buffer.index_fill_(0, block_ids, value)


def check_geometry(num_blocks: int, *, block_size: int, dtype: torch.dtype) -> None:
    """Raise ``ConfigError`` when no pool can have these sizes."""
    integer("num_blocks", num_blocks, least=2, most=2**31 - 1)  # the null block and one to hand out; ids are int32
    integer("block_size", block_size, least=1, most=2**31 - 1)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype is {shown(dtype)}: it must be a torch.dtype")
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype}: K and V are stored in a floating dtype")
