"""Microseconds of each command of the bookkeeping, over pools of different sizes; part of ``control_plane.py``.

Half of each pool holds cached chains of another namespace, so that maps and arrays are as large as in a cache that has served for a while.
A command's cost may depend on what it is asked for, never on the size of the pool.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter

import numpy as np
from common import Spread

from pagedkv.core import KVCacheManager

BLOCK_SIZE = 16
BATCH = 64
PROMPT = 40  # tokens: two full blocks and a half-full one
LONG_BLOCKS = 128
CHAIN_BLOCKS = 8  # of each chain that fills a pool
EVICT_BLOCKS = 128
VOCAB_SIZE = 32_000
WARMUP_ROUNDS = 3  # pages of memory touched for the first time
OWN = "measured"

OPERATIONS = (
    "open, one a call",
    "open, 64 a call, each",
    "extend, one a call",
    "extend, 64 a call, each",
    "release, one a call",
    "release, 64 a call, each",
    "fork of 2,048 tokens, one a call",
    "fork of 2,048 tokens, 64 a call, each",
    "match, a block",
    "publish a prefill, a block",
    "publish 64 decodes, a block",
    "take free blocks, a block",
    "evict and take, a block",
)


class Operations:
    """One pool, filled and ready to be measured.

    Args:
        num_blocks: size of the pool; at least 1,000.
        seed: of the tokens.
    """

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_blocks = num_blocks
        self._manager = KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=4 * BATCH, max_seq_len=4_096)
        self._fill((num_blocks - 1) // 2)

    def lives(self) -> Iterator[tuple[str, float]]:
        """One round of every operation but taking blocks: names of ``OPERATIONS`` with seconds."""
        yield from self._lives(1, "one a call")
        yield from self._lives(BATCH, "64 a call, each")
        yield from self._long()
        yield from self._decodes()
        self._manager.purge(OWN)

    def taking_free(self) -> Iterator[tuple[str, float]]:
        """One round of taking blocks from the free list."""
        yield "take free blocks, a block", self._take()

    def fill_up(self) -> None:
        """Leave no block free, and all of them cached."""
        self._fill(sum(group.num_free for group in self._manager.statistics().groups) + CHAIN_BLOCKS)

    def taking_evicted(self) -> Iterator[tuple[str, float]]:
        """One round of taking blocks by evicting; needs a pool that is filled up, and leaves it so.

        Raises:
            RuntimeError: nothing was evicted.
        """
        evicted = self._num_evicted()
        yield "evict and take, a block", self._take()
        if self._num_evicted() - evicted != EVICT_BLOCKS:
            raise RuntimeError("the pool was not full: too little was evicted and the figure would mean nothing")
        self._fill(EVICT_BLOCKS + CHAIN_BLOCKS)

    def _prompts(self, count: int, length: int) -> list[np.ndarray]:
        return list(self._rng.integers(0, VOCAB_SIZE, size=(count, length), dtype=np.int32))

    def _fill(self, num_blocks: int) -> None:
        """Leave at least so many more blocks cached and held by nobody, in the common namespace."""
        manager = self._manager
        for begin in range(0, num_blocks // CHAIN_BLOCKS, BATCH):
            count = min(BATCH, num_blocks // CHAIN_BLOCKS - begin)
            length = CHAIN_BLOCKS * BLOCK_SIZE
            seqs = manager.open(self._prompts(count, length)).seqs
            manager.extend(seqs, np.full(count, length, dtype=np.int32))
            manager.complete(seqs)
            manager.release(seqs)

    def _lives(self, count: int, suffix: str) -> Iterator[tuple[str, float]]:
        """Open, prefill and release sequences that nobody has seen before."""
        manager, prompts, names = self._manager, self._prompts(count, PROMPT), [OWN] * count
        lengths = np.full(count, PROMPT, dtype=np.int32)
        began = perf_counter()
        seqs = manager.open(prompts, names).seqs
        opened = perf_counter()
        manager.extend(seqs, lengths)
        extended = perf_counter()
        manager.complete(seqs)
        completed = perf_counter()
        manager.release(seqs)
        released = perf_counter()
        yield f"open, {suffix}", (opened - began) / count
        yield f"extend, {suffix}", (extended - opened) / count
        yield f"release, {suffix}", (released - completed) / count

    def _long(self) -> Iterator[tuple[str, float]]:
        """One long prompt: published, matched again, forked."""
        manager, (prompt,) = self._manager, self._prompts(1, LONG_BLOCKS * BLOCK_SIZE)
        seqs = manager.open([prompt], [OWN]).seqs
        manager.extend(seqs, [len(prompt)])
        began = perf_counter()
        manager.complete(seqs)
        completed = perf_counter()
        match = manager.match(prompt, OWN)
        matched = perf_counter()
        one = manager.fork(int(seqs[0]), 1)
        forked = perf_counter()
        many = manager.fork(int(seqs[0]), BATCH)
        forked_many = perf_counter()
        if match.num_tokens != len(prompt):
            raise RuntimeError(f"{match.num_tokens} of {len(prompt)} tokens were found: the figures would mean nothing")
        manager.release(np.concatenate([seqs, one, many]))
        yield "publish a prefill, a block", (completed - began) / LONG_BLOCKS
        yield "match, a block", (matched - completed) / LONG_BLOCKS
        yield "fork of 2,048 tokens, one a call", forked - matched
        yield "fork of 2,048 tokens, 64 a call, each", (forked_many - forked) / BATCH

    def _decodes(self) -> Iterator[tuple[str, float]]:
        """Sequences whose next token fills a block, all in one step."""
        manager = self._manager
        seqs = manager.open(self._prompts(BATCH, 2 * BLOCK_SIZE - 1), [OWN] * BATCH).seqs
        manager.extend(seqs, np.full(BATCH, 2 * BLOCK_SIZE - 1, dtype=np.int32))
        tokens, ones = np.full(BATCH, 7, dtype=np.int32), np.ones(BATCH, dtype=np.int32)
        manager.complete(seqs, tokens)
        manager.extend(seqs, ones)
        began = perf_counter()
        manager.complete(seqs, tokens)
        completed = perf_counter()
        manager.release(seqs)
        yield "publish 64 decodes, a block", (completed - began) / BATCH

    def _take(self) -> float:
        manager, count = self._manager, 8
        length = EVICT_BLOCKS // count * BLOCK_SIZE
        seqs = manager.open(self._prompts(count, length), [OWN] * count).seqs
        lengths = np.full(count, length, dtype=np.int32)
        began = perf_counter()
        manager.extend(seqs, lengths)
        ended = perf_counter()
        manager.release(seqs)
        return (ended - began) / EVICT_BLOCKS

    def _num_evicted(self) -> int:
        return sum(group.num_evicted for group in self._manager.statistics().groups)


def measure_operations(pool_sizes: Sequence[int], *, repeats: int, seed: int) -> dict[int, dict[str, Spread]]:
    """Microseconds of every operation in every pool.

    The pools stand side by side and take turns, so that a machine that slows down for a while slows all of them.
    """
    pools = {size: Operations(size, seed) for size in pool_sizes}
    seconds: dict[int, dict[str, list[float]]] = {size: {name: [] for name in OPERATIONS} for size in pool_sizes}

    def take_turns(turn: Callable[[Operations], Iterable[tuple[str, float]]], rounds: int) -> None:
        for number in range(WARMUP_ROUNDS + rounds):
            for size, pool in pools.items():
                for name, value in turn(pool):
                    if number >= WARMUP_ROUNDS:
                        seconds[size][name].append(value)

    gc.collect()
    gc.freeze()  # as a server does after start-up, and as the rivals are treated
    try:
        take_turns(Operations.lives, repeats)
        take_turns(Operations.taking_free, repeats)
        for pool in pools.values():
            pool.fill_up()
        take_turns(Operations.taking_evicted, repeats)
    finally:
        gc.unfreeze()
    return {size: {name: Spread.of(values, scale=1e6) for name, values in named.items()} for size, named in seconds.items()}
