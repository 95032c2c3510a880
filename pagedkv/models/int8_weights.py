"""Weights rounded to eight bits: a whole number from -127 to 127 for each, and one scale for each output. Inputs stay as they are.

Owns the rounding, and what it loses. It does not own products with such weights (``pagedkv.attention.native.products``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 127  # symmetric: no zero point


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A rounded weight.

    Attributes:
        weight: ``[N, K]`` int8.
        scale: ``[N]`` float32, what an output's weights are multiples of.
    """

    weight: Tensor
    scale: Tensor

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[N, K]``, what is computed with."""
        return (self.weight * self.scale[:, None]).to(dtype)

    def error(self, exact: Tensor) -> float:
        """How far the rounded weight is from ``exact [N, K]``: the norm of the difference, relative to that of ``exact``."""
        wide = exact.float()
        return float((wide - self.dequantised(torch.float32)).norm() / wide.norm().clamp_min(torch.finfo(torch.float32).tiny))


def quantised(weight: Tensor) -> Quantised:
    """Round ``weight [N, K]``, each output's so that the largest becomes 127. The scale is not finite where a weight is not."""
    scale = (weight.float().abs().amax(1) / _MOST).clamp_min(torch.finfo(torch.float32).tiny)  # of an output that is all zero, no zero
    return Quantised((weight.float() / scale[:, None]).round().to(torch.int8), scale)
