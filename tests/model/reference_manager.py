"""What a ``KVCacheManager`` should do, said again with dictionaries and lists: slow, plain, and written without looking at its arrays.

A block is an object here, not a number; a published block is found by its whole token path, not by its parent. So the two can only agree on
the *shape*: which positions share a block, how many blocks are free, evictable, held and cached, what was found, copied and evicted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Space = tuple[str, int]  # a namespace and how often it has been purged
Key = tuple[Space, tuple[int, ...]]


class Block:
    """One block; ``key`` says under which path it is findable."""

    def __init__(self) -> None:
        self.key: Key | None = None


class RefusedError(Exception):
    """The command must be refused for lack of blocks."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed, self.available = needed, available


@dataclass
class Group:
    """The blocks of one layer group."""

    free: int
    holders: Counter[Block] = field(default_factory=Counter)
    idle: list[Block] = field(default_factory=list)  # cached and held by nobody, least recently let go first
    cache: dict[Key, Block] = field(default_factory=dict)
    num_evicted: int = 0

    @property
    def available(self) -> int:
        return self.free + len(self.idle)

    def take(self) -> Block:
        if self.free:
            self.free -= 1
        else:
            self.unpublish(self.idle.pop(0))
            self.num_evicted += 1
        block = Block()
        self.holders[block] = 1
        return block

    def hold(self, block: Block) -> None:
        if block in self.idle:
            self.idle.remove(block)
        self.holders[block] += 1

    def drop(self, block: Block) -> None:
        self.holders[block] -= 1
        if self.holders[block]:
            return
        del self.holders[block]
        if block.key is None:
            self.free += 1
        else:
            self.idle.append(block)

    def unpublish(self, block: Block) -> None:
        assert block.key is not None
        del self.cache[block.key]
        block.key = None

    def purge(self, space: Space) -> int:
        gone = [block for key, block in self.cache.items() if key[0] == space]
        for block in gone:
            self.unpublish(block)
            if block in self.idle:
                self.idle.remove(block)
                self.free += 1
        return len(gone)


@dataclass
class Sequence:
    """One live sequence; ``space`` is None when it may not publish any more."""

    name: str
    space: Space | None
    tokens: list[int]
    tables: list[list[Block]]
    reserved: int = 0
    computed: int = 0
    copy_pending: bool = False


