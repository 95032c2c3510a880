"""The geometry of one layer's K and V. It owns no memory and knows no device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedkv.checks import integer


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer stores for one token.

    Attributes:
        num_kv_heads: heads of K and V, at least 1.
        key_dim: elements of one head of K, at least 1.
        value_dim: elements of one head of V, at least 1; it may differ from ``key_dim``.
        group: the layer group, counted from 0. Layers of one group share block tables and slots.

    Raises:
        ConfigError: a count is out of range.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    group: int = 0

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "key_dim", "value_dim"):
            integer(f"LayerSpec.{name}", getattr(self, name), least=1, most=2**31 - 1)
        integer("LayerSpec.group", self.group, least=0, most=2**31 - 1)

    @property
    def numel_per_token(self) -> int:
        """Elements that one token takes in this layer, K and V together."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    def nbytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer, K and V together.

        >>> LayerSpec(num_kv_heads=3, key_dim=64, value_dim=64).nbytes_per_token(torch.bfloat16)
        768
        """
        return self.numel_per_token * dtype.itemsize
