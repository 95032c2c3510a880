"""Linear layers with repacked weights, in a model's place of its own ones for the length of a step.

Owns the choice (what is worth packing), the stand-ins, and their coming and going. Between steps the model holds its own
modules, so that whatever is done with it then is done without us. It does not own the products (``linear_products.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pagedkv.attention.native.library import Library, load_library
from pagedkv.errors import ConfigError
from pagedkv.models.compiled import is_compiled
from pagedkv.models.context import active_step
from pagedkv.models.linear_census import FoundLinear, LinearCensus, take_census
from pagedkv.models.linear_products import PackedProduct, product_dtype, why_not_packable
from pagedkv.models.memory import free_memory
from pagedkv.models.stand_ins import has_global_hooks, itself

# From benchmarks/linear.py. A call of oneDNN costs some 25 us more than one of MKL, so small products lose by it. Where one
# thread runs AVX2, MKL keeps up but for products whose weights come from memory every time, such as an output head.
_MIN_WEIGHTS = 128 * 1024
_MIN_WEIGHTS_ONE_THREAD_AVX2 = 4 * 1024 * 1024
_MAX_SHARE_OF_FREE_MEMORY = 0.5

WantedPacking = bool | Literal["auto", "int8"]


@dataclass(frozen=True, slots=True)
class PackingReport:
    """Which linear layers of a model run with repacked weights.

    Attributes:
        packed: names of the layers that do.
        merged: those of them that are computed together, because they read the same input.
        nbytes: of the packed copies, which are kept beside the model's own weights.
        plain: names of the layers that do not, each with the reason.
        reason: why no layer does; None when any does.
        weight_error: where the copies are rounded to eight bits (``"int8"``), the norm of what that changes of a layer's weights, relative
            to theirs, for the worst product; None where the copies are exact.
    """

    packed: tuple[str, ...]
    merged: tuple[tuple[str, ...], ...]
    nbytes: int
    plain: Mapping[str, str]
    reason: str | None
    weight_error: float | None = None


class PackedLinear(nn.Linear):
    """Stands in for a linear layer during a step.

    It shares the layer's ``__dict__``: parameters, hooks and flags are the same objects, so nobody who looks at it (the
    model's code, another thread that saves the weights) sees a difference, and replaced parameters are seen here. What is
    its own lies in slots. Without a step in this thread, or where a gradient is recorded, it computes what the layer does.

    Args:
        linear: the layer.
        product: what computes it.
        place: the layer's place in the product.
    """

    __slots__ = ("_dtype", "_linear", "_place", "_product")
    _dtype: torch.dtype
    _linear: nn.Linear
    _place: int
    _product: PackedProduct

    def __init__(self, linear: nn.Linear, product: PackedProduct, place: int) -> None:
        # Module.__setattr__ would register the layer as its own child, in the dict that they share.
        own = {"_linear": linear, "_product": product, "_place": place, "_dtype": linear.weight.dtype}
        for name, value in {"__dict__": vars(linear), **own}.items():
            object.__setattr__(self, name, value)

    @property
    def product(self) -> PackedProduct:
        """What computes it."""
        return self._product

    @property
    def place(self) -> int:
        """The layer's place in the product."""
        return self._place

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out_features]`` of ``input [..., in_features]``."""
        if input.dtype is self._dtype and active_step() is not None and not torch.is_grad_enabled():
            result = self._product.result(input, self._place)
            if result is not None:
                return result
        return super().forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle made during a step (by another thread) is one of the layer.
        return itself, (self._linear,)


_Entry = tuple[dict[str, nn.Module | None], str, nn.Linear, PackedLinear]
"""The modules of a parent, a name among them, the layer that stands there, and what stands in for it."""


class PackedLinears:
    """The packed layers of one model, put in place for each step.

    Args:
        model: the model, on one device.
        wanted: True: every layer that can be packed; ``"auto"``: those worth it, if memory allows; False: none; ``"int8"``: as True, and
            ``quantise`` rounds their weights to eight bits.

    Raises:
        ConfigError: ``wanted`` is none of these, or is True or ``"int8"`` and this machine or model does not allow it.

    Made in three moves, because only a forward shows who shares an input: build, run a forward within ``recording``, ``pack``. A fourth,
    ``quantise``, comes after the model was found right with exact copies.
    """

    def __init__(self, model: nn.Module, wanted: WantedPacking) -> None:
        if not (isinstance(wanted, bool) or wanted in ("auto", "int8")):
            raise ConfigError(f"pack_linears is {wanted!r}: it must be True, False, 'auto' or 'int8'")
        self._wanted = wanted
        self._census = LinearCensus()
        self._products: list[tuple[PackedProduct, list[FoundLinear]]] = []
        self._stand_ins: list[_Entry] = []
        self._outside: tuple[frozenset[int], list[_Entry]] | None = None
        self._reason = "pack_linears is False" if wanted is False else _why_not_at_all(model)
        self._library: Library | None = None
        if self._reason is None:
            loaded = load_library()
            self._library = loaded.library
            if wanted == "int8" and self._library is None:
                self._reason = f"the native library is missing: {'; '.join(loaded.reasons)}"
        if self._reason is None:
            self._census = take_census(model)
            self._reason = None if self._census.found else "the model has no linear layer that can be packed"
        self._refuse_if_wanted()

    @property
    def report(self) -> PackingReport:
        """What is packed now: a layer whose weights were changed into something that cannot be packed is no longer."""
        used = [(product, members) for product, members in self._products if product.reason is None]
        failed = {found.name: str(product.reason) for product, members in self._products if product.reason for found in members}
        names = [tuple(found.name for found in members) for _, members in used]
        return PackingReport(
            packed=tuple(name for group in names for name in group),
            merged=tuple(group for group in names if len(group) > 1),
            nbytes=sum(product.nbytes for product, _ in used),
            plain=MappingProxyType({**self._census.plain, **failed}),
            reason=self._reason,
            weight_error=max((product.weight_error for product, _ in used if product.weight_error is not None), default=None),
        )

    def stand_in(self, linear: nn.Module) -> PackedLinear | None:
        """What stands in for a layer, if anything does."""
        return next((stand_in for _, _, layer, stand_in in self._stand_ins if layer is linear), None)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Learn from the steps run within a ``with`` block which layers are called, and which together."""
        with self._census.recording():
            yield

    def pack(self) -> None:
        """Pack what the recorded forward called.

        Raises:
            ConfigError: packing was asked for by True and no layer could be packed.

        Cost: reads every weight a few times, and holds a copy of it from then on.
        """
        self._outside = None
        groups = self._worthwhile(self._census.groups())
        self._census.calls.clear()
        for members in groups:
            product = PackedProduct([found.linear for found in members], self._library)
            self._products.append((product, members))
            if product.reason is None:
                for place, found in enumerate(members):
                    stand_in = PackedLinear(found.linear, product, place)
                    self._stand_ins += [(modules, name, found.linear, stand_in) for modules, name in found.places]
        if not self._stand_ins and self._reason is None:
            reasons = self.report.plain
            self._reason = f"no layer could be packed: {next(iter(reasons.values()))}" if reasons else "no linear layer was called"
        self._refuse_if_wanted()

    def quantise(self) -> bool:
        """Round the copies to eight bits where that is wanted; returns whether it is.

        Raises:
            ConfigError: it is, and no layer's weights could be rounded.

        Cost: that of packing.
        """
        if self._wanted != "int8":
            return False
        for product, _ in self._products:
            product.quantise()
        if all(product.reason is not None for product, _ in self._products):
            self._reason = f"no layer's weights could be rounded: {next(iter(self.report.plain.values()))}"
        self._refuse_if_wanted()
        return True

    @contextmanager
    def in_place(self, but: frozenset[int] = frozenset()) -> Iterator[None]:
        """Put the stand-ins where their layers are for a ``with`` block, and the layers back whatever happens; not those of ids ``but``.

        A layer that was replaced or parametrised, or that has hooks (they are told which module they serve), stays as it is.
        The caller sees to it that steps of one model do not overlap.

        Cost: 0.2 microseconds a layer while its objects are in the processor's cache, 1 to 2 after a step drove them out.
        """
        swapped = []
        try:
            if not torch.is_autocast_enabled("cpu") and not has_global_hooks():
                for entry in self._stand_ins_but(but):
                    modules, name, linear, stand_in = entry
                    if modules.get(name) is linear and _is_plain(linear):
                        modules[name] = stand_in
                        swapped.append(entry)
            yield
        finally:
            for modules, name, linear, stand_in in swapped:
                if modules.get(name) is stand_in:
                    modules[name] = linear
                stand_in.product.forget()

    def _stand_ins_but(self, but: frozenset[int]) -> list[_Entry]:
        """Those whose layers' ids are not ``but``, found once for the steps in a row that leave out the same."""
        if self._outside is None or self._outside[0] is not but:
            self._outside = (but, [entry for entry in self._stand_ins if id(entry[2]) not in but])
        return self._outside[1]

    def unpack(self, reason: str) -> bool:
        """Give up the packed copies for a reason; returns whether there were any."""
        had = bool(self._stand_ins)
        if had:
            self._census.plain.update({found.name: reason for _, members in self._products for found in members})
            self._reason = reason
        self._stand_ins, self._outside, self._products = [], None, []
        return had

    def _worthwhile(self, groups: list[list[FoundLinear]]) -> list[list[FoundLinear]]:
        """The groups to pack; notes the reason against every other layer."""
        plain = self._census.plain
        called = {id(found) for members in groups for found in members}
        plain.update({found.name: "it was not called in a short forward" for found in self._census.found if id(found) not in called})
        if self._wanted in (True, "int8"):
            return groups
        one_thread_avx2 = torch.get_num_threads() == 1 and torch.backends.cpu.get_cpu_capability() == "AVX2"
        kept = []
        for members in groups:
            size = sum(found.linear.weight.numel() for found in members)
            # In half precision MKL has no product at all for AVX2, and torch's own is several times slower.
            least = _MIN_WEIGHTS_ONE_THREAD_AVX2 if one_thread_avx2 and members[0].linear.weight.dtype == torch.float32 else _MIN_WEIGHTS
            if size < least:
                plain.update({found.name: f"its product has {size:,} weights; packing pays from {least:,} here" for found in members})
            else:
                kept.append(members)
        if not kept:
            return []
        weights = [found.linear.weight for members in kept for found in members]
        needed, free = sum(weight.numel() * product_dtype(weight.dtype).itemsize for weight in weights), free_memory(torch.device("cpu"))
        if needed <= free * _MAX_SHARE_OF_FREE_MEMORY:
            return kept
        self._reason = f"packed copies take {needed:,} bytes, more than {_MAX_SHARE_OF_FREE_MEMORY:.0%} of the {free:,} that are free"
        plain.update({found.name: self._reason for members in kept for found in members})
        return []

    def _refuse_if_wanted(self) -> None:
        if self._wanted in (True, "int8") and self._reason is not None:
            raise ConfigError(f"pack_linears is {self._wanted!r} but cannot be done: {self._reason}")


def _is_plain(linear: nn.Linear) -> bool:
    return type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks


def _why_not_at_all(model: nn.Module) -> str | None:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = [weight for linear in linears if isinstance(weight := getattr(linear, "weight", None), Tensor)]
    if any(weight.device.type != "cpu" for weight in weights):
        return "the model is not on the CPU"
    if is_compiled(model):
        return "the model is compiled, and would be compiled again for every change of its modules"
    reasons = [why_not_packable(dtype) for dtype in {weight.dtype for weight in weights}]
    return next(iter(reasons), None) if all(reasons) else None
