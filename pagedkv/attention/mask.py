"""Which earlier positions a query may see, as a value. It builds small masks and owns no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from pagedkv.checks import integer
from pagedkv.errors import ConfigError
from pagedkv.plan import Int64Array

MaskKind = Literal["causal", "sliding", "chunked"]


@dataclass(frozen=True, slots=True)
class Mask:
    """A causal rule over positions of one sequence. A query always sees itself.

    Attributes:
        kind: ``"causal"`` sees every position up to its own; ``"sliding"`` the last ``size`` of them, ``(q - size, q]``;
            ``"chunked"`` those in its own chunk of ``size`` positions.
        size: positions of the window or chunk, at least 1; 0 for ``"causal"``.

    Raises:
        ConfigError: an unknown kind, or a size that does not go with it.

    >>> Mask.sliding(4).first_visible(10), Mask.chunked(4).first_visible(10), Mask.causal().first_visible(10)
    (7, 8, 0)
    """

    kind: MaskKind
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("causal", "sliding", "chunked"):
            raise ConfigError(f'mask kind {self.kind!r}: "causal", "sliding" and "chunked" are known')
        if (self.kind == "causal") != (integer("mask size", self.size, least=0) == 0):
            raise ConfigError(f"mask size {self.size} for {self.kind!r}: causal has size 0, sliding and chunked at least 1")

    @classmethod
    def causal(cls) -> Mask:
        """Every position up to the query's own."""
        return cls("causal")

    @classmethod
    def sliding(cls, window: int) -> Mask:
        """The last ``window`` positions, the query's own included."""
        return cls("sliding", window)

    @classmethod
    def chunked(cls, chunk: int) -> Mask:
        """The positions up to the query's own that lie in the same chunk of ``chunk``."""
        return cls("chunked", chunk)

    def first_visible(self, position: int) -> int:
        """The smallest position that a query at ``position`` sees; it never falls as ``position`` grows."""
        if self.kind == "sliding":
            return max(0, position - self.size + 1)
        if self.kind == "chunked":
            return position - position % self.size
        return 0

    def first_visible_each(self, positions: Int64Array) -> Int64Array:
        """``first_visible`` of many positions at once: int64 in, int64 out, the same shape."""
        if self.kind == "sliding":
            return np.maximum(0, positions - self.size + 1)
        if self.kind == "chunked":
            return positions - positions % self.size
        return np.zeros_like(positions)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether each query position sees each key position.

        Args:
            query: integer positions of any shape.
            key: integer positions that broadcast with ``query``.

        Returns:
            bool, of the broadcast shape.
        """
        seen = key <= query
        if self.kind == "sliding":
            seen = seen & (key > query - self.size)
        elif self.kind == "chunked":
            seen = seen & (key >= query - query % self.size)
        return seen
