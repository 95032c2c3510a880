"""Products with repacked weights: one multiplication for one linear layer, or for several that read the same input.

Weights of bfloat16 are multiplied by the native library where its build can, others by oneDNN.

Owns the packed copies, the watch over the weights they were made from, and the product kept between the layers of a group.
It does not own which layers are packed nor how a model comes to use them (``packed_linears.py``), nor how weights become eight bits
(``int8_weights.py``).

The operators of oneDNN are private to torch (its compiler emits them), so nothing is taken for granted: they are looked up, tried per
dtype, and every packed weight is compared with ``F.linear`` before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pagedkv.attention.native.library import Library
from pagedkv.attention.native.products import Int8Product, PairProduct
from pagedkv.models.int8_weights import quantised
from pagedkv.models.watches import TensorWatch, why_not_watched

_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")
_CHECKED_ROWS = (1, 3, 17)  # the kernel depends on the number of rows: one, a few, more than a register block
_SEED = 20260102
# Largest difference from ``F.linear``, relative to the largest result: orders of addition differ, products do not.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Rows up to which weights of eight bits are multiplied as such, by bytes of the dtype in which oneDNN would multiply them. From
# benchmarks/linear.py: beyond, arithmetic takes longer than reading, and oneDNN's is faster.
_MOST_INT8_ROWS = {2: 8, 4: 16}


def why_not_packable(dtype: torch.dtype) -> str | None:
    """The reason why weights of a dtype cannot be packed on this machine with this torch; None when they can.

    Cost: one product of 8 rows.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[no-untyped-call]
        return "oneDNN is not built into this torch, or is switched off"
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        return f"torch {torch.__version__} has no operator mkldnn::{missing[0]}"
    if dtype not in _BOUNDS:
        return f"oneDNN packs no {dtype}"
    # The usual way to make a layer would draw from the user's generator.
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, 16, 8, dtype=dtype, device="cpu")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return PackedProduct([linear]).reason


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which oneDNN multiplies weights of a dtype here: their own, or float32 on a processor without instructions for it.

    There torch's own product of half-precision weights takes several times as long as one of the same weights in float32.
    """
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(8, 16, dtype=dtype), None)
    except RuntimeError:
        return torch.float32
    return dtype


class PackedProduct:
    """The products of linear layers that read the same input, as one multiplication with repacked weights.

    Args:
        linears: of one input size and one dtype on the CPU; several are merged, in the order in which the model calls them.
        library: the native library; None: oneDNN multiplies everything.

    Attributes:
        reason: why the product cannot be used (any more), or None. It is set, never raised: a layer can always do without.
        nbytes: bytes of the packed copies, without oneDNN's padding; they may be wider than the weights, see ``product_dtype``.
        weight_error: of weights of eight bits, see ``Quantised``; None where the copies are exact.
        watch: over the parameters as they were when they were packed.
        pairs: the product of any number of rows by the native library; None where oneDNN has it.
        most_int8_rows: how few, where ``int8`` is there.
        int8: the product of few rows with weights of eight bits; None where the copies are exact.

    Cost: packing reads and writes the weights once and runs 21 rows through them, packed and plain.
    """

    def __init__(self, linears: Sequence[nn.Linear], library: Library | None = None) -> None:
        self.linears = tuple(linears)
        self.reason: str | None = None
        self.nbytes = 0
        self.weight_error: float | None = None
        self.pairs: PairProduct | None = None
        self.int8: Int8Product | None = None
        self._library = library
        self._is_quantised = False
        self.most_int8_rows = 0
        self._last = len(self.linears) - 1
        self._sizes = [linear.out_features for linear in self.linears]
        self.watch = TensorWatch(())
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._dtype = torch.float32
        self._kept: tuple[Tensor, int, dict[int, Tensor]] | None = None
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary
        self._pack()

    def quantise(self) -> None:
        """Round the weights to eight bits, and multiply those from now on: by the native library, as such for few rows."""
        self._is_quantised = True
        self._pack()

    def result(self, x: Tensor, place: int) -> Tensor | None:
        """What linear ``place`` makes of ``x``; None when the product cannot be used and the linear must compute by itself.

        In a group, the first call with an input computes for all, and keeps it until every linear has taken its part, which
        is a view of its own columns. A part is handed out once (its receiver may change it), and only for the very same
        tensor object at the same version: for anything else all is computed afresh.

        Args:
            x: ``[..., in_features]``, of the weights' dtype; must not require gradients to be recorded.
            place: index into ``linears``.

        Returns:
            ``[..., out_features]`` of that linear; the last dimension is contiguous, the others may not be.

        Not checked: ``x.data`` changed in place between two siblings, which torch does not count.
        """
        if self._last == 0 or x.is_inference():  # inference tensors have no version
            return self._all(x)[place] if self.usable() else None
        kept = self._kept
        if kept is None or kept[0] is not x or kept[1] != x._version or place not in kept[2]:
            if not self.usable():
                return None
            # One assignment: another thread that steps another model through this one sees all of it or nothing.
            self._kept = kept = (x, x._version, dict(enumerate(self._all(x))))
        part = kept[2].pop(place)
        if not kept[2]:
            self._kept = None
        return part

    def forget(self) -> None:
        """Drop a product that was kept for a sibling that did not come."""
        self._kept = None

    def usable(self) -> bool:
        """Whether there is a product of the weights as they are now; packs them again when they were changed."""
        if self.reason is None and not self.is_unchanged():
            self._pack()
        return self.reason is None

    def is_unchanged(self) -> bool:
        """Whether the weights are, as far as is watched, what they were when they were packed."""
        return self.watch.still()

    @property
    def sizes(self) -> Sequence[int]:
        """Output features of each linear."""
        return self._sizes

    def whole(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """What all linears make of ``x [..., in_features]``, side by side; only right while ``usable()``.

        ``added [..., out_features]`` is added before the result is rounded: in half precision once, where the model's code does it twice.
        """
        if self.int8 is not None and x.numel() <= self.most_int8_rows * x.shape[-1]:
            return self.int8(x, added)
        if self.pairs is not None:
            return self.pairs(x, added)
        if x.dtype is not self._dtype:
            product = self._multiply(x.to(self._dtype), self._weight, self._bias, "none", [], "").to(x.dtype)
            return product if added is None else product.add_(added)
        if added is None:
            return self._multiply(x, self._weight, self._bias, "none", [], "")
        return self._multiply_add(x, added, self._weight, self._bias, "add")

    def _all(self, x: Tensor) -> Sequence[Tensor]:
        product = self.whole(x)
        return (product,) if self._last == 0 else torch.split_with_sizes(product, self._sizes, -1)

    def _pack(self) -> None:
        self._kept = None
        try:
            with torch.no_grad():
                self.reason = self._packed()
        except (RuntimeError, TypeError, AttributeError) as error:  # a dtype, shapes, no memory; another signature; no weight
            self.reason = f"packing failed: {str(error).splitlines()[0]}"
        if self.reason is not None:
            self._weight = self._bias = self.int8 = self.pairs = self.weight_error = None
            self.nbytes = 0

    def _packed(self) -> str | None:
        self.pairs = self.int8 = None
        if any(linear._parameters.get("weight") is None for linear in self.linears):
            return "its weight is not a parameter (any more)"
        weights = [linear.weight.detach() for linear in self.linears]
        biases = [linear.bias if linear.bias is None else linear.bias.detach() for linear in self.linears]
        wrong = next(filter(None, map(why_not_watched, [*weights, *(bias for bias in biases if bias is not None)])), None)
        if wrong is not None:
            return wrong
        self.watch = TensorWatch([(linear._parameters, name) for linear in self.linears for name in ("weight", "bias")])
        self._sizes = [weight.shape[0] for weight in weights]
        self._dtype = product_dtype(weights[0].dtype)
        merged = weights[0] if self._last == 0 else torch.cat(weights)
        bias = self._merged_bias(weights, biases)
        self.nbytes = 0
        if self._is_quantised:
            rounded = quantised(merged)
            if not bool(rounded.scale.isfinite().all()):
                return "its weights are not finite and cannot be rounded to eight bits"
            if self._library is None:
                return "the native library is missing"
            self.int8 = Int8Product(rounded.weight, rounded.scale, None if bias is None else bias.float(), self._library)
            self.most_int8_rows = _MOST_INT8_ROWS[self._dtype.itemsize]
            self.nbytes, self.weight_error = self.int8.nbytes, rounded.error(merged)
            merged = rounded.dequantised(merged.dtype)  # for more rows, the same numbers as far as that holds them
            weights = list(torch.split(merged, self._sizes))
        self.nbytes += self._multiplied_exactly(merged, bias)
        return self._difference(weights, biases)

    def _multiplied_exactly(self, weight: Tensor, bias: Tensor | None) -> int:
        """Pack for whoever multiplies weights as they are; returns the bytes."""
        if self._library is not None and PairProduct.fits(weight, self._library):
            are_two_alike = len(self._sizes) == 2 and self._sizes[0] == self._sizes[1]  # as a gate and what goes through it
            self.pairs = PairProduct(weight, bias, self._library, in_halves=are_two_alike)
            return self.pairs.nbytes
        packed = weight.to(self._dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(packed, None)
        self._bias = None if bias is None else bias.to(self._dtype)
        return packed.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def _merged_bias(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
        if all(bias is None for bias in biases):
            return None
        parts = [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
        return torch.cat(parts)

    def _difference(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> str | None:
        """Compare with ``F.linear`` of the weights that were packed on random rows; the reason when they differ."""
        generator = torch.Generator().manual_seed(_SEED)
        bound = _BOUNDS[weights[0].dtype]
        for rows in _CHECKED_ROWS:
            x = torch.randn((1, rows, weights[0].shape[1]), generator=generator).to(weights[0].dtype)
            plain = torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], -1)
            added = plain.flip(-1)
            for what, ours, theirs in (("product", self.whole(x), plain), ("product and sum", self.whole(x, added), plain + added)):
                difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
                if not difference <= bound * largest:  # also when either is NaN
                    return f"the packed {what} of {rows} rows differs from F.linear by {difference:.2g} where the largest is {largest:.2g}"
        return None
