"""Recurrent state: what layers carry from token to token beside K/V, a slot for each row of the sequence table.

Owns the tensors, and how many tokens have gone into each row's. It does not own whose row is whose, nor what a layer makes of its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedkv.checks import integer, shown
from pagedkv.errors import ClosedError, ConfigError, InvariantError, PoolAllocationError
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.storage.memory import physical_memory


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor of one layer's state, for one sequence.

    Attributes:
        name: of the tensor, once in a model.
        shape: its shape, without rows.
        dtype: its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes for one sequence."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class StateStorage:
    """The state of all rows. A step reads it, works on the copy, and stages what came out; ``commit`` takes that in.

    So a step that fails leaves every state as it was before it.

    Args:
        specs: the tensors, at least one.
        num_rows: rows of the sequence table.
        device: where they live.

    Attributes:
        nbytes: bytes of all tensors.
        lens: ``[num_rows]`` int32 tokens that have gone into each row's state; to read.

    Raises:
        ConfigError: no tensor, two of one name, or no row.
        PoolAllocationError: the device refused the memory; nothing was kept.
    """

    def __init__(self, specs: Sequence[StateSpec], *, num_rows: int, device: torch.device | str) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"specs are {shown(names)}: state has at least one tensor, each of a name of its own")
        self.num_rows = integer("num_rows", num_rows, least=1, most=2**31 - 1)
        self.specs = tuple(specs)
        self.nbytes = num_rows * sum(spec.nbytes for spec in specs)
        self.lens: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self._tensors = self._allocate(torch.device(device))
        self._staged: list[tuple[Int64Array, Int32Array, Mapping[str, Tensor]]] = []

    def _allocate(self, device: torch.device) -> dict[str, Tensor]:
        size = f"the recurrent state of {self.num_rows} sequences needs {self.nbytes:,} bytes"
        physical = physical_memory() if device.type == "cpu" else None
        if physical is not None and self.nbytes > physical:  # which the system would grant, and kill the process when it is touched
            raise PoolAllocationError(f"{size}; this machine has {physical:,} bytes. Use a lower max_num_seqs")
        tensors: dict[str, Tensor] = {}
        try:
            with torch.inference_mode(False):  # else what was made in inference mode could not be written outside of it
                for spec in self.specs:
                    tensors[spec.name] = torch.zeros(self.num_rows, *spec.shape, dtype=spec.dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            tensors.clear()
            raise PoolAllocationError(f"{size}; {device} refused ({error}). Use a lower max_num_seqs") from error
        return tensors

    def read(self, rows: Int64Array, starts: Int32Array) -> dict[str, Tensor]:
        """Copies ``[R, *shape]`` of all tensors of some rows.

        Args:
            rows: ``[R]``.
            starts: ``[R]`` tokens that must have gone into each.

        Raises:
            InvariantError: a row's state is that of another position.
        """
        self.check(rows, starts)
        index = self._index(rows)
        return {name: tensor.index_select(0, index) for name, tensor in self._live().items()}

    def check(self, rows: Int64Array, starts: Int32Array) -> None:
        """Raise ``InvariantError`` unless exactly so many tokens have gone into the rows' states; none counts as any."""
        wrong = np.flatnonzero((self.lens[rows] != starts) & (starts > 0))
        if len(wrong):
            row, start = int(rows[wrong[0]]), int(starts[wrong[0]])
            raise InvariantError(f"row {row} goes on from {start} tokens, but {int(self.lens[row])} went into its recurrent state")

    def begin(self) -> None:
        """Drop what is staged: the step that it came from failed."""
        self._staged.clear()

    def stage(self, rows: Int64Array, lens: Int32Array, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a step made of some rows' states until ``commit``.

        Args:
            rows: ``[R]`` rows, none of which is staged already.
            lens: ``[R]`` tokens that have gone into each.
            tensors: ``[R, *shape]`` for each of ``specs``; not to be written to any more.

        Raises:
            InvariantError: a tensor is missing, or of another shape or dtype.
        """
        for spec in self.specs:
            tensor, needed = tensors.get(spec.name), [len(rows), *spec.shape]
            if tensor is None or list(tensor.shape) != needed or tensor.dtype != spec.dtype:
                got = "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
                raise InvariantError(f"state {spec.name} is {got}: {needed} of {spec.dtype} is needed")
        self._staged.append((rows, lens, tensors))

    def commit(self) -> None:
        """Take in what is staged: the step has been booked. Cost: a copy of each staged tensor."""
        live, staged = self._live(), self._staged
        self._staged = []
        for rows, lens, tensors in staged:
            index = self._index(rows)
            for name, tensor in live.items():
                tensor.index_copy_(0, index, tensors[name])
            self.lens[rows] = lens

    def follow(self, row: int, source: int | None) -> None:
        """Go along with a sequence that got a row.

        Args:
            row: the row.
            source: the row of the sequence that it was forked from, whose state it gets (maybe the same); None for one that begins,
                whatever the row held.
        """
        if source is None:
            self.lens[row] = 0
        elif source != row:
            for tensor in self._live().values():
                tensor[row].copy_(tensor[source])
            self.lens[row] = self.lens[source]

    def fill(self, rows: Int64Array, value: float) -> None:
        """Set the whole state of some rows to one value: poison them in a test."""
        index = self._index(rows)
        for tensor in self._live().values():
            tensor.index_fill_(0, index, value)

    def close(self) -> None:
        """Give the memory back; may be called again."""
        self._tensors = {}
        self._staged.clear()

    def _live(self) -> dict[str, Tensor]:
        if not self._tensors:
            raise ClosedError("the state storage is closed, its tensors were given back")
        return self._tensors

    def _index(self, rows: Int64Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(next(iter(self._live().values())).device)
