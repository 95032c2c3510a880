"""Which positions the layers of a group still read, and so which of a sequence's blocks may go. Owns no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from pagedkv.checks import integer, shown
from pagedkv.errors import ConfigError
from pagedkv.plan import Int32Array

WindowKind = Literal["sliding", "chunked"]
_Count = TypeVar("_Count", int, Int32Array)


@dataclass(frozen=True, slots=True)
class Window:
    """How far back the layers of a group look. They never look further back for a later position.

    Attributes:
        kind: ``"sliding"``: a position sees the last ``size`` positions, its own included; ``"chunked"``: those before it in its own chunk
            of ``size`` positions.
        size: positions, at least 1.

    Raises:
        ConfigError: an unknown kind, or a size below 1.

    >>> Window.sliding(8).num_dead_blocks(5, 4), Window.chunked(8).num_dead_blocks(5, 4)
    (3, 4)
    """

    kind: WindowKind
    size: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(WindowKind):
            raise ConfigError(f"window kind is {shown(self.kind)}: it must be one of {', '.join(get_args(WindowKind))}")
        integer("window size", self.size, least=1, most=2**31 - 1)

    @classmethod
    def sliding(cls, size: int) -> Window:
        """The last ``size`` positions."""
        return cls("sliding", size)

    @classmethod
    def chunked(cls, size: int) -> Window:
        """The positions of the same chunk of ``size``."""
        return cls("chunked", size)

    def num_dead_blocks(self, num_full: _Count, block_size: int) -> _Count:
        """Leading blocks that no position behind ``num_full`` full blocks sees; of one sequence, or ``[n]`` int32 of many.

        By full blocks, not by tokens: it changes only where a block is filled, and what an undone step has to compute again stays.
        """
        if self.kind == "chunked":
            start = num_full * block_size // self.size * self.size
            return start // block_size
        kept = -(-(self.size - 1) // block_size)
        beyond = num_full - kept
        dead: _Count = beyond * (beyond > 0)
        return dead

    def most_blocks(self, block_size: int) -> int:
        """Blocks that a sequence needs at most at once when it grows by one token: those that it still reads, and the one it writes."""
        if self.kind == "chunked" and self.size % block_size == 0:
            return self.size // block_size
        return -(-(self.size - 1) // block_size) + 1
