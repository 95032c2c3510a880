"""Products with packed weights by the native library: of eight bits for few rows, in pairs of bfloat16 for any number.

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
_BYTES, _PAIRED = 0, 1  # layouts, as products.h numbers them
_TILE, _DEPTH = 16, 32  # outputs and inputs of one tile of pairs


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
            _BYTES,
            0,
            -1,
        )
        self._multiply(ctypes.addressof(product), torch.get_num_threads())
        return out


class PairProduct:
    """``x @ weight.T + bias`` of bfloat16: sums in float32 in the order of the inputs, rounded once.

    Args:
        weight: ``[N, K]`` bfloat16, for which ``fits`` holds.
        bias: ``[N]`` bfloat16, or None.
        library: what computes.
        in_halves: lay outputs of the first half beside those of the second, where each half is whole tiles, so that one can be a gate of
            the other.

    Attributes:
        nbytes: of the packed weights and the bias.
        struct: of the product, but for its rows.
        library: what computes.
        is_in_halves: whether it is laid out so.

    A row's result is the same bits whatever rows are beside it. Holds nothing that changes, so that threads may share one. Cost of a
    call: reads every weight once from memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Library, *, in_halves: bool = False) -> None:
        self._num_outputs, self._num_inputs = weight.shape
        self.is_in_halves = in_halves and self._num_outputs % (2 * _TILE) == 0
        if self.is_in_halves:
            tiles = weight.view(2, -1, _TILE, self._num_inputs).transpose(0, 1)
        else:
            rest = -self._num_outputs % (2 * _TILE)
            tiles = torch.nn.functional.pad(weight, (0, 0, 0, rest)).view(-1, 2, _TILE, self._num_inputs)
        # [P, 2, 16 outputs, K / 32, 16 pairs, 2] to [P, K / 32, 2, 16 pairs, 16 outputs, 2]
        pairs = tiles.reshape(*tiles.shape[:3], -1, _DEPTH // 2, 2)
        self._weight = pairs.permute(0, 3, 1, 4, 2, 5).contiguous()
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, -self._num_outputs % (2 * _TILE)))
        self.nbytes = self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)
        self.library = library
        self.struct = ProductStruct(
            weight=self._weight.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_inputs=self._num_inputs,
            num_outputs=self._num_outputs,
            dtype=DTYPES[torch.bfloat16],
            layout=_PAIRED,
            halves=self.is_in_halves,
            gate=-1,
        )
        self._multiply = library.functions.pagedkv_multiply

    @staticmethod
    def fits(weight: Tensor, library: Library) -> bool:
        """Whether weights are such that this build multiplies them in pairs."""
        known = weight.dtype is torch.bfloat16 and weight.shape[1] % _DEPTH == 0
        return known and bool(library.functions.pagedkv_multiplies_pairs())

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[..., N]`` of ``x [..., K]``, bfloat16 on the CPU; ``added [..., N]`` is added before the result is rounded. Not checked."""
        rows, more = x.contiguous(), None if added is None else added.contiguous()
        out = x.new_empty((*x.shape[:-1], self._num_outputs))
        product = ProductStruct.from_buffer_copy(self.struct)
        product.x, product.out = rows.data_ptr(), out.data_ptr()
        product.added = None if more is None else more.data_ptr()
        product.num_rows = rows.numel() // self._num_inputs
        self._multiply(ctypes.addressof(product), torch.get_num_threads())
        return out
