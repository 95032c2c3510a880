"""Storage that knows what was written into it: every slot holds whose token it is, and all tokens before it.

What a sequence reads through its block table is compared with its own history, so a stale, missing, foreign or shifted slot shows, whatever
the bookkeeping says about it. Needs neither a tensor nor a model. Method: TensorRT-LLM's fake engine stamps identities in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from pagedkv.testing.violations import ViolationError

EMPTY = 0  # the stamp of a slot that nobody has written, or whose block was given back


class TokenOracle:
    """Stamps for slots, and the slots themselves.

    A stamp is a small number that stands for (namespace, all tokens up to here), and so for the position as well: exact, nothing is hashed
    away. Give each manager under test an oracle of its own.

    Args:
        num_blocks: blocks of each layer group.
        block_size: tokens in a block.

    >>> oracle = TokenOracle([4], 2)
    >>> oracle.write([[2, 3]], oracle.stamps("", [7, 8]))
    >>> oracle.verify(0, [1], oracle.stamps("", [7, 8]))
    >>> oracle.verify(0, [1], oracle.stamps("", [7, 9]))
    Traceback (most recent call last):
        ...
    pagedkv.testing.violations.ViolationError: tokens: group 0, position 1, block 1 holds '' [7, 8], not '' [7, 9]
    """

    def __init__(self, num_blocks: Sequence[int], block_size: int) -> None:
        self._size = block_size
        self._blocks = [[[EMPTY] * block_size for _ in range(count)] for count in num_blocks]
        self._stamps: dict[tuple[int | str, int], int] = {}
        self._origins: list[tuple[int | str, int]] = [("nobody", EMPTY)]

    def stamps(self, namespace: str, tokens: Iterable[int]) -> list[int]:
        """The stamps of a sequence's positions, from the first on; O(tokens)."""
        known, found = self._stamps, []
        place: int | str = namespace
        for token in tokens:
            key = (place, token)
            stamp = known.get(key)
            if stamp is None:
                stamp = known[key] = len(self._origins)
                self._origins.append(key)
            found.append(stamp)
            place = stamp
        return found

    def write(self, slot_mapping: Sequence[Sequence[int]] | npt.NDArray[np.int64], stamps: Sequence[int]) -> None:
        """Store tokens: per layer group ``[T]`` slots, and ``[T]`` stamps."""
        size = self._size
        for blocks, slots in zip(self._blocks, slot_mapping, strict=True):
            for slot, stamp in zip(slots, stamps, strict=True):
                blocks[slot // size][slot % size] = stamp

    def copy_blocks(self, copies: Sequence[npt.NDArray[np.int32]]) -> None:
        """Copy blocks: per layer group ``[C, 2]`` (source, target); all sources are read before a target is written."""
        for blocks, pairs in zip(self._blocks, copies, strict=True):
            read = [(target, list(blocks[source])) for source, target in pairs.tolist()]
            for target, content in read:
                blocks[target] = content

    def poison(self, group: int, block_ids: Iterable[int]) -> None:
        """Wipe blocks that nobody may read any more: whoever reads them nevertheless is told."""
        for block in block_ids:
            self._blocks[group][block] = [EMPTY] * self._size

    def verify(self, group: int, block_table: Sequence[int], stamps: Sequence[int], *, num_gone: int = 0) -> None:
        """Read a sequence's first ``len(stamps)`` positions through its table, but for those in its first ``num_gone`` blocks.

        Raises:
            ViolationError: ``"ownership"`` for a slot that another namespace wrote, ``"tokens"`` for any other that does not hold what it
                should; names the position, the block, and both histories.

        Cost: O(blocks) where all is well.
        """
        length = len(stamps)
        if len(block_table) * self._size < length:
            raise ViolationError("tokens", f"group {group}: {len(block_table)} blocks of {self._size} are too few for {length} tokens")
        first = num_gone * self._size
        read = self._read(group, block_table[num_gone:], length - first)
        if read == stamps[first:]:
            return
        place = next(place for place in range(first, length) if read[place - first] != stamps[place])
        (owner, found), (name, expected) = self._history(read[place - first]), self._history(stamps[place])
        raise ViolationError(
            "tokens" if owner in (name, None) else "ownership",
            f"group {group}, position {place}, block {block_table[place // self._size]} holds "
            f"{'nothing' if owner is None else f'{owner!r} {found}'}, not {name!r} {expected}",
        )

    def _read(self, group: int, block_table: Sequence[int], length: int) -> list[int]:
        """The stamps of the first ``length`` slots of a table that has so many."""
        blocks = self._blocks[group]
        return list(chain.from_iterable([blocks[block] for block in block_table]))[:length]

    def _history(self, stamp: int) -> tuple[str | None, list[int]]:
        """Who wrote it, None for nobody, and the tokens up to it."""
        if stamp == EMPTY:
            return None, []
        tokens = []
        place: int | str = stamp
        while isinstance(place, int):
            place, token = self._origins[place]
            tokens.append(token)
        return place, tokens[::-1]
