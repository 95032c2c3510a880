"""What of a model runs as one native operation during a step: norms, the gates of its MLPs, the rotation of queries and keys.

Owns the choice and the report. What is proven, and how it comes into the model, is in ``fused_modules.py`` and ``fused_rotation.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pagedkv.attention.native.library import load_library
from pagedkv.attention.native.operations import Operations
from pagedkv.errors import ConfigError
from pagedkv.models import fused_modules, fused_rotation
from pagedkv.models.compiled import is_compiled
from pagedkv.models.packed_linears import has_global_hooks


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Which parts of a model run as one native operation each.

    Attributes:
        modules: names of the norms and gated MLPs that do.
        rotations: the modeling modules whose rotary embedding does.
        reason: why no part does; None when any does.
    """

    modules: tuple[str, ...]
    rotations: tuple[str, ...]
    reason: str | None


class Fusion:
    """The fused parts of one model, put in place for each step.

    Args:
        model: the model, on one device; looked at, not changed.
        wanted: True and ``"auto"``: every part that is proven to compute what an operation does; False: none.

    Raises:
        ConfigError: ``wanted`` is none of these, or is True and nothing of this model can be fused on this machine.
    """

    def __init__(self, model: nn.Module, wanted: bool | Literal["auto"]) -> None:
        if not (isinstance(wanted, bool) or wanted == "auto"):
            raise ConfigError(f"fuse is {wanted!r}: it must be True, False or 'auto'")
        self._modules: list[fused_modules.Fused] = []
        self._rotations: list[fused_rotation.FusedRotation] = []
        self._reason = "fuse is False" if wanted is False else self._find(model)
        if wanted is True and self._reason is not None:
            raise ConfigError(f"fuse is True but cannot be done: {self._reason}")

    @property
    def report(self) -> FusionReport:
        """What is fused."""
        names = tuple(entry.name for entry in self._modules)
        return FusionReport(names, tuple(rotation.module for rotation in self._rotations), self._reason)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put what is fused in its places for a ``with`` block, and the model's own back whatever happens.

        Cost: about a microsecond a module.
        """
        if torch.is_autocast_enabled("cpu") or has_global_hooks():
            yield
            return
        with fused_modules.in_place(self._modules), fused_rotation.in_place(self._rotations):
            yield

    def give_up(self, reason: str) -> bool:
        """Fuse nothing any more, for a reason; returns whether anything was."""
        had = bool(self._modules or self._rotations)
        if had:
            self._modules, self._rotations, self._reason = [], [], reason
        return had

    def _find(self, model: nn.Module) -> str | None:
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return "the model is not on the CPU"
        if is_compiled(model):
            return "the model is compiled, and would be compiled again for every change of its modules"
        loaded = load_library()
        if loaded.library is None:
            return f"the native library is missing: {'; '.join(loaded.reasons)}"
        operations = Operations(loaded.library)
        self._modules = fused_modules.find_fusable(model, operations)
        self._rotations = fused_rotation.find_rotations(model, operations)
        return None if self._modules or self._rotations else "no module of the model computes what an operation does"
