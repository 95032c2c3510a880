"""Which blocks of a windowed group belong to which published blocks of the leading group.

Owns that relation. Knows no tokens: a chain of tokens is found in the leading group, whose sequences keep all of their blocks, and from
each block of it one goes across. So a windowed group may lose any block, a parent before its children too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pagedkv.core.arguments import as_block_ids
from pagedkv.errors import InvariantError
from pagedkv.plan import Int32Array

_NOTHING = 0  # the null block


class WindowCache:
    """Finds published blocks of a windowed group by the leading group's block for the same tokens.

    Args:
        num_blocks: size of the windowed group's id space.
        num_leading: size of the leading group's.

    Memory: 8 bytes for each block of either group.
    """

    def __init__(self, num_blocks: int, *, num_leading: int) -> None:
        self._own = [_NOTHING] * num_leading
        self._leading = [_NOTHING] * num_blocks
        self._size = 0

    def __len__(self) -> int:
        """Published blocks."""
        return self._size

    def find_all(self, leading: Iterable[int]) -> list[int]:
        """The blocks that belong to these blocks of the leading group, the null block where none does."""
        own = self._own
        return [own[block] for block in leading]

    def publish(self, leading: Sequence[int], block_ids: Sequence[int]) -> list[int]:
        """Make blocks findable; where one belongs to the leading block already, say which.

        Args:
            leading: ``n`` published blocks of the leading group.
            block_ids: ``n`` blocks that hold the same tokens.

        Returns:
            ``n`` ids, the block that is found from now on: the given one, or an older twin.
        """
        own, holders = self._own, []
        for leader, block in zip(leading, block_ids, strict=True):
            holder = own[leader]
            if holder == _NOTHING:
                own[leader] = holder = block
                self._leading[block] = leader
                self._size += 1
            holders.append(holder)
        return holders

    def remove(self, block_ids: Int32Array) -> None:
        """Forget published blocks; raises ``InvariantError``, before any change, for one that is not published or given twice."""
        ids = as_block_ids(block_ids).tolist()
        if len(set(ids)) < len(ids) or any(self._leading[block] == _NOTHING for block in ids):
            raise InvariantError("window cache: only a published block can be removed, and only once")
        for block in ids:
            self._own[self._leading[block]] = _NOTHING
            self._leading[block] = _NOTHING
        self._size -= len(ids)

    def published(self) -> set[int]:
        """All published blocks; O(blocks of the leading group)."""
        return set(self._own) - {_NOTHING}

    def leading(self) -> set[int]:
        """The leading group's blocks that one belongs to; O(blocks)."""
        return set(self._leading) - {_NOTHING}

    def check(self) -> None:
        """Verify that both directions agree; O(blocks). Raises ``InvariantError`` naming what does not."""
        pairs = [(leader, block) for leader, block in enumerate(self._own) if block != _NOTHING]
        for leader, block in pairs:
            if self._leading[block] != leader:
                raise InvariantError(f"window cache: block {block} is found by block {leader}, which it does not belong to")
        if not len(pairs) == self._size == len(self._leading) - self._leading.count(_NOTHING):
            raise InvariantError("window cache: a block belongs to one that it is not found by")
