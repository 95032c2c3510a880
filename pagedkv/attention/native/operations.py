"""Norms, gates and rotations by the native library: one pass each over rows in place of several torch operators.

Owns the way from tensors to the library. It does not own where in a model they are used (``pagedkv.models.fusion``).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pagedkv.attention.native.library import LayerStruct, Library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as step.h numbers them
NORM_FORMS = ("rounded, then scaled", "scaled, then rounded", "scaled by one plus the weight")
GATE_FORMS = ("silu", "gelu_tanh")


class Operations:
    """The operations of one library. Holds nothing that changes, so that threads may share one.

    All tensors are on the CPU, of one dtype (float32, bfloat16, float16), the last dimension contiguous; sums and functions are in float32.
    The caller sees to that, and to shapes: this is the inside of a layer, where a check would cost as much as the work.
    """

    def __init__(self, library: Library) -> None:
        functions = library.functions
        self._norm, self._gate, self._rotate = functions.pagedkv_norm, functions.pagedkv_gate, functions.pagedkv_rotate

    def norm(self, x: Tensor, weight: Tensor, epsilon: float, form: int) -> Tensor:
        """Root mean square norm ``[..., H]`` of ``x [..., H]``, scaled by ``weight [H]``; ``form`` is an index of ``NORM_FORMS``."""
        rows = x if x.is_contiguous() else x.contiguous()
        out, width = torch.empty_like(rows), x.shape[-1]
        layer = LayerStruct(x=rows.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), num_heads=1, width=width, form=form)
        layer.x_stride[0] = layer.out_stride[0] = width
        layer.num_rows, layer.dtype, layer.epsilon = x.numel() // width, DTYPES[x.dtype], epsilon
        self._norm(ctypes.addressof(layer), torch.get_num_threads())
        return out

    def gate(self, gate: Tensor, up: Tensor, form: int) -> Tensor:
        """``f(gate) * up`` of two ``[..., T, I]`` with ``evenly_spaced`` rows; ``form`` names ``f`` as an index of ``GATE_FORMS``."""
        width = gate.shape[-1]
        out = gate.new_empty(gate.shape)
        layer = LayerStruct(x=gate.data_ptr(), y=up.data_ptr(), out=out.data_ptr(), num_heads=1, width=width, form=form)
        layer.x_stride[0], layer.y_stride[0], layer.out_stride[0] = gate.stride(-2), up.stride(-2), width
        layer.num_rows, layer.dtype = gate.shape[-2], DTYPES[gate.dtype]
        self._gate(ctypes.addressof(layer), torch.get_num_threads())
        return out

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Rotary embedding of ``x [H, T, D]``, ``D`` even, by ``cosines`` and ``sines`` ``[T, D]`` of equal strides.

        Returns:
            ``[H, T, D]``, tokens outermost in memory.
        """
        out = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
        self._rotated(x, cosines, sines, out)
        return out

    def rotate_in_place(self, x: Tensor, cosines: Tensor, sines: Tensor) -> None:
        """As ``rotate``, into ``x`` itself."""
        self._rotated(x, cosines, sines, x)

    def _rotated(self, x: Tensor, cosines: Tensor, sines: Tensor, out: Tensor) -> None:
        num_heads, num_rows, width = x.shape
        layer = LayerStruct(x=x.data_ptr(), y=cosines.data_ptr(), weight=sines.data_ptr(), out=out.data_ptr(), width=width)
        layer.x_stride[:], layer.out_stride[:] = (x.stride(1), x.stride(0)), (out.stride(1), out.stride(0))
        layer.y_stride[0] = cosines.stride(0)
        layer.num_rows, layer.num_heads, layer.dtype = num_rows, num_heads, DTYPES[x.dtype]
        self._rotate(ctypes.addressof(layer), torch.get_num_threads())


def evenly_spaced(tensor: Tensor) -> bool:
    """Whether the rows of ``[..., T, I]`` lie one stride apart: all other dimensions are of size 1, the last is contiguous."""
    return tensor.dim() >= 2 and tensor.stride(-1) == 1 and tensor.numel() == tensor.shape[-1] * tensor.shape[-2]
