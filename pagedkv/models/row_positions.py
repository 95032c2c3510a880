"""Learned positions of a decoder that counts them from one number for the whole batch: read for each row at its own.

Owns the exchange of the numbers on their way into the table. Whether that is right, the self-check says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pagedkv.models.context import active_step
from pagedkv.models.stand_ins import forwards_changed


class RowPositions:
    """The tables of one model.

    Args:
        model: the model; modules that hold a table themselves are found, and nothing is changed.
        tables: what ``PositionTables`` saw.
    """

    def __init__(self, model: nn.Module, tables: Sequence[Tensor]) -> None:
        wanted = {id(table) for table in tables}
        held = ((module, tensor) for module in model.modules() for tensor in (*module._parameters.values(), *module._buffers.values()))
        self._tables = wanted
        self._modules = list(dict.fromkeys(module for module, tensor in held if id(tensor) in wanted))

    @contextmanager
    def given(self, positions: Tensor, past_len: int) -> Iterator[None]:
        """For a ``with`` block, have a forward that runs in this thread read its tables at these positions.

        Args:
            positions: ``[R, Q]`` int64.
            past_len: what the model takes for the position of the first column in all rows.
        """
        with forwards_changed(self._modules, lambda forward: self._at(forward, positions, past_len)):
            yield

    def _at(self, forward: Callable[..., Any], positions: Tensor, past_len: int) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            if active_step() is None:
                return forward(*args, **kwargs)  # another thread's ordinary forward
            with _Lookups(self._tables, positions, past_len):
                return forward(*args, **kwargs)

        return read


class _Lookups(TorchFunctionMode):
    """While active, lookups in these tables are made at other positions; the distance that a table has from them is kept."""

    def __init__(self, tables: set[int], positions: Tensor, past_len: int) -> None:
        super().__init__()
        self._tables, self._positions, self._past_len = tables, positions, past_len

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and id(kwargs.get("weight", args[1] if len(args) > 1 else None)) in self._tables:
            return func(self._own(args[0]), *args[1:], **kwargs)
        if func is torch.embedding and id(args[0]) in self._tables:
            return func(args[0], self._own(args[1]), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _own(self, indices: Tensor) -> Tensor:
        """``[R, Q]`` places in the table; as they are where the model did not mean one row for all."""
        if indices.numel() not in (self._positions.shape[1], self._positions.numel()):
            return indices
        return self._positions + (indices.flatten()[0] - self._past_len)
