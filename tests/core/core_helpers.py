"""Short forms that the core's tests share."""

from __future__ import annotations

import numpy as np

from pagedkv.core import KVCacheManager
from pagedkv.plan import Int32Array


def ids(*block_ids: int) -> Int32Array:
    """Block ids, or tokens, as the core takes them."""
    return np.array(block_ids, dtype=np.int32)


def make_manager(num_blocks: int | list[int] = 17, *, block_size: int = 4, max_num_seqs: int = 4, **options: object) -> KVCacheManager:
    """A small manager: 16 usable blocks of 4 tokens, unless told otherwise."""
    return KVCacheManager(num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, **options)  # type: ignore[arg-type]


def compute(manager: KVCacheManager, seq: int, next_token: int = -1) -> None:
    """One step that computes all that the sequence knows, and may append a token."""
    row = int(manager.rows_of([seq])[0])
    left = int(manager.table.num_tokens[row] - manager.table.num_reserved[row])
    manager.extend([seq], [left])
    manager.complete([seq], [next_token])


def start(manager: KVCacheManager, prompt: list[int], namespace: str = "", next_token: int = -1) -> int:
    """Open a sequence and compute its prompt; returns its handle."""
    (seq,) = manager.open([prompt], [namespace]).seqs.tolist()
    compute(manager, seq, next_token)
    return seq


def blocks_of(manager: KVCacheManager, seq: int, group: int = 0) -> list[int]:
    """The block table of a sequence."""
    (snapshot,) = (each for each in manager.snapshot().sequences if each.seq == seq)
    return list(snapshot.block_tables[group])


def cached(manager: KVCacheManager, prompt: list[int], namespace: str = "") -> int:
    """How many tokens of a prompt are findable."""
    return manager.match(prompt, namespace).num_tokens


def copies_of(manager: KVCacheManager, seqs: list[int], count: int = 1) -> list[list[int]]:
    """Extend and complete; returns the copies that had to be made."""
    extension = manager.extend(seqs, count)
    manager.complete(seqs)
    manager.check()
    return [pair for copies in extension.copies for pair in copies.tolist()]
