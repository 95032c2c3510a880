"""What a block manager must be able to do so that ``check_manager`` can test it: the adapter protocol, and ours as an example of one.

An adapter holds no rule of its own: it translates calls, and its mistakes would be found like the manager's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pagedkv.core import KVCacheManager
from pagedkv.errors import OutOfBlocksError, UnknownHandleError


class ManagerAdapter(Protocol):
    """A fresh block manager with nothing allocated.

    Sequences are named by numbers that are never used again. Blocks are named by numbers from 0 to below the ``num_blocks`` that the
    factory was given; which of them are set aside is the manager's business. Steps may fail: a sequence may
    end before its tokens are stored.
    """

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        """Start a sequence and give it blocks for all its tokens.

        Returns:
            how many of its first tokens were found in cached blocks, so that nobody will write them again; None when too few blocks are
            free: then nothing has changed. For what could never fit, None or any exception.
        """

    def computed(self, seq_id: int) -> None:
        """All known tokens of the sequence are stored: from now on, not before, its full blocks may be found by others."""

    def append(self, seq_id: int, token_id: int) -> bool:
        """Make one more token known and have a slot for it; False when no block is free for it: then nothing has changed."""

    def block_ids(self, seq_id: int) -> Sequence[int]:
        """The sequence's block table: at least the blocks that its known tokens need, in order."""

    def free(self, seq_id: int) -> None:
        """End a sequence. For one that has ended or never began: any exception, or nothing at all, and nothing changes."""

    def num_free_blocks(self) -> int:
        """Blocks that could be handed out now, cached ones that nobody holds included."""


@runtime_checkable
class ForkingAdapter(ManagerAdapter, Protocol):
    """A manager whose sequences can share half-full blocks."""

    def fork(self, seq_id: int, new_seq_id: int) -> None:
        """Start a sequence with the tokens and blocks of another, all of whose tokens are stored. No block is needed for that."""

    def take_copies(self) -> Sequence[tuple[int, int]]:
        """Blocks to copy, (source, target), before what the last ``append`` made room for is written."""


class PagedKVAdapter:
    """``KVCacheManager`` behind the protocol; forks and namespaces included.

    Args:
        num_blocks: blocks of the pool, the null block included.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._manager = KVCacheManager(num_blocks=num_blocks, block_size=block_size, max_num_seqs=64)
        self._handles: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._copies: list[tuple[int, int]] = []

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        """As the protocol says; what could never fit raises ``InvalidRequestError``."""
        opened = self._manager.open([token_ids], [namespace])
        cached = int(opened.num_cached_tokens[0])
        try:
            self._manager.extend(opened.seqs, [len(token_ids) - cached])
        except OutOfBlocksError:
            self._manager.release(opened.seqs)
            return None
        self._handles[seq_id], self._lengths[seq_id] = int(opened.seqs[0]), len(token_ids)
        return cached

    def computed(self, seq_id: int) -> None:
        """As the protocol says."""
        self._manager.complete([self._handle(seq_id)])

    def append(self, seq_id: int, token_id: int) -> bool:
        """As the protocol says; a sequence as long as the pool raises ``InvalidRequestError``."""
        handle = [self._handle(seq_id)]
        self._manager.append(handle, [token_id])
        try:
            extension = self._manager.extend(handle, 1)
        except OutOfBlocksError:
            self._manager.truncate(handle, [self._lengths[seq_id]])
            return False
        self._lengths[seq_id] += 1
        self._copies = [(source, target) for source, target in extension.copies[0].tolist()]
        return True

    def block_ids(self, seq_id: int) -> Sequence[int]:
        """As the protocol says."""
        table, row = self._manager.table, int(self._manager.rows_of([self._handle(seq_id)])[0])
        blocks: list[int] = table.block_tables[0, row, : table.num_blocks[row]].tolist()
        return blocks

    def free(self, seq_id: int) -> None:
        """As the protocol says; a second time raises ``UnknownHandleError``."""
        self._manager.release([self._handle(seq_id)])
        del self._handles[seq_id]

    def num_free_blocks(self) -> int:
        """As the protocol says."""
        return self._manager.num_available_blocks

    def fork(self, seq_id: int, new_seq_id: int) -> None:
        """As the protocol says."""
        self._handles[new_seq_id] = int(self._manager.fork(self._handle(seq_id), 1)[0])
        self._lengths[new_seq_id] = self._lengths[seq_id]

    def take_copies(self) -> Sequence[tuple[int, int]]:
        """As the protocol says."""
        taken, self._copies = self._copies, []
        return taken

    def _handle(self, seq_id: int) -> int:
        if seq_id not in self._handles:
            raise UnknownHandleError(f"sequence {seq_id} is not alive")
        return self._handles[seq_id]
