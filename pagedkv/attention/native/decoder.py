"""Decoder layers of bfloat16 as one native call: of each two norms, four products, a gate, and attention with what lies before it.

Owns the structs of layers. It does not own when a layer may be computed so (``pagedkv.models.fused_layers``).
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from pagedkv.attention.native.library import DecoderStruct, LayerStruct, PlacedStruct
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.native.products import Int8Product, PairProduct
from pagedkv.errors import InvalidRequestError
from pagedkv.storage.pool import LayerPool


class NormWeights:
    """A norm: ``weight [H]``, for which ``fits`` holds, epsilon, and the form as an index of ``NORM_FORMS``.

    Attributes:
        weight: as given.
        epsilon: as given.
        address: of the weight.
        struct: of the norm, but for its rows.
    """

    __slots__ = ("address", "epsilon", "struct", "weight")

    def __init__(self, weight: Tensor, epsilon: float, form: int) -> None:
        self.weight, self.epsilon, self.address = weight, epsilon, weight.data_ptr()
        width = weight.shape[0]
        self.struct = LayerStruct(weight=self.address, num_heads=1, width=width, form=form, epsilon=epsilon, dtype=DTYPES[weight.dtype])
        self.struct.x_stride[0] = self.struct.out_stride[0] = width

    @staticmethod
    def fits(weight: Tensor, product: PairProduct) -> bool:
        """Whether a weight is that of a norm before a product."""
        return weight.dtype is torch.bfloat16 and weight.is_contiguous() and weight.shape == (product.struct.num_inputs,)


class DecoderLayer:
    """The weights of one layer, as the native call takes them.

    Args:
        norms: before attention, and before the MLP, as wide as the layer's rows.
        products: of queries, keys and values side by side; of what attention gives; of gate and up, in halves; and the last.
        gate_form: an index of ``GATE_FORMS``.
        few: the same products with weights of eight bits, for few rows, gate and up side by side; empty for none.
        most_few: rows up to which these are used.

    Raises:
        InvalidRequestError: the products do not fit together.

    Attributes:
        products: as given.
        few: as given.
        norms: as given.
        address: of the struct.
        hidden_size: width of the layer's rows.
        num_joined: numbers of a token's queries, keys and values.
        num_attended: numbers that attention gives for a token.
        row_nbytes: bytes of scratch memory for each row.
        build: name of the build that packed the weights.
        kind: what layers of one run have in common.
    """

    __slots__ = (
        "_struct",
        "address",
        "build",
        "few",
        "hidden_size",
        "kind",
        "norms",
        "num_attended",
        "num_joined",
        "products",
        "row_nbytes",
    )

    def __init__(
        self,
        norms: tuple[NormWeights, NormWeights],
        products: Sequence[PairProduct],
        gate_form: int,
        *,
        few: Sequence[Int8Product] = (),
        most_few: int = 0,
    ) -> None:
        self.norms, self.products, self.few = norms, tuple(products), tuple(few)
        self._struct = DecoderStruct(*(norm.struct for norm in norms), most_few=most_few if few else 0)
        self._struct.many[:] = [product.struct for product in products]
        for place, product in enumerate(few):
            self._struct.few[place] = product.struct
        self._struct.many[2].gate = self._struct.few[2].gate = gate_form
        joined, output, gated, down = (product.struct for product in products)
        sizes = [[(each.struct.num_inputs, each.struct.num_outputs) for each in group] for group in (products, few)]
        if few and sizes[0] != sizes[1]:
            raise InvalidRequestError("the products of few rows are not those of many")
        if (output.num_outputs, gated.num_inputs, down.num_outputs, 2 * down.num_inputs) != (*[joined.num_inputs] * 3, gated.num_outputs):
            raise InvalidRequestError("the products of the layer do not fit together")
        self.hidden_size, self.num_joined = int(joined.num_inputs), int(joined.num_outputs)
        self.address = ctypes.addressof(self._struct)
        numbers = joined.num_inputs + output.num_outputs + joined.num_outputs + output.num_inputs + down.num_inputs + gated.num_outputs
        self.row_nbytes = int(numbers) * torch.bfloat16.itemsize
        self.build = products[0].library.build.name
        self.num_attended = int(output.num_inputs)
        self.kind = (self.hidden_size, self.num_joined, self.num_attended, self.build)


class DecoderRun:
    """Layers that are computed one after the other, each with the pool of its K and V.

    Args:
        layers: of one build and of one width, at least one.
        pools: of one geometry.

    Raises:
        InvalidRequestError: they are not.

    Attributes:
        layers: as given.
        address: of the structs.
        row_nbytes: bytes of scratch memory for each row.

    It keeps no pool alive: whoever runs it does.
    """

    __slots__ = ("_pools", "_structs", "address", "layers", "row_nbytes")

    def __init__(self, layers: Sequence[DecoderLayer], pools: Sequence[LayerPool]) -> None:
        self.layers, self._pools = list(layers), list(map(weakref.ref, pools))
        places = list(zip(self.layers, pools, strict=True))
        if not all(self.go_together(places[0], place) for place in places):
            raise InvalidRequestError("layers of one run must be of one build, one width and one geometry of K and V")
        self._structs = (PlacedStruct * len(places))(
            *(PlacedStruct(layer.address, pool.key.data_ptr(), pool.value.data_ptr()) for layer, pool in places)
        )
        self.address = ctypes.addressof(self._structs)
        self.row_nbytes = max(layer.row_nbytes for layer in self.layers)

    @property
    def pools(self) -> list[LayerPool]:
        """As given. Raises ``InvalidRequestError`` where any is gone."""
        pools = [pool for pool in map(operator.call, self._pools) if pool is not None]
        if len(pools) != len(self._pools):
            raise InvalidRequestError("the pools of the run are gone")
        return pools

    def is_of(self, layers: Sequence[DecoderLayer], pools: Sequence[LayerPool]) -> bool:
        """Whether it is the run of these very layers, a list, with these pools, a list."""
        return self.layers == layers and list(map(operator.call, self._pools)) == pools

    @staticmethod
    def go_together(one: tuple[DecoderLayer, LayerPool], other: tuple[DecoderLayer, LayerPool]) -> bool:
        """Whether two layers with their pools may be of one run."""
        (layer, pool), (more, place) = one, other
        return (layer.kind, pool.spec, pool.dtype, pool.block_size) == (more.kind, place.spec, place.dtype, place.block_size)
