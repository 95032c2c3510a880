"""What a pool of blocks and its prefix cache should do, said with dictionaries; owned by a ``ReferenceManager``.

A block that was given back behind a window is ``GONE``: it stands in a table, and nobody holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagedkv.core import Window

Space = tuple[str, int]  # a namespace, and how often it has been purged
Key = tuple[Space, tuple[int, ...]]  # what a block is found by: all tokens from the beginning up to its end


GONE = 0


@dataclass(slots=True)
class ReferencePool:
    """The blocks of one layer group. A block is a serial number that is never used twice."""

    free: int
    window: Window | None = None
    held: dict[int, int] = field(default_factory=dict)  # block: how many hold it
    idle: dict[int, None] = field(default_factory=dict)  # cached and held by nobody, the least recently let go first
    cache: dict[Key, int] = field(default_factory=dict)
    keys: dict[int, Key] = field(default_factory=dict)
    num_taken: int = 0
    num_evicted: int = 0

    @property
    def available(self) -> int:
        """Blocks that could be taken."""
        return self.free + len(self.idle)

    def reads(self, place: int, num_full: int, size: int) -> bool:
        """Whether a token behind ``num_full`` full blocks of ``size`` sees any of block ``place``."""
        last, position = (place + 1) * size - 1, num_full * size
        if self.window is None:
            return True
        if self.window.kind == "sliding":
            return position - last < self.window.size
        return position // self.window.size <= last // self.window.size

    def take(self, count: int) -> list[int]:
        """Hand out blocks: free ones, then the longest idle ones."""
        for _ in range(count):
            if self.free:
                self.free -= 1
            else:
                oldest = next(iter(self.idle))
                del self.idle[oldest], self.cache[self.keys.pop(oldest)]
                self.num_evicted += 1
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

    def must_copy(self, blocks: Sequence[int]) -> list[bool]:
        """For blocks that are about to be written, each named once for every writer: who must copy it first.

        All must that share a block, less the last one where nobody else is left to read it.
        """
        left, copied = dict(self.held), []
        for block in blocks:
            copied.append(block in self.keys or left[block] > 1)
            left[block] -= copied[-1]
        return copied

    def publish(self, key: Key, block: int) -> int:
        """Make a held block findable, or swap it for the one that is found by this key already; returns the block held from now on."""
        holder = self.cache.setdefault(key, block)
        if holder == block:
            self.keys[block] = key
        else:
            self.hold([holder])
            self.drop([block])
        return holder

    def forget(self, is_doomed: Callable[[Key], bool]) -> int:
        """Make blocks unfindable, and free those that nobody holds; returns how many."""
        doomed = [block for block, key in self.keys.items() if is_doomed(key)]
        for block in doomed:
            del self.cache[self.keys.pop(block)]
            if block in self.idle:
                del self.idle[block]
                self.free += 1
        return len(doomed)
