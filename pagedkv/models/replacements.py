"""What stands in for a model's own modules during a step, as one thing: packed linear layers, and fused parts.

Owns the order in which they are made, come, and are given up. What they are is said in ``packed_linears.py`` and ``fusion.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from pagedkv.errors import StepError
from pagedkv.models.fusion import Fusion, FusionReport
from pagedkv.models.packed_linears import PackedLinears, PackingReport, WantedPacking

# In a model's own dict while a step runs, whichever runner and tier it is of.
_RUNNING = "_pagedkv_step_is_running"

Wanted = bool | Literal["auto"]


class Replacements:
    """The stand-ins of one model.

    Made in moves: build, run a forward within ``recording``, ``pack``, perhaps ``fuse_layers``, perhaps ``quantise``.

    Args:
        model: the model, on one device.
        pack_linears: as ``PackedLinears`` takes it.
        fuse: as ``Fusion`` takes it.

    Raises:
        ConfigError: either is True (or ``"int8"``) and cannot be done, or is none of its values.
    """

    def __init__(self, model: PreTrainedModel, *, pack_linears: WantedPacking, fuse: Wanted) -> None:
        self._attributes = vars(model)
        self._linears = PackedLinears(model, pack_linears)
        self._fusion = Fusion(model, fuse)
        # What was asked for by True is never given up; of the rest, fused parts first.
        self._dispensable = [
            give_up for wanted, give_up in ((fuse, self._fusion.give_up), (pack_linears, self._linears.unpack)) if wanted == "auto"
        ]

    @property
    def packing(self) -> PackingReport:
        """Which linear layers are packed."""
        return self._linears.report

    @property
    def fusion(self) -> FusionReport:
        """Which parts are fused."""
        return self._fusion.report

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Learn from a forward within a ``with`` block which linear layers are called together."""
        with self._linears.recording():
            yield

    def pack(self) -> None:
        """Pack the linear layers that the recorded forward called."""
        self._linears.pack()

    def fuse_layers(self, configs: tuple[PreTrainedConfig, ...], widths: Sequence[int]) -> None:
        """Fuse whole decoder layers; only of a model whose attention reads blocks in place."""
        self._fusion.fuse_layers(self._linears, configs, widths, self._parts_in_place)

    def quantise(self) -> bool:
        """Round the packed weights to eight bits where that is wanted; see ``PackedLinears.quantise``."""
        is_quantised = self._linears.quantise()
        self._fusion.forget()
        return is_quantised

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put all of it in its places for a ``with`` block, and the model's own back whatever happens.

        Raises:
            StepError: another step of the same model is running.
        """
        turn = object()
        if self._attributes.setdefault(_RUNNING, turn) is not turn:  # found and set in one, whichever thread comes first
            raise StepError("another step of the same model is running: steps of one model take turns")
        try:
            with self._fusion.in_place() as fused, self._linears.in_place(fused):
                yield
        finally:
            del self._attributes[_RUNNING]

    @contextmanager
    def _parts_in_place(self) -> Iterator[None]:
        """The parts of the model's body, while the step runs in which the body itself stood in for nothing."""
        with self._fusion.parts_in_place() as fused, self._linears.in_place(fused):
            yield

    def give_up(self, reason: str) -> bool:
        """Give up the next part that nobody insisted on, for a reason; returns False when there is none left."""
        return any(give_up(reason) for give_up in self._dispensable)  # up to the first that had something to give up

    def close(self, reason: str) -> None:
        """Give up everything, for a reason."""
        self._fusion.give_up(reason)
        self._linears.unpack(reason)
