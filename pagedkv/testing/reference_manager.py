"""What a ``KVCacheManager`` should do, said again with dictionaries: slow, plain, and written without looking at its arrays.

A block here has a name of its own, and a published block is found by its whole path of tokens, not by its parent. So the two can agree only
on the *shape*: which positions share a block, how many blocks are free, evictable, held and cached, what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress

from pagedkv.core import Window
from pagedkv.testing.reference_pool import Key, ReferencePool, Space
from pagedkv.testing.reference_sequence import Twin


class ReferenceManager:
    """Mirrors the commands of ``KVCacheManager``, for valid arguments; handles are the ones that the real one gave out."""

    def __init__(self, num_blocks: Sequence[int], block_size: int, windows: Sequence[Window | None], *, prefix_caching: bool) -> None:
        self.groups = [ReferencePool(count - 1, block_size, window) for count, window in zip(num_blocks, windows, strict=True)]
        self.groups[0].followers = [group for group in self.groups[1:] if group.window is not None]
        self.size, self.caching = block_size, prefix_caching
        self.seqs: dict[int, Twin] = {}
        self.pins: dict[int, list[list[int]]] = {}
        self.purges: Counter[str] = Counter()
        self.num_hit_tokens = self.num_deduplicated = self.num_copies = 0

    def match(self, tokens: list[int], name: str) -> list[list[int]]:
        """The longest cached prefix of which every group has what is read behind it: its blocks in each."""
        keys = self._keys((name, self.purges[name]), tokens)
        while not all(group.has(keys) for group in self.groups):
            del keys[-1]
        return [group.chain(keys) for group in self.groups]

    def open(self, prompts: list[list[int]], names: list[str], handles: list[int]) -> list[int]:
        """Start sequences; returns how many tokens of each were found."""
        for handle, prompt, name in zip(handles, prompts, names, strict=True):
            chains = self.match(prompt[:-1], name)
            self._hold(chains)
            found = len(chains[0]) * self.size
            self.num_hit_tokens += found
            self.seqs[handle] = Twin(name, (name, self.purges[name]) if self.caching else None, list(prompt), chains, found, found)
        return [self.seqs[handle].computed for handle in handles]

    def extend(self, handles: list[int], counts: list[int]) -> list[int]:
        """Reserve; returns the blocks needed of each group, raises ``OutOfBlocksError`` for the first that has not so many."""
        twins = [self.seqs[handle] for handle in handles]
        missing = [-(-(twin.reserved + count) // self.size) - len(twin.tables[0]) for twin, count in zip(twins, counts, strict=True)]
        writers = [twin for twin in twins if twin.reserved % self.size]
        copying = [group.must_copy([twin.tables[index][-1] for twin in writers]) for index, group in enumerate(self.groups)]
        needed = [sum(missing) + sum(must_copy) for must_copy in copying]
        for group, count in zip(self.groups, needed, strict=True):
            group.check_available(count)
        for index, (group, must_copy) in enumerate(zip(self.groups, copying, strict=True)):
            for twin, target in zip(compress(writers, must_copy), group.take(sum(must_copy)), strict=True):
                group.drop([twin.tables[index].pop()])
                twin.tables[index].append(target)
                twin.copy_pending = True
            self.num_copies += sum(must_copy)
        for index, group in enumerate(self.groups):
            for twin, more in zip(twins, missing, strict=True):
                twin.tables[index] += group.take(more)
        for twin, count in zip(twins, counts, strict=True):
            twin.reserved += count
        return needed

    def complete(self, handles: list[int], next_tokens: list[int]) -> None:
        """All that is reserved is computed; full blocks become findable, or give way to a twin; what is not read on is given back."""
        for handle, token in zip(handles, next_tokens, strict=True):
            twin = self.seqs[handle]
            twin.computed, twin.copy_pending = twin.reserved, False
            twin.tokens += [token] if token >= 0 else []
        for twin in (self.seqs[handle] for handle in handles):
            keys = [] if twin.space is None else self._keys(twin.space, twin.tokens[: twin.computed])
            self.num_deduplicated += sum(group.publish(table, keys) for group, table in zip(self.groups, twin.tables, strict=True))
        for twin in (self.seqs[handle] for handle in handles):
            for group, table in zip(self.groups, twin.tables, strict=True):
                group.retire(table, twin.computed // self.size)

    def cancel(self, handles: list[int]) -> None:
        """Nothing of what is reserved was computed, and no copy can be relied on."""
        for twin in (self.seqs[handle] for handle in reversed(handles)):
            self._cut(twin, twin.sure(self.size))

    def can_truncate(self, handle: int, length: int) -> bool:
        """Whether nothing is gone that would not be gone behind so many tokens."""
        twin = self.seqs[handle]
        full = min(twin.computed, length) // self.size
        return not any(group.lacks(table, full) for group, table in zip(self.groups, twin.tables, strict=True))

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
        space = name, self.purges[name]
        self.purges[name] += 1
        for twin in self.seqs.values():
            twin.space = None if twin.space == space else twin.space
        return sum(group.forget(lambda key: key[0] == space) for group in self.groups)

    def distrust(self, handles: list[int]) -> int:
        """Forget all that begins with the first block of one of these, and let nobody who holds it publish; returns how many blocks."""
        starts = [start for handle in handles if (start := self.seqs[handle].start(self.size))]
        for twin in self.seqs.values():
            twin.space = None if twin.start(self.size) in starts else twin.space
        return sum(group.forget(lambda key: (key[0], key[1][: self.size]) in starts) for group in self.groups)

    def _keys(self, space: Space, tokens: list[int]) -> list[Key]:
        """What each full block of these tokens is found by."""
        return [(space, tuple(tokens[:end])) for end in range(self.size, len(tokens) + 1, self.size)]

    def _hold(self, chains: list[list[int]]) -> None:
        for group, chain in zip(self.groups, chains, strict=True):
            group.hold(chain)

    def _cut(self, twin: Twin, length: int) -> None:
        for group, table in zip(self.groups, twin.tables, strict=True):
            group.cut(table, -(-length // self.size))
        twin.reserved = twin.computed = length
        twin.copy_pending = False
