"""What a ``KVCacheManager`` should do, said again with dictionaries: slow, plain, and written without looking at its arrays.

A block here has a name of its own, and a published block is found by its whole path of tokens, not by its parent. So the two can agree only
on the *shape*: which positions share a block, how many blocks are free, evictable, held and cached, what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagedkv.errors import OutOfBlocksError
from pagedkv.testing.reference_pool import Key, ReferencePool, Space


@dataclass(slots=True)
class Twin:
    """One live sequence; ``space`` is None when it may not publish any more."""

    name: str
    space: Space | None
    tokens: list[int]
    tables: list[list[int]]
    reserved: int
    computed: int
    copy_pending: bool = False

    def sure(self, size: int) -> int:
        """Computed tokens that do not depend on a copy that may not have been made."""
        return self.computed // size * size if self.copy_pending else self.computed

    def start(self, size: int) -> Key | None:
        """What its first block is found by, if it is."""
        return None if self.space is None or self.computed < size else (self.space, tuple(self.tokens[:size]))


class ReferenceManager:
    """Mirrors the commands of ``KVCacheManager``, for valid arguments; handles are the ones that the real one gave out."""

    def __init__(self, num_blocks: Sequence[int], block_size: int, *, prefix_caching: bool) -> None:
        self.groups = [ReferencePool(count - 1) for count in num_blocks]
        self.size, self.caching = block_size, prefix_caching
        self.seqs: dict[int, Twin] = {}
        self.pins: dict[int, list[list[int]]] = {}
        self.purges: dict[str, int] = {}
        self.num_hit_tokens = self.num_deduplicated = self.num_copies = 0

    def match(self, tokens: list[int], name: str) -> list[list[int]]:
        """The longest cached prefix: its blocks in each group."""
        found: list[list[int]] = []
        for end in range(self.size, len(tokens) + 1, self.size):
            key = self._space(name), tuple(tokens[:end])
            if not all(key in group.cache for group in self.groups):
                break
            found.append([group.cache[key] for group in self.groups])
        return [[blocks[index] for blocks in found] for index in range(len(self.groups))]

    def open(self, prompts: list[list[int]], names: list[str], handles: list[int]) -> list[int]:
        """Start sequences; returns how many tokens of each were found."""
        matches = [self.match(prompt[:-1], name) for prompt, name in zip(prompts, names, strict=True)]
        for handle, prompt, name, chains in zip(handles, prompts, names, matches, strict=True):
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
            for twin, target in zip(writers, group.take(len(writers)), strict=True):
                group.drop([twin.tables[index].pop()])
                twin.tables[index].append(target)
                twin.copy_pending = True
            self.num_copies += len(writers)
            for twin, more in zip(twins, missing, strict=True):
                twin.tables[index] += group.take(more)
        for twin, end in zip(twins, ends, strict=True):
            twin.reserved = end
        return needed

    def complete(self, handles: list[int], next_tokens: list[int]) -> None:
        """Everything reserved is computed; full blocks become findable, or give way to a twin that is."""
        for handle, token in zip(handles, next_tokens, strict=True):
            twin = self.seqs[handle]
            twin.computed, twin.copy_pending = twin.reserved, False
            twin.tokens += [token] if token >= 0 else []
        for twin in (self.seqs[handle] for handle in handles):
            for group, table in zip(self.groups, twin.tables, strict=True):
                for place in range(twin.computed // self.size):
                    if twin.space is not None and table[place] not in group.keys:
                        block, key = table[place], (twin.space, tuple(twin.tokens[: (place + 1) * self.size]))
                        table[place] = group.publish(key, block)
                        self.num_deduplicated += table[place] != block

    def cancel(self, handles: list[int]) -> None:
        """Nothing of what is reserved was computed, and no copy can be relied on."""
        self._cut([(self.seqs[handle], self.seqs[handle].sure(self.size)) for handle in handles])

    def truncate(self, handle: int, length: int) -> None:
        """Forget known tokens."""
        del self.seqs[handle].tokens[length:]
        self._cut([(self.seqs[handle], min(self.seqs[handle].sure(self.size), length))])

    def fork(self, handle: int, children: list[int]) -> None:
        """Share everything."""
        twin = self.seqs[handle]
        for child in children:
            self.seqs[child] = replace(twin, tokens=list(twin.tokens), tables=[list(table) for table in twin.tables])
            self._hold(twin.tables)

    def release(self, handles: list[int]) -> None:
        """End sequences, tails first."""
        self._cut([(self.seqs.pop(handle), 0) for handle in reversed(handles)])

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

    def _hold(self, chains: list[list[int]]) -> None:
        for group, chain in zip(self.groups, chains, strict=True):
            group.hold(chain)

    def _copying(self, index: int, twins: list[Twin]) -> list[Twin]:
        """Who must copy its half-full last block: all that share it, less the last one where nobody else is left to read it."""
        group, copying = self.groups[index], []
        left = dict(group.held)
        for twin in twins:
            tail = twin.tables[index][-1] if twin.reserved % self.size else None
            if tail is not None and (tail in group.keys or left[tail] > 1):
                left[tail] -= 1
                copying.append(twin)
        return copying

    def _cut(self, lengths: list[tuple[Twin, int]]) -> None:
        for index, group in enumerate(self.groups):
            for twin, length in reversed(lengths):
                while len(twin.tables[index]) > -(-length // self.size):
                    group.drop([twin.tables[index].pop()])
        for twin, length in lengths:
            twin.reserved = twin.computed = length
            twin.copy_pending = False
