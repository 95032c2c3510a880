"""The pair of caches that an encoder-decoder sees during a step: self attention as in a decoder, cross attention only to read.

Owns the way in which models ask for K and V of cross attention: by attributes of layer objects, not by calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.facade import DenseCache

CrossReader = Callable[[int], tuple[Tensor, Tensor]]
"""From transformers' index of a layer to K ``[R, Hkv, S, Dk]`` and V ``[R, Hkv, S, Dv]`` of its cross attention, fresh tensors."""


class CrossCache(Cache):
    """What a model takes K and V of cross attention from, by ``layers[i].keys`` and ``.values``.

    Args:
        num_layers: one more than the largest index.
        read: gives them.
        num_columns: of the encoder's input.
    """

    def __init__(self, num_layers: int, read: CrossReader, num_columns: int = 0) -> None:
        # Cache.__init__ wants layer objects that hold tensors; there are none here.
        self.layers: list[Any] = [_CrossLayer(read, layer) for layer in range(num_layers)]
        self.layer_class_to_replicate = None
        self.offloading = False
        self._num_columns = num_columns

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses: all of it is stored before the decoder runs."""
        raise UnsupportedModelError(f"layer {layer_idx} computes cross attention anew, although it is told that its K and V are stored")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the encoder's input."""
        return self._num_columns


class _CrossLayer:
    """One layer as the model sees it. Both tensors are gathered when ``keys`` is read, and ``values`` takes the other one."""

    def __init__(self, read: CrossReader, layer: int) -> None:
        self._read = read
        self._layer = layer
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """K ``[R, Hkv, S, Dk]``."""
        keys, self._values = self._read(self._layer)
        return keys

    @property
    def values(self) -> Tensor:
        """V ``[R, Hkv, S, Dv]``."""
        values, self._values = self._values, None
        return self._read(self._layer)[1] if values is None else values


class PairedCache(EncoderDecoderCache):
    """The cache of rows of equal query length in the decoder.

    Args:
        own: of self attention.
        cross: of cross attention.
    """

    def __init__(self, own: DenseCache, cross: CrossCache) -> None:
        # EncoderDecoderCache.__init__ looks into layers that hold tensors; there are none here.
        self.self_attention_cache = own  # type: ignore[assignment]  # typed there as a DynamicCache, which it need not be
        self.cross_attention_cache = cross  # type: ignore[assignment]  # likewise
        self.is_updated = dict.fromkeys(range(len(cross.layers)), True)
