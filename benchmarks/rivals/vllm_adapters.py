"""vLLM's bookkeeping in two more ways than in ``examples/vllm_adapter.py``: as its scheduler calls it, and the pool alone.

Which promise fails here is no verdict on vLLM's engine: it is what an embedder would meet who took the part on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_adapter import VllmAdapter  # in examples/


class VllmAtOnceAdapter(VllmAdapter):
    """Its manager without a delay: blocks may be found before their step has run."""

    delay_cache_blocks = False


class VllmPoolAdapter:
    """Its ``BlockPool`` alone: ``get_new_blocks`` and ``free_blocks``, nothing shared, tables that outlive their sequence."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self._pool = BlockPool(num_blocks, True, block_size)
        self._size = block_size
        self._blocks: dict[int, list[Any]] = {}
        self._lengths: dict[int, int] = {}

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        needed = -(-len(token_ids) // self._size)
        if needed > self.num_free_blocks():
            return None
        self._blocks[seq_id], self._lengths[seq_id] = list(self._pool.get_new_blocks(needed)), len(token_ids)
        return 0

    def computed(self, seq_id: int) -> None:
        """Nothing is shared."""

    def append(self, seq_id: int, token_id: int) -> bool:
        if self._lengths[seq_id] % self._size == 0:
            if not self.num_free_blocks():
                return False
            self._blocks[seq_id] += self._pool.get_new_blocks(1)
        self._lengths[seq_id] += 1
        return True

    def block_ids(self, seq_id: int) -> Sequence[int]:
        return [block.block_id for block in self._blocks[seq_id]]

    def free(self, seq_id: int) -> None:
        self._pool.free_blocks(reversed(self._blocks[seq_id]))

    def num_free_blocks(self) -> int:
        return int(self._pool.get_num_free_blocks())
