"""Products with weights of eight bits by the native library.

Owns the layout of the weights in memory and the way from tensors to the library. It owns neither how weights become eight bits
(``pagedkv.models.int8_weights``) nor where in a model the products are used.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pagedkv.attention.native.library import Library, ProductStruct
from pagedkv.attention.native.operations import DTYPES

_REGISTERS = 4  # of outputs that lie side by side, as products.h has them


class Int8Product:
    """``x @ (weight * scale).T + bias`` of few rows: sums in float32, rounded once to the dtype of ``x``.

    Args:
        weight: ``[N, K]`` int8.
        scale: ``[N]`` float32, what an output's weights are multiples of.
        bias: ``[N]`` float32, or None.
        library: what computes.

    Attributes:
        nbytes: of the packed weights with their scales and bias.

    Holds nothing that changes, so that threads may share one. Cost of a call: reads every weight once for each 6 rows (2 without AVX-512).
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, library: Library) -> None:
        self._num_outputs, self._num_inputs = weight.shape
        side_by_side = _REGISTERS * int(library.functions.pagedkv_lanes())
        rest = -self._num_outputs % side_by_side
        panels = torch.nn.functional.pad(weight, (0, 0, 0, rest)).view(-1, side_by_side, self._num_inputs)
        self._weight = panels.transpose(1, 2).contiguous()
        self._scale = torch.nn.functional.pad(scale, (0, rest))
        self._bias = None if bias is None else torch.nn.functional.pad(bias, (0, rest))
        self._multiply = library.functions.pagedkv_multiply
        self._addresses = (self._weight.data_ptr(), self._scale.data_ptr(), None if self._bias is None else self._bias.data_ptr())
        self.nbytes = self._weight.nbytes + self._scale.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[..., N]`` of ``x [..., K]``; ``added [..., N]``, of the same dtype, is added before the result is rounded.

        Both on the CPU, float32, bfloat16 or float16: the caller sees to that, and to shapes.
        """
        rows = x.float().contiguous()
        out = x.new_empty((*x.shape[:-1], self._num_outputs))
        more = None if added is None else added.contiguous()
        product = ProductStruct(
            rows.data_ptr(),
            *self._addresses,
            None if more is None else more.data_ptr(),
            out.data_ptr(),
            self._num_inputs,
            self._num_outputs,
            rows.numel() // self._num_inputs,
            DTYPES[x.dtype],
        )
        self._multiply(ctypes.addressof(product), torch.get_num_threads())
        return out
