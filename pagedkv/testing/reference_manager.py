"""What a ``KVCacheManager`` should do, said again with dictionaries: slow, plain, and written without looking at its arrays.

A block here is a serial number that is never used twice, and a published block is found by its whole path of tokens, not by its parent. So
the two can agree only on the *shape*: which positions share a block, how many blocks are free, evictable, held and cached, what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pagedkv.errors import OutOfBlocksError

Space = tuple[str, int]  # a namespace, and how often it has been purged


@dataclass(slots=True)
class Group:
    """The blocks of one layer group."""

    free: int
    held: dict[int, int] = field(default_factory=dict)  # block: how many hold it
    idle: dict[int, None] = field(default_factory=dict)  # cached and held by nobody, the least recently let go first
    cache: dict[tuple[Space, tuple[int, ...]], int] = field(default_factory=dict)
    keys: dict[int, tuple[Space, tuple[int, ...]]] = field(default_factory=dict)
    num_taken: int = 0
    num_evicted: int = 0

    def take(self) -> int:
        """Hand out a block that is free, or else the longest idle one."""
        if self.free:
            self.free -= 1
        else:
            oldest = next(iter(self.idle))
            del self.idle[oldest], self.cache[self.keys.pop(oldest)]
            self.num_evicted += 1
        self.num_taken += 1
        self.held[self.num_taken] = 1
        return self.num_taken

    def hold(self, block: int) -> None:
        """One holder more."""
        self.idle.pop(block, None)
        self.held[block] = self.held.get(block, 0) + 1

    def drop(self, block: int) -> None:
        """One holder less; after the last the block is idle, or free if nobody could find it."""
        self.held[block] -= 1
        if not self.held[block]:
            del self.held[block]
            if block in self.keys:
                self.idle[block] = None
            else:
                self.free += 1


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


class ReferenceManager:
    """Mirrors the commands of ``KVCacheManager``, for valid arguments; handles are the ones that the real one gave out."""

    def __init__(self, num_blocks: Sequence[int], block_size: int, *, prefix_caching: bool) -> None:
        self.groups = [Group(count - 1) for count in num_blocks]
        self.size, self.caching = block_size, prefix_caching
        self.seqs: dict[int, Twin] = {}
        self.pins: dict[int, list[list[int]]] = {}
        self.epochs: dict[str, int] = {}
        self.num_hit_tokens = self.num_deduplicated = self.num_copies = 0

    def match(self, tokens: list[int], name: str) -> list[list[int]]:
        """The longest cached prefix: its blocks in each group."""
        space, size = (name, self.epochs.get(name, 0)), self.size
        chains: list[list[int]] = [[] for _ in self.groups]
        for end in range(size, len(tokens) + 1 if self.caching else 0, size):
            blocks = [group.cache.get((space, tuple(tokens[:end]))) for group in self.groups]
            if None in blocks:
                break
            for chain, block in zip(chains, blocks, strict=True):
                chain += [block] if block is not None else []
        return chains

    def open(self, prompts: list[list[int]], names: list[str], handles: list[int]) -> list[int]:
        """Start sequences; returns how many tokens of each were found."""
        matches = [self.match(prompt[:-1], name) for prompt, name in zip(prompts, names, strict=True)]
        for handle, prompt, name, chains in zip(handles, prompts, names, matches, strict=True):
            for group, chain in zip(self.groups, chains, strict=True):
                for block in chain:
                    group.hold(block)
            found = len(chains[0]) * self.size
            space = (name, self.epochs.get(name, 0)) if self.caching else None
            self.seqs[handle] = Twin(name, space, list(prompt), chains, found, found)
            self.num_hit_tokens += found
        return [self.seqs[handle].computed for handle in handles]

    def extend(self, handles: list[int], counts: list[int]) -> list[int]:
        """Reserve; returns the blocks needed of each group, raises ``OutOfBlocksError`` for the first that has not so many."""
        missing = [-(-(self.seqs[each].reserved + more) // self.size) for each, more in zip(handles, counts, strict=True)]
        missing = [blocks - len(self.seqs[handle].tables[0]) for handle, blocks in zip(handles, missing, strict=True)]
        copying = [self._copying(index, handles) for index in range(len(self.groups))]
        needed = [sum(missing) + len(writers) for writers in copying]
        for group, count in zip(self.groups, needed, strict=True):
            if count > group.free + len(group.idle):
                raise OutOfBlocksError(needed=count, available=group.free + len(group.idle))
        for index, group in enumerate(self.groups):
            copied = [group.take() for _ in copying[index]]
            for twin, target in zip(copying[index], copied, strict=True):
                group.drop(twin.tables[index][-1])
                twin.tables[index][-1] = target
                twin.copy_pending = True
            self.num_copies += len(copied)
            for handle, more in zip(handles, missing, strict=True):
                self.seqs[handle].tables[index] += [group.take() for _ in range(more)]
        for handle, count in zip(handles, counts, strict=True):
            self.seqs[handle].reserved += count
        return needed

    def complete(self, handles: list[int], next_tokens: list[int]) -> None:
        """Everything reserved is computed; full blocks become findable, or give way to a twin that is."""
        for handle, token in zip(handles, next_tokens, strict=True):
            twin = self.seqs[handle]
            twin.computed, twin.copy_pending = twin.reserved, False
            twin.tokens += [token] if token >= 0 else []
        for twin in (self.seqs[handle] for handle in handles):
            for group, table in zip(self.groups, twin.tables, strict=True):
                for place in range(twin.computed // self.size if twin.space is not None else 0):
                    self._publish(group, twin, table, place)

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
        self._cut([(self.seqs[handle], 0) for handle in reversed(handles)])
        for handle in handles:
            del self.seqs[handle]

    def pin(self, pin: int, tokens: list[int], name: str) -> int:
        """Hold a cached prefix; returns its tokens."""
        self.pins[pin] = self.match(tokens, name)
        self._hold(self.pins[pin])
        return len(self.pins[pin][0]) * self.size

    def unpin(self, pin: int) -> None:
        """Let go of a pin."""
        for group, chain in zip(self.groups, self.pins.pop(pin), strict=True):
            for block in reversed(chain):
                group.drop(block)

    def purge(self, name: str) -> int:
        """Forget what a namespace has published; returns how many blocks that were."""
        space = (name, self.epochs.get(name, 0))
        self.epochs[name] = space[1] + 1
        for twin in self.seqs.values():
            twin.space = None if twin.space == space else twin.space
        return self._forget(lambda key: key[0] == space)

    def distrust(self, handles: list[int]) -> int:
        """Forget all that begins with the first block of one of these, and let nobody who holds it publish; returns how many blocks."""
        size = self.size
        doubtful = [self._start(self.seqs[handle]) for handle in handles if self._start(self.seqs[handle])]
        for twin in self.seqs.values():
            twin.space = None if self._start(twin) in doubtful else twin.space
        return self._forget(lambda key: (key[0], key[1][:size]) in doubtful)

    def _start(self, twin: Twin) -> tuple[Space, tuple[int, ...]] | None:
        """What its first block is found by, if it is."""
        return None if twin.space is None or twin.computed < self.size else (twin.space, tuple(twin.tokens[: self.size]))

    def _forget(self, is_doomed: Callable[[tuple[Space, tuple[int, ...]]], bool]) -> int:
        """Make blocks unfindable, and free those that nobody holds."""
        count = 0
        for group in self.groups:
            for block in [block for block, key in group.keys.items() if is_doomed(key)]:
                del group.cache[group.keys.pop(block)]
                count += 1
                if block in group.idle:
                    del group.idle[block]
                    group.free += 1
        return count

    def _hold(self, chains: list[list[int]]) -> None:
        for group, chain in zip(self.groups, chains, strict=True):
            for block in chain:
                group.hold(block)

    def _copying(self, index: int, handles: list[int]) -> list[Twin]:
        """Who must copy its half-full last block: all that share it, less the last one where nobody else is left to read it."""
        group, copying = self.groups[index], []
        writers = [self.seqs[handle] for handle in handles if self.seqs[handle].reserved % self.size]
        left = dict(group.held)
        for twin in writers:
            tail = twin.tables[index][-1]
            if tail in group.keys or left[tail] > 1:
                left[tail] -= 1
                copying.append(twin)
        return copying

    def _publish(self, group: Group, twin: Twin, table: list[int], place: int) -> None:
        block = table[place]
        if block in group.keys or twin.space is None:
            return
        key = (twin.space, tuple(twin.tokens[: (place + 1) * self.size]))
        table[place] = group.cache.setdefault(key, block)
        if table[place] == block:
            group.keys[block] = key
        else:
            group.hold(table[place])
            group.drop(block)
            self.num_deduplicated += 1

    def _cut(self, lengths: list[tuple[Twin, int]]) -> None:
        for index, group in enumerate(self.groups):
            for twin, length in reversed(lengths):
                while len(twin.tables[index]) > -(-length // self.size):
                    group.drop(twin.tables[index].pop())
        for twin, length in lengths:
            twin.reserved = twin.computed = length
            twin.copy_pending = False
