"""Models that their user compiled: whether one is, and how attention stays out of its graphs. It owns nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pagedkv.attention import AttendOptions, AttentionBackend, AttentionSpec, StepAttention
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or any module of it, was compiled in place (``model.compile()``)."""
    return any(module._compiled_call_impl is not None for module in model.modules())


class OutsideOfGraphs:
    """A backend that a compiler does not look into: it works on addresses, which no graph can hold.

    Args:
        backend: whose work is done.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        # Here and not as decorators: this imports torch's compiler, which costs seconds, and only these models need it.
        self._write: Callable[..., None] = torch.compiler.disable(backend.write)  # type: ignore[no-untyped-call]
        self._attend: Callable[..., Tensor] = torch.compiler.disable(backend.attend)  # type: ignore[no-untyped-call]

    @property
    def name(self) -> str:
        """Of the backend."""
        return self._backend.name

    def supports(self, spec: AttentionSpec) -> str | None:
        """As the backend."""
        return self._backend.supports(spec)

    def plan(self, batch: StepBatch) -> StepAttention:
        """As the backend."""
        return self._backend.plan(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        """As the backend, between two graphs."""
        self._write(pool, key, value, step)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        """As the backend, between two graphs."""
        return self._attend(query, pool, step, options)
