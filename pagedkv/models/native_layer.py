"""A decoder layer whose products are packed in pairs, as the native library runs it, and several one after the other.

Owns the weights as they were packed, and the watch over them. It does not own when they are used (``fused_layers.py``, ``run_ahead.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pagedkv.attention.native.decoder import DecoderLayer, NormWeights
from pagedkv.models.fused_modules import Norm
from pagedkv.models.linear_products import PackedProduct
from pagedkv.models.watches import TensorWatch, ValueWatch

WatchedNorm = tuple[Mapping[str, Tensor | None], dict[str, Any], Norm]
"""The parameters and the attributes of a norm, which may change, and what it was found to be."""


class NativeLayer:
    """One layer.

    Args:
        norms: before attention, and before the MLP.
        products: of queries, keys and values; of what attention gives; of gate and up, the gate first; and the last.
        gate_form: an index of ``GATE_FORMS``.
        attributes: of the attention module.
        scale: name of the attribute that holds the factor on the scores.
        layer_idx: transformers' index of the layer.
        num_heads: of queries.

    Attributes:
        layer_idx: as given.
        num_heads: as given.
        is_in_place: whether it stands in the model in the step that runs.
        follower: the layer that the model called next with what this one gave, everything else being the same; None where there is none.
    """

    def __init__(
        self,
        norms: Sequence[WatchedNorm],
        products: Sequence[PackedProduct],
        gate_form: int,
        *,
        attributes: Mapping[str, Any],
        scale: str,
        layer_idx: int,
        num_heads: int,
    ) -> None:
        self._norms, self._products, self._gate_form = tuple(norms), tuple(products), gate_form
        self._attributes, self._scale = attributes, scale
        self.layer_idx, self.num_heads = layer_idx, num_heads
        self.is_in_place = False
        self.follower: NativeLayer | None = None
        self._weights: DecoderLayer | None = None
        self._watch = TensorWatch(())
        self._read: list[tuple[Tensor, int]] = []

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        scale: float = self._attributes[self._scale]
        return scale

    def weights(self) -> DecoderLayer | None:
        """The weights as they are now, packed again where they were changed; None where the library does not run them.

        Cost: some microseconds while nothing was changed.
        """
        weights = self._weights
        if weights is None or not self._is_packed(weights):
            self._weights = weights = self._packed()
            self._watch = TensorWatch.of_all(product.watch for product in self._products)
        if weights is not None:  # what is read as it is, not packed
            self._read = [(norm.weight, norm.weight._version) for norm in weights.norms]
        return weights

    @property
    def watch(self) -> TensorWatch:
        """Over the linear layers' tensors as they were packed, and the norms' as they are now."""
        norms = TensorWatch([(parameters, "weight") for parameters, _, _ in self._norms])
        return TensorWatch.of_all((self._watch, norms))

    @property
    def numbers(self) -> list[tuple[Mapping[str, object], str]]:
        """What else it is computed with: whose attribute, and its name."""
        return [*((attributes, found.epsilon) for _, attributes, found in self._norms), (self._attributes, self._scale)]

    def still(self, weights: DecoderLayer, scale: float) -> bool:
        """Whether nothing that torch counts happened to the layer since ``weights`` gave these, and its scale is the same.

        Cost: a microsecond.
        """
        if self._weights is not weights or self._attributes[self._scale] != scale:
            return False
        if not self._watch.counted():
            return False
        for place, (parameters, attributes, found) in enumerate(self._norms):
            tensor, version = self._read[place]
            if parameters.get("weight") is not tensor or tensor._version != version:
                return False
            if attributes.get(found.epsilon) != weights.norms[place].epsilon:
                return False
        return True

    def _is_packed(self, weights: DecoderLayer) -> bool:
        for place, product in enumerate(self._products):
            if product.pairs is not weights.products[place] or product.int8 is not (weights.few[place] if weights.few else None):
                return False
            if not product.is_unchanged():
                return False
        for (parameters, attributes, found), norm in zip(self._norms, weights.norms, strict=True):
            weight = parameters.get("weight")
            if weight is not norm.weight or weight.data_ptr() != norm.address or attributes.get(found.epsilon) != norm.epsilon:
                return False
            if not NormWeights.fits(weight, weights.products[0]):
                return False
        return True

    def _packed(self) -> DecoderLayer | None:
        if not all(product.usable() for product in self._products):
            return None
        pairs = [product.pairs for product in self._products if product.pairs is not None]
        if len(pairs) != len(self._products) or not pairs[2].is_in_halves:
            return None
        norms = []
        for parameters, attributes, found in self._norms:
            weight, epsilon = parameters.get("weight"), attributes.get(found.epsilon)
            if weight is None or type(epsilon) is not float or not NormWeights.fits(weight, pairs[0]):
                return None
            norms.append(NormWeights(weight, epsilon, found.form))
        int8 = [product.int8 for product in self._products if product.int8 is not None]
        if len(int8) not in (0, len(pairs)):
            return None
        return DecoderLayer((norms[0], norms[1]), pairs, self._gate_form, few=int8, most_few=self._products[0].most_int8_rows)


class NativeStack:
    """Layers one after the other, looked at in one go.

    Args:
        layers: in the order in which they run.
    """

    def __init__(self, layers: Sequence[NativeLayer]) -> None:
        self.layers = tuple(layers)
        self._weights: list[DecoderLayer] = []
        self._tensors, self._numbers = TensorWatch(()), ValueWatch(())

    def weights(self) -> list[DecoderLayer] | None:
        """Those of every layer, the same list while nothing was changed; None where one native call cannot run them all."""
        if self._weights and self._numbers.still() and self._tensors.still():
            return self._weights
        weights = [layer.weights() for layer in self.layers]
        known = [each for each in weights if each is not None]
        settings = {(each.kind, layer.scale, layer.num_heads) for each, layer in zip(known, self.layers, strict=False)}
        self._weights = known if len(known) == len(weights) and len(settings) == 1 else []
        self._tensors = TensorWatch.of_all(layer.watch for layer in self.layers if self._weights)
        self._numbers = ValueWatch([number for layer in self.layers for number in layer.numbers])
        return self._weights or None

    def forget(self) -> None:
        """Look at everything anew the next time: the weights may have been packed in another way."""
        self._weights = []
