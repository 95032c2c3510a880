"""What of a model runs as one native operation during a step: norms, the gates of its MLPs, the rotation of queries and keys.

Owns the choice and the report. What is proven, and how it comes into the model, is in ``fused_modules.py``, ``fused_rotation.py`` and, for
whole decoder layers, ``fused_layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from pagedkv.attention.native.library import load_library
from pagedkv.attention.native.operations import Operations
from pagedkv.errors import ConfigError
from pagedkv.models import fused_body, fused_layers, fused_modules, fused_rotation, stand_ins
from pagedkv.models.compiled import is_compiled
from pagedkv.models.packed_linears import PackedLinears


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Which parts of a model run as one native operation each.

    Attributes:
        body: name of the model's body, where it runs as one function of its decoder layers; None where it does not.
        layers: names of the decoder layers that run as one function of such operations and packed products.
        modules: names of the norms and gated MLPs that do, those of these layers among them.
        rotations: the modeling modules whose rotary embedding does.
        reason: why no part does; None when any does.
    """

    body: str | None
    layers: tuple[str, ...]
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
        self._layers: list[fused_layers.FusedLayer] = []
        self._body: fused_body.FusedBody | None = None
        self._modules: list[fused_modules.Fused] = []
        self._outside: list[fused_modules.Fused] = []
        self._rotations: list[fused_rotation.FusedRotation] = []
        self._operations: Operations | None = None
        self._model = model
        self._reason = "fuse is False" if wanted is False else self._find(model)
        if wanted is True and self._reason is not None:
            raise ConfigError(f"fuse is True but cannot be done: {self._reason}")

    @property
    def report(self) -> FusionReport:
        """What is fused."""
        return FusionReport(
            body=None if self._body is None else self._body.name,
            layers=tuple(layer.name for layer in self._layers),
            modules=tuple(entry.name for entry in self._modules),
            rotations=tuple(rotation.module for rotation in self._rotations),
            reason=self._reason,
        )

    def fuse_layers(
        self, linears: PackedLinears, configs: tuple[PreTrainedConfig, ...], widths: Sequence[int], apart: fused_body.Apart
    ) -> None:
        """Fuse whole decoder layers, too, where their linear layers are packed and they are proven.

        Args:
            linears: the packed layers of the model.
            configs: what ``pointed_at_us`` takes.
            widths: of the model's heads.
            apart: puts what stands in for parts of the body in place.

        Cost: runs every attention module on three rows.
        """
        if self._operations is not None:
            self._layers = fused_layers.find_layers(self._model, self._modules, linears, configs, widths, self._operations)
            self._body = fused_body.find_body(self._model, self._layers, configs, apart)
            if self._body is not None:
                self._outside = [entry for entry in self._modules if id(entry) not in self._body.parts]

    @contextmanager
    def in_place(self) -> Iterator[frozenset[int]]:
        """Put what is fused in its places for a ``with`` block, and the model's own back whatever happens.

        Yields:
            ids of the linear layers that are computed within fused layers.

        Cost: about a microsecond a module.
        """
        if torch.is_autocast_enabled("cpu") or stand_ins.has_global_hooks():
            yield frozenset()
            return
        body = self._body
        if body is not None and body.looked_at():
            modules = [entry for entry in self._outside if entry.still()]
            with stand_ins.in_place([body, *modules]), fused_rotation.in_place(self._rotations):
                yield body.linears
            return
        with self.parts_in_place() as linears:
            yield linears

    @contextmanager
    def parts_in_place(self) -> Iterator[frozenset[int]]:
        """The same, without a body."""
        layers = [layer for layer in self._layers if layer.looked_at()]
        covered = {id(part) for layer in layers for part in layer.parts}
        modules = [entry for entry in self._modules if id(entry) not in covered and entry.still()]
        linears = frozenset[int]().union(*(layer.linears for layer in layers))
        with stand_ins.in_place([*layers, *modules]), fused_rotation.in_place(self._rotations):
            yield linears

    def forget(self) -> None:
        """Look at the linear layers' products anew: they were packed in another way."""
        if self._body is not None:
            self._body.stack.forget()

    def give_up(self, reason: str) -> bool:
        """Fuse nothing any more, for a reason; returns whether anything was."""
        had = bool(self._modules or self._rotations)
        if had:
            self._layers, self._body, self._modules, self._outside, self._rotations = [], None, [], [], []
            self._reason = reason
        return had

    def _find(self, model: nn.Module) -> str | None:
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return "the model is not on the CPU"
        if is_compiled(model):
            return "the model is compiled, and would be compiled again for every change of its modules"
        loaded = load_library()
        if loaded.library is None:
            return f"the native library is missing: {'; '.join(loaded.reasons)}"
        self._operations = Operations(loaded.library)
        self._modules = fused_modules.find_fusable(model, self._operations)
        self._rotations = fused_rotation.find_rotations(model, self._operations)
        return None if self._modules or self._rotations else "no module of the model computes what an operation does"
