"""ALiBi as models really add it: from their tables of biases to slopes, or, where the biases are rounded, to columns of K.

Owns the distinction. A bias that is a slope times a distance is added by the attention backends. One that is rounded by position (Falcon
rounds to bfloat16, also in float32) depends on where a key stands, by whole units beyond a few hundred tokens: it is stored with the key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.errors import UnsupportedModelError

# Rounding of float32, with room: bfloat16 is four thousand times as coarse.
_RELATIVE = 1e-5


def linear_slopes(biases: Tensor) -> Tensor:
    """The slope of each head.

    Args:
        biases: ``[H, P]`` floats, what is added to the scores of keys at consecutive positions.

    Returns:
        ``[H]`` float32.

    Raises:
        UnsupportedModelError: some biases are not on a line.
    """
    if biases.shape[1] < 2:
        return torch.zeros(biases.shape[0])  # of a model of one position, which has no distances
    places = torch.arange(biases.shape[1], dtype=torch.float64)
    heights = biases.double().cpu()
    slopes = (heights[:, -1] - heights[:, 0]) / places[-1]
    line = heights[:, :1] + slopes[:, None] * places
    if not torch.allclose(heights, line, rtol=_RELATIVE, atol=_RELATIVE):
        raise UnsupportedModelError("its ALiBi biases do not grow linearly with the distance")
    return slopes.float()


class BiasColumns:
    """Biases by position as further columns of queries and keys, so that plain attention adds them.

    The heads that share a key have a column each: the key holds all of their biases, and a query has 1 in its own column. The scale
    applies to biases as to products.

    Args:
        biases: ``[H, P]`` float32, by head and key position.
        group: query heads that share a key head.
    """

    def __init__(self, biases: Tensor, group: int) -> None:
        self._biases = biases.view(-1, group, biases.shape[1]).transpose(1, 2)  # [Hkv, P, group]
        self._choice = torch.eye(group).repeat(biases.shape[0] // group, 1)[None, :, None]
        self._latest: tuple[Tensor, Tensor] | None = None

    def extended(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[1, Hq, T, D + group]`` and keys ``[1, Hkv, T, D + group]`` of ``D`` wide ones at positions ``[1, T]``.

        Cost: a copy of both; biases are looked up once for all layers that pass the same ``positions``.
        """
        if self._latest is None or self._latest[0] is not positions or self._latest[1].dtype != key.dtype:
            self._biases, self._choice = self._biases.to(key.device), self._choice.to(key.device, key.dtype)
            self._latest = positions, self._biases[:, positions[0]].to(key.dtype)[None]
        choice = self._choice.expand(-1, -1, query.shape[2], -1)
        return torch.cat([query, choice], dim=3), torch.cat([key, self._latest[1]], dim=3)
