"""One decoder layer of bfloat16 as one native call: two norms, four products, a gate, and what lies between queries and attention.

Owns the struct of a layer. It does not own when a layer may be computed so (``pagedkv.models.fused_layers``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedkv.attention.native.library import DecoderStruct, LayerStruct
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.native.products import PairProduct


@dataclass(frozen=True, slots=True, eq=False)
class NormWeights:
    """A norm: ``weight [H]``, epsilon, and the form as an index of ``NORM_FORMS``."""

    weight: Tensor
    epsilon: float
    form: int

    def struct(self) -> LayerStruct:
        """The norm, but for its rows."""
        width = self.weight.shape[0]
        struct = LayerStruct(weight=self.weight.data_ptr(), num_heads=1, width=width, form=self.form, epsilon=self.epsilon)
        struct.x_stride[0] = struct.out_stride[0] = width
        struct.dtype = DTYPES[self.weight.dtype]
        return struct


class DecoderLayer:
    """The weights of one layer, as the native call takes them.

    Args:
        norms: before attention, and before the MLP.
        products: of queries, keys and values side by side; of what attention gives; of gate and up, in halves; and the last.
        gate_form: an index of ``GATE_FORMS``.

    Attributes:
        products: as given.
        norms: as given.
        address: of the struct.
        hidden_size: width of the layer's rows.
        num_joined: numbers of a token's queries, keys and values.
        row_nbytes: bytes of scratch memory for each row.
        build: name of the build that packed the weights.
    """

    __slots__ = ("_struct", "address", "build", "hidden_size", "norms", "num_joined", "products", "row_nbytes")

    def __init__(self, norms: tuple[NormWeights, NormWeights], products: Sequence[PairProduct], gate_form: int) -> None:
        self.norms, self.products = norms, tuple(products)
        self._struct = DecoderStruct(*(norm.struct() for norm in norms), *(product.struct for product in products))
        self._struct.gated.gate = gate_form
        joined, output, gated, down = (product.struct for product in products)
        self.hidden_size, self.num_joined = int(joined.num_inputs), int(joined.num_outputs)
        self.address = ctypes.addressof(self._struct)
        numbers = joined.num_inputs + output.num_outputs + joined.num_outputs + output.num_inputs + down.num_inputs
        self.row_nbytes = int(numbers) * torch.bfloat16.itemsize
        self.build = products[0].library.build.name
