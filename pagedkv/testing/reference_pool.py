"""What a pool of blocks and its prefix cache should do, said with dictionaries; owned by a ``ReferenceManager``.

A block that was given back behind a window is ``GONE``: it stands in a table, and nobody holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagedkv.core import Window
from pagedkv.errors import OutOfBlocksError

Space = tuple[str, int]  # a namespace, and how often it has been purged
Key = tuple[Space, tuple[int, ...]]  # what a block is found by: all tokens from the beginning up to its end
GONE = 0


@dataclass(slots=True)
class ReferencePool:
    """The blocks of one layer group. A block is a serial number that is never used twice."""

    free: int
    size: int  # tokens in a block
    window: Window | None = None
    held: dict[int, int] = field(default_factory=dict)  # block: how many hold it
    idle: dict[int, None] = field(default_factory=dict)  # cached and held by nobody, the least recently let go first
    cache: dict[Key, int] = field(default_factory=dict)
    keys: dict[int, Key] = field(default_factory=dict)
    followers: list[ReferencePool] = field(default_factory=list)  # pools that find no more what this one has evicted
    num_taken: int = 0
    num_evicted: int = 0

    # Questions: what there is, what is found, what of it is read.

    @property
    def available(self) -> int:
        """Blocks that could be taken."""
        return self.free + len(self.idle)

    def reads(self, place: int, num_full: int) -> bool:
        """Whether a token behind ``num_full`` full blocks sees any of block ``place``."""
        last, position = (place + 1) * self.size - 1, num_full * self.size
        if self.window is None:
            return True
        if self.window.kind == "sliding":
            return position - last < self.window.size
        return position // self.window.size <= last // self.window.size

    def has(self, keys: Sequence[Key]) -> bool:
        """Whether all is found that a token behind these blocks reads."""
        return all(key in self.cache for place, key in enumerate(keys) if self.reads(place, len(keys)))

    def chain(self, keys: Sequence[Key]) -> list[int]:
        """The blocks that are found by these keys, as a table."""
        return [self.cache[key] if self.reads(place, len(keys)) else GONE for place, key in enumerate(keys)]

    def lacks(self, table: Sequence[int], num_full: int) -> bool:
        """Whether something is gone that a token behind so many full blocks reads."""
        return any(block == GONE and self.reads(place, num_full) for place, block in enumerate(table))

    def check_available(self, count: int) -> None:
        """Raise ``OutOfBlocksError`` where so many could not be taken."""
        if count > self.available:
            raise OutOfBlocksError(needed=count, available=self.available)

    def must_copy(self, blocks: Sequence[int]) -> list[bool]:
        """For blocks that are about to be written, each named once for every writer: who must copy it first.

        All must that share a block, less the last one where nobody else is left to read it.
        """
        left, copied = dict(self.held), []
        for block in blocks:
            copied.append(block in self.keys or left[block] > 1)
            left[block] -= copied[-1]
        return copied

    # Commands over blocks.

    def take(self, count: int) -> list[int]:
        """Hand out blocks: free ones, then the longest idle ones."""
        for _ in range(count):
            if self.free:
                self.free -= 1
            else:
                self._evict(next(iter(self.idle)))
            self.num_taken += 1
            self.held[self.num_taken] = 1
        return list(range(self.num_taken - count + 1, self.num_taken + 1))

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more for each."""
        for block in filter(None, blocks):
            self.idle.pop(block, None)
            self.held[block] = self.held.get(block, 0) + 1

    def drop(self, blocks: Sequence[int]) -> None:
        """One holder less for each, in this order; after its last a block is idle, or free if nobody could find it."""
        for block in filter(None, blocks):
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                if block in self.keys:
                    self.idle[block] = None
                else:
                    self.free += 1

    def forget(self, is_doomed: Callable[[Key], bool]) -> int:
        """Make blocks unfindable, and free those that nobody holds; returns how many."""
        doomed = [block for block, key in self.keys.items() if is_doomed(key)]
        for block in doomed:
            del self.cache[self.keys.pop(block)]
            if block in self.idle:
                del self.idle[block]
                self.free += 1
        return len(doomed)

    def _evict(self, block: int) -> None:
        evicted = self.keys.pop(block)
        del self.idle[block], self.cache[evicted]
        self.num_evicted += 1
        for pool in self.followers:
            pool.forget(lambda key: key == evicted)

    # Commands over one sequence's table.

    def publish(self, table: list[int], keys: Sequence[Key]) -> int:
        """Make its full blocks findable, or swap them for those that are found already; returns how many were swapped."""
        swapped = 0
        for place, key in enumerate(keys):
            block = table[place]
            if block != GONE and block not in self.keys:
                table[place] = self.cache.setdefault(key, block)
                if table[place] == block:
                    self.keys[block] = key
                else:
                    self.hold([table[place]])
                    self.drop([block])
                    swapped += 1
        return swapped

    def retire(self, table: list[int], num_full: int) -> None:
        """Give back the full blocks that are not read any more."""
        for place in range(num_full):
            if not self.reads(place, num_full):
                self.drop([table[place]])
                table[place] = GONE

    def cut(self, table: list[int], num_kept: int) -> None:
        """Give back its last blocks, the very last first."""
        while len(table) > num_kept:
            self.drop([table.pop()])
