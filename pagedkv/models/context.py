"""The step context: how one forward pass under a runner reaches the hooks that transformers calls deep inside the model.

Owns the context variable and the protocol between the hooks and whoever runs a step. It does not own what a step does
(``step.py`` and ``dense.py`` page it, ``probe.py`` records it) and not the hooks (``bridge.py``, ``facade.py``). A context
variable, not keyword arguments: several models do not forward unknown keywords to their attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedkv.errors import UnsupportedModelError

# What transformers passes around as a mask: (batch, head, query position, key position) -> visible.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class AttentionCall:
    """The arguments of one call of the registered attention function, ``T`` packed tokens.

    Attributes:
        module: the attention module that called.
        query: ``[1, Hq, T, Dk]``.
        key: what the module holds after the cache update; ``[1, Hkv, T, Dk]`` if it left it alone, ``[1, H, K, Dk]`` of all tokens
            of all sequences, one after the other, if it was given those.
        value: the same, ``Dv`` wide.
        mask: a carrier made by the registered mask function, or None when the model made no mask.
        scale: the factor on the scores, already defaulted.
        softcap: the bound of the soft cap, or None.
        window: the sliding window that the module states by keyword, or None.
        sinks: ``[Hq]`` logits of attention sinks, or None.
        alibi_slopes: ``[Hq]`` as those of ``AttendOptions``, or None.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


class StepContext(Protocol):
    """What the hooks ask of the step that is running."""

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        """A small tensor that stands for the mask and that ``attend`` recognises."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Store the new keys and values of one layer, ``[1, Hkv, T, D]`` each.

        Returns:
            None where attention reads what is stored in place; else K and V of all tokens, new and old, for the model to go on with.
        """

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention output ``[1, T, Hq, Dv]`` for one call."""


class OwnAttention:
    """The step context of a call in which the model's own attention runs, with the model's own masks."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Nothing: what a layer stores goes elsewhere."""
        return None

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        """Refuses: the model's own attention has the model's own mask."""
        raise UnsupportedModelError("a step with the model's own attention was pointed at ours")

    def attend(self, call: AttentionCall) -> Tensor:
        """Refuses: the model's own attention attends."""
        raise UnsupportedModelError("a step with the model's own attention was pointed at ours")


_ACTIVE: ContextVar[StepContext | None] = ContextVar("pagedkv_active_step", default=None)


def active_step() -> StepContext | None:
    """The step that runs in this thread or task now, or None outside a step."""
    return _ACTIVE.get()


@contextmanager
def activate(step: StepContext) -> Iterator[None]:
    """Make ``step`` the active one for the length of a ``with`` block, in this thread or task only."""
    token = _ACTIVE.set(step)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
