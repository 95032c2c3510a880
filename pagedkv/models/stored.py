"""What a cache of transformers' own holds after a forward, layer by layer. Owns nothing."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache

from pagedkv.storage import LayerSpec


def stored_tensors(cache: Cache) -> dict[int, tuple[Tensor, Tensor]]:
    """K and V of the layers that have stored some, by transformers' index."""
    pairs = {layer: (getattr(each, "keys", None), getattr(each, "values", None)) for layer, each in enumerate(cache.layers)}
    return {layer: (k, v) for layer, (k, v) in pairs.items() if isinstance(k, Tensor) and isinstance(v, Tensor) and k.numel()}


def spec_of(pair: tuple[Tensor, Tensor]) -> LayerSpec:
    """The geometry of K ``[R, Hkv, K, Dk]`` and V ``[R, Hkv, K, Dv]``."""
    keys, values = pair
    return LayerSpec(keys.shape[1], keys.shape[3], values.shape[3])
