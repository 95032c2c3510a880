"""Products with packed weights by the native library: of eight bits for few rows, in pairs of bfloat16 for any number.

Owns the layout of the weights in memory and the way from tensors to the library. It owns neither how weights become eight bits
(``pagedkv.models.int8_weights``) nor where in a model the products are used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

import torch
from torch import Tensor

from pagedkv.attention.native.library import Library, ProductStruct
from pagedkv.attention.native.operations import DTYPES
from pagedkv.errors import InvalidRequestError

_REGISTERS = 4  # of outputs that lie side by side, as products.h has them
_BYTES, _PAIRED = 0, 1  # layouts, as products.h numbers them
_TILE, _DEPTH = 16, 32  # outputs and inputs of one tile of pairs


class _NativeProduct:
    """What both kinds share: a struct but for its rows, and the call.

    Args:
        struct: of the product, but for its rows.
        library: what computes.
        dtypes: of rows that it takes.

    Attributes:
        struct: of the product, but for its rows.
        library: what computes.
    """

    def __init__(self, struct: ProductStruct, library: Library, dtypes: Collection[torch.dtype]) -> None:
        self.struct, self.library, self._dtypes = struct, library, dtypes
        self._num_inputs, self._num_outputs = int(struct.num_inputs), int(struct.num_outputs)
        self._multiply = library.functions.pagedkv_multiply

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """``[..., N]`` of ``x [..., K]``; ``added [..., N]``, of the same dtype, is added before the result is rounded.

        Both on the CPU: the caller sees to that.

        Raises:
            InvalidRequestError: shapes or a dtype that are not the product's.
        """
        if x.dtype not in self._dtypes or (added is not None and added.dtype is not x.dtype):
            raise InvalidRequestError(f"rows are {x.dtype}: the product takes {', '.join(map(str, self._dtypes))}, and adds the same")
        if x.shape[-1] != self._num_inputs or (added is not None and added.shape != (*x.shape[:-1], self._num_outputs)):
            raise InvalidRequestError(
                f"rows are {list(x.shape)}{'' if added is None else f', what is added {list(added.shape)}'}:"
                f" the product makes [..., {self._num_outputs}] of [..., {self._num_inputs}]"
            )
        rows, more = x.contiguous(), None if added is None else added.contiguous()
        out = x.new_empty((*x.shape[:-1], self._num_outputs))
        product = ProductStruct.from_buffer_copy(self.struct)
        product.x, product.out = rows.data_ptr(), out.data_ptr()
        product.added = None if more is None else more.data_ptr()
        product.num_rows, product.dtype = rows.numel() // self._num_inputs, DTYPES[x.dtype]
        self._multiply(ctypes.addressof(product), torch.get_num_threads())
        return out


class Int8Product(_NativeProduct):
    """``x @ (weight * scale).T + bias`` of few rows: sums in float32, rounded once to the dtype of ``x``, any of ``DTYPES``.

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
        num_outputs, num_inputs = weight.shape
        side_by_side = _REGISTERS * int(library.functions.pagedkv_lanes())
        rest = -num_outputs % side_by_side
        panels = torch.nn.functional.pad(weight, (0, 0, 0, rest)).view(-1, side_by_side, num_inputs)
        self._weight = panels.transpose(1, 2).contiguous()
        self._scale = torch.nn.functional.pad(scale, (0, rest))
        self._bias = None if bias is None else torch.nn.functional.pad(bias, (0, rest))
        self.nbytes = self._weight.nbytes + self._scale.nbytes + (0 if self._bias is None else self._bias.nbytes)
        struct = ProductStruct(
            weight=self._weight.data_ptr(),
            scale=self._scale.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            layout=_BYTES,
            gate=-1,
        )
        super().__init__(struct, library, DTYPES)


class PairProduct(_NativeProduct):
    """``x @ weight.T + bias`` of bfloat16: sums in float32 in the order of the inputs, rounded once.

    Args:
        weight: ``[N, K]`` bfloat16, for which ``fits`` holds.
        bias: ``[N]`` bfloat16, or None.
        library: what computes.
        in_halves: lay outputs of the first half beside those of the second, where each half is whole tiles, so that one can be a gate of
            the other.

    Attributes:
        nbytes: of the packed weights and the bias.
        is_in_halves: whether it is laid out so.

    A row's result is the same bits whatever rows are beside it. Holds nothing that changes, so that threads may share one. Cost of a
    call: reads every weight once from memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Library, *, in_halves: bool = False) -> None:
        num_outputs, num_inputs = weight.shape
        self.is_in_halves = in_halves and num_outputs % (2 * _TILE) == 0
        if self.is_in_halves:
            tiles = weight.view(2, -1, _TILE, num_inputs).transpose(0, 1)
        else:
            rest = -num_outputs % (2 * _TILE)
            tiles = torch.nn.functional.pad(weight, (0, 0, 0, rest)).view(-1, 2, _TILE, num_inputs)
        # [P, 2, 16 outputs, K / 32, 16 pairs, 2] to [P, K / 32, 2, 16 pairs, 16 outputs, 2]
        pairs = tiles.reshape(*tiles.shape[:3], -1, _DEPTH // 2, 2)
        self._weight = pairs.permute(0, 3, 1, 4, 2, 5).contiguous()
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, -num_outputs % (2 * _TILE)))
        self.nbytes = self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)
        struct = ProductStruct(
            weight=self._weight.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            layout=_PAIRED,
            halves=self.is_in_halves,
            gate=-1,
        )
        super().__init__(struct, library, (torch.bfloat16,))

    @staticmethod
    def fits(weight: Tensor, library: Library) -> bool:
        """Whether weights are such that this build multiplies them in pairs."""
        known = weight.dtype is torch.bfloat16 and weight.shape[1] % _DEPTH == 0
        return known and bool(library.functions.pagedkv_multiplies_pairs())