class ReferenceManager:
    """Mirrors the commands of ``KVCacheManager``; handles are the ones that the real one gave out."""

    def __init__(self, num_blocks: list[int], block_size: int, max_num_seqs: int, *, caching: bool) -> None:
        self.groups = [Group(free=count - 1) for count in num_blocks]
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.caching = caching
        self.seqs: dict[int, Sequence] = {}
        self.pins: dict[int, list[list[Block]]] = {}
        self.epochs: Counter[str] = Counter()
        self.num_hit_tokens = self.num_deduplicated = self.num_copies = 0

    def match(self, tokens: list[int], name: str) -> list[list[Block]]:
        """The blocks of the longest cached prefix, per group."""
        if not self.caching:
            return [[] for _ in self.groups]
        space = (name, self.epochs[name])
        chains = []
        for group in self.groups:
            chain: list[Block] = []
            while (end := (len(chain) + 1) * self.block_size) <= len(tokens) and (space, tuple(tokens[:end])) in group.cache:
                chain.append(group.cache[space, tuple(tokens[:end])])
            chains.append(chain)
        length = min(map(len, chains))
        return [chain[:length] for chain in chains]

    def open(self, prompts: list[list[int]], names: list[str], handles: list[int]) -> list[int]:
        """Start sequences; returns how many tokens of each were found."""
        matches = [self.match(prompt[:-1], name) for prompt, name in zip(prompts, names, strict=True)]
        found = []
        for prompt, name, handle, match in zip(prompts, names, handles, matches, strict=True):
            for group, chain in zip(self.groups, match, strict=True):
                for block in chain:
                    group.hold(block)
            computed = len(match[0]) * self.block_size
            space = (name, self.epochs[name]) if self.caching else None
            self.seqs[handle] = Sequence(name, space, list(prompt), [list(chain) for chain in match], computed, computed)
            self.num_hit_tokens += computed
            found.append(computed)
        return found

    def needed(self, handles: list[int], counts: list[int]) -> list[int]:
        """Blocks that ``extend`` takes from each group."""
        missing = sum(self._missing(self.seqs[handle], count) for handle, count in zip(handles, counts, strict=True))
        return [missing + len(self._copying(index, handles)) for index in range(len(self.groups))]

    def extend(self, handles: list[int], counts: list[int]) -> None:
        """Reserve; raises ``RefusedError`` with the figures of the first group that is too small."""
        for group, needed in zip(self.groups, self.needed(handles, counts), strict=True):
            if needed > group.available:
                raise RefusedError(needed, group.available)
        for index, group in enumerate(self.groups):
            copying = [self.seqs[handle] for handle in self._copying(index, handles)]
            targets = [group.take() for _ in copying]
            for seq, target in zip(copying, targets, strict=True):
                group.drop(seq.tables[index].pop())
                seq.tables[index].append(target)
                seq.copy_pending = True
            self.num_copies += len(copying)
        missing = [self._missing(self.seqs[handle], count) for handle, count in zip(handles, counts, strict=True)]
        for index, group in enumerate(self.groups):
            for handle, more in zip(handles, missing, strict=True):
                self.seqs[handle].tables[index] += [group.take() for _ in range(more)]
        for handle, count in zip(handles, counts, strict=True):
            self.seqs[handle].reserved += count

    def complete(self, handles: list[int], next_tokens: list[int]) -> None:
        """Everything reserved is computed; full blocks become findable, or give way to a twin that is."""
        for handle, token in zip(handles, next_tokens, strict=True):
            seq = self.seqs[handle]
            seq.computed, seq.copy_pending = seq.reserved, False
            if token >= 0:
                seq.tokens.append(token)
        for handle in handles:
            seq = self.seqs[handle]
            if seq.space is None:
                continue
            for index, group in enumerate(self.groups):
                for place in range(seq.computed // self.block_size):
                    self._publish(group, seq.tables[index], place, (seq.space, tuple(seq.tokens[: (place + 1) * self.block_size])))

    def cancel(self, handles: list[int]) -> None:
        """Nothing of what is reserved was computed, and no copy can be relied on."""
        self._cut(handles, [self._sure(self.seqs[handle]) for handle in handles])

    def truncate(self, handles: list[int], lengths: list[int]) -> None:
        """Forget known tokens."""
        sure = [min(self._sure(self.seqs[handle]), length) for handle, length in zip(handles, lengths, strict=True)]
        for handle, length in zip(handles, lengths, strict=True):
            del self.seqs[handle].tokens[length:]
        self._cut(handles, sure)

    def fork(self, handle: int, children: list[int]) -> None:
        """Share everything."""
        seq = self.seqs[handle]
        for child in children:
            for group, table in zip(self.groups, seq.tables, strict=True):
                for block in table:
                    group.hold(block)
            self.seqs[child] = Sequence(
                seq.name, seq.space, list(seq.tokens), [list(table) for table in seq.tables], seq.reserved, seq.computed
            )

    def release(self, handles: list[int]) -> None:
        """End sequences, tails first."""
        for index, group in enumerate(self.groups):
            for handle in handles:
                for block in reversed(self.seqs[handle].tables[index]):
                    group.drop(block)
        for handle in handles:
            del self.seqs[handle]

    def pin(self, pin: int, tokens: list[int], name: str) -> int:
        """Hold a cached prefix; returns its tokens."""
        chains = self.match(tokens, name)
        for group, chain in zip(self.groups, chains, strict=True):
            for block in chain:
                group.hold(block)
        self.pins[pin] = chains
        return len(chains[0]) * self.block_size

    def unpin(self, pin: int) -> None:
        """Let go of a pin."""
        for group, chain in zip(self.groups, self.pins.pop(pin), strict=True):
            for block in reversed(chain):
                group.drop(block)

    def purge(self, name: str) -> int:
        """Forget what a namespace has published."""
        space = (name, self.epochs[name])
        self.epochs[name] += 1
        for seq in self.seqs.values():
            if seq.space == space:
                seq.space = None
        return sum(group.purge(space) for group in self.groups)

    def _sure(self, seq: Sequence) -> int:
        return seq.computed // self.block_size * self.block_size if seq.copy_pending else seq.computed

    def _missing(self, seq: Sequence, count: int) -> int:
        return -(-(seq.reserved + count) // self.block_size) - len(seq.tables[0])

    def _copying(self, index: int, handles: list[int]) -> list[int]:
        """Who must copy its half-full last block: all that share it, less the last one where nobody else is left to read it."""
        group = self.groups[index]
        writers = [handle for handle in handles if self.seqs[handle].reserved % self.block_size]
        copying = []
        for place, handle in enumerate(writers):
            tail = self.seqs[handle].tables[index][-1]
            others = sum(self.seqs[other].tables[index][-1] is tail for other in writers)
            left = any(self.seqs[other].tables[index][-1] is tail for other in writers[place + 1 :])
            if tail.key is not None or (group.holders[tail] > 1 and (left or others < group.holders[tail])):
                copying.append(handle)
        return copying

    def _publish(self, group: Group, table: list[Block], place: int, key: Key) -> None:
        block = table[place]
        if block.key is not None:
            return
        twin = group.cache.setdefault(key, block)
        if twin is block:
            block.key = key
            return
        group.hold(twin)
        group.drop(block)
        table[place] = twin
        self.num_deduplicated += 1

    def _cut(self, handles: list[int], lengths: list[int]) -> None:
        for handle, length in reversed(list(zip(handles, lengths, strict=True))):
            seq = self.seqs[handle]
            for index, group in enumerate(self.groups):
                while len(seq.tables[index]) > -(-length // self.block_size):
                    group.drop(seq.tables[index].pop())
            seq.reserved = seq.computed = length
            seq.copy_pending = False
