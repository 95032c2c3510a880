"""What a ``KVCacheManager`` should do, said again with dictionaries: slow, plain, and written without looking at its arrays.

A block here has a name of its own, and a published block is found by its whole path of tokens, not by its parent. So the two can agree only
on the *shape*: which positions share a block, how many blocks are free, evictable, held and cached, what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from pagedkv.core import Window
from pagedkv.errors import OutOfBlocksError
from pagedkv.testing.reference_pool import GONE, ReferencePool, Space
from pagedkv.testing.reference_sequence import Twin


class ReferenceManager:
    """Mirrors the commands of ``KVCacheManager``, for valid arguments; handles are the ones that the real one gave out."""

    def __init__(
        self, num_blocks: Sequence[int], block_size: int, *, prefix_caching: bool, windows: Sequence[Window | None] | None = None
    ) -> None:
        windows = [None] * len(num_blocks) if windows is None else windows
        self.groups = [ReferencePool(count - 1, window) for count, window in zip(num_blocks, windows, strict=True)]
        self.size, self.caching = block_size, prefix_caching
        self.seqs: dict[int, Twin] = {}
        self.pins: dict[int, list[list[int]]] = {}
        self.purges: dict[str, int] = {}
        self.num_hit_tokens = self.num_deduplicated = self.num_copies = 0

    def match(self, tokens: list[int], name: str) -> list[list[int]]:
        """The longest cached prefix of which every group has what is read behind it: its blocks in each."""
        keys = [(self._space(name), tuple(tokens[:end])) for end in range(self.size, len(tokens) + 1, self.size)]
        for count in range(len(keys), -1, -1):
            found = [
                [group.cache.get(key) if group.reads(place, count, self.size) else GONE for place, key in enumerate(keys[:count])]
                for group in self.groups
            ]
            if not any(None in chain for chain in found):
                break
        return [[block for block in chain if block is not None] for chain in found]

    def open(self, prompts: list[list[int]], names: list[str], handles: list[int]) -> list[int]:
        """Start sequences; returns how many tokens of each were found."""
        for handle, prompt, name in zip(handles, prompts, names, strict=True):
            chains = self.match(prompt[:-1], name)
            self._hold(chains)
            found = len(chains[0]) * self.size
            self.num_hit_tokens += found
            self.seqs[handle] = Twin(name, self._space(name) if self.caching else None, list(prompt), chains, found, found)
        return [self.seqs[handle].computed for handle in handles]

    def extend(self, handles: list[int], counts: list[int]) -> list[int]:
        """Reserve; returns the blocks needed of each group, raises ``OutOfBlocksError`` for the first that has not so many."""
        twins = [self.seqs[handle] for handle in handles]
        ends = [twin.reserved + count for twin, count in zip(twins, counts, strict=True)]
        missing = [-(-end // self.size) - len(twin.tables[0]) for twin, end in zip(twins, ends, strict=True)]
        copying = [self._copying(index, twins) for index in range(len(self.groups))]
        needed = [sum(missing) + len(writers) for writers in copying]
        for group, count in zip(self.groups, needed, strict=True):
            if count > group.available:
                raise OutOfBlocksError(needed=count, available=group.available)
        for index, (group, writers) in enumerate(zip(self.groups, copying, strict=True)):
            for twin, target in zip(writers, self._take(group, len(writers)), strict=True):
                group.drop([twin.tables[index].pop()])
                twin.tables[index].append(target)
                twin.copy_pending = True
            self.num_copies += len(writers)
        for index, group in enumerate(self.groups):
            for twin, more in zip(twins, missing, strict=True):
                twin.tables[index] += self._take(group, more)
        for twin, end in zip(twins, ends, strict=True):
            twin.reserved = end
        return needed

    def complete(self, handles: list[int], next_tokens: list[int]) -> None:
        """All that is reserved is computed; full blocks become findable, or give way to a twin; what is not read on is given back."""
        for handle, token in zip(handles, next_tokens, strict=True):
            twin = self.seqs[handle]
            twin.computed, twin.copy_pending = twin.reserved, False
            twin.tokens += [token] if token >= 0 else []
        for twin in (self.seqs[handle] for handle in handles):
            for group, table in zip(self.groups, twin.tables, strict=True):
                for place in range(twin.computed // self.size):
                    if twin.space is not None and table[place] != GONE and table[place] not in group.keys:
                        block, key = table[place], (twin.space, tuple(twin.tokens[: (place + 1) * self.size]))
                        table[place] = group.publish(key, block)
                        self.num_deduplicated += table[place] != block
        for twin in (self.seqs[handle] for handle in handles):
            for group, table in zip(self.groups, twin.tables, strict=True):
                for place in range(twin.computed // self.size):
                    if not group.reads(place, twin.computed // self.size, self.size):
                        group.drop([table[place]])
                        table[place] = GONE

    def cancel(self, handles: list[int]) -> None:
        """Nothing of what is reserved was computed, and no copy can be relied on."""
        for twin in (self.seqs[handle] for handle in reversed(handles)):
            self._cut(twin, twin.sure(self.size))

    def can_truncate(self, handle: int, length: int) -> bool:
        """Whether nothing is gone that would not be gone behind so many tokens."""
        twin = self.seqs[handle]
        full = min(twin.computed, length) // self.size
        gone = [
            (group, place) for group, table in zip(self.groups, twin.tables, strict=True) for place, block in enumerate(table) if not block
        ]
        return not any(group.reads(place, full, self.size) for group, place in gone)

    def truncate(self, handle: int, length: int) -> None:
        """Forget known tokens."""
        twin = self.seqs[handle]
        del twin.tokens[length:]
        self._cut(twin, min(twin.sure(self.size), length))

    def fork(self, handle: int, children: list[int]) -> None:
        """Share everything."""
        for child in children:
            self.seqs[child] = self.seqs[handle].copy()
            self._hold(self.seqs[child].tables)

    def release(self, handles: list[int]) -> None:
        """End sequences, tails first."""
        for handle in handles:
            self._cut(self.seqs.pop(handle), 0)

    def pin(self, pin: int, tokens: list[int], name: str) -> int:
        """Hold a cached prefix; returns its tokens."""
        self.pins[pin] = self.match(tokens, name)
        self._hold(self.pins[pin])
        return len(self.pins[pin][0]) * self.size

    def unpin(self, pin: int) -> None:
        """Let go of a pin."""
        for group, chain in zip(self.groups, self.pins.pop(pin), strict=True):
            group.drop(chain[::-1])

    def purge(self, name: str) -> int:
        """Forget what a namespace has published; returns how many blocks that were."""
        space = self._space(name)
        self.purges[name] = space[1] + 1
        for twin in self.seqs.values():
            twin.space = None if twin.space == space else twin.space
        return sum(group.forget(lambda key: key[0] == space) for group in self.groups)

    def distrust(self, handles: list[int]) -> int:
        """Forget all that begins with the first block of one of these, and let nobody who holds it publish; returns how many blocks."""
        size = self.size
        starts = [start for start in (self.seqs[handle].start(size) for handle in handles) if start]
        for twin in self.seqs.values():
            twin.space = None if twin.start(size) in starts else twin.space
        return sum(group.forget(lambda key: (key[0], key[1][:size]) in starts) for group in self.groups)

    def _space(self, name: str) -> Space:
        return name, self.purges.get(name, 0)

    def _take(self, group: ReferencePool, count: int) -> list[int]:
        """Take blocks; what the first group finds no more, no windowed group does."""
        taken = group.take(count)
        for other in self.groups:
            if other.window is not None and group is self.groups[0]:
                other.forget(lambda key: key not in group.cache)
        return taken

    def _hold(self, chains: list[list[int]]) -> None:
        for group, chain in zip(self.groups, chains, strict=True):
            group.hold(chain)

    def _copying(self, index: int, twins: list[Twin]) -> list[Twin]:
        """Who must copy its half-full last block before it writes there."""
        writers = [twin for twin in twins if twin.reserved % self.size]
        return list(compress(writers, self.groups[index].must_copy([twin.tables[index][-1] for twin in writers])))

    def _cut(self, twin: Twin, length: int) -> None:
        for group, table in zip(self.groups, twin.tables, strict=True):
            while len(table) > -(-length // self.size):
                group.drop([table.pop()])
        twin.reserved = twin.computed = length
        twin.copy_pending = False
