"""nano-vLLM's block manager under the kit: an adapter, called as its scheduler calls the manager.

    python examples/nano_vllm_adapter.py

Needs nano-vLLM's source on PYTHONPATH, xxhash and transformers. No GPU: its package imports GPU kernels at the top, so only the
bookkeeping is loaded.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pagedkv.testing.manager_check import check_manager


def load(module: str) -> ModuleType:
    """One of its modules, without its package's own imports; raises ``ImportError`` where it is missing."""
    if "nanovllm" not in sys.modules:
        spec = importlib.util.find_spec("nanovllm")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("nanovllm is not importable: put the folder of its source into PYTHONPATH", name="nanovllm")
        package = ModuleType("nanovllm")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["nanovllm"] = package
    return importlib.import_module(f"nanovllm.engine.{module}")


class NanoAdapter:
    """One ``BlockManager`` and its sequences. It has no namespaces."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._sequence = load("sequence").Sequence
        self._sequence.block_size = block_size
        self._manager = load("block_manager").BlockManager(num_blocks, block_size)
        self._seqs: dict[int, Any] = {}

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        seq = self._sequence(list(token_ids))
        num_cached_blocks = self._manager.can_allocate(seq)
        if num_cached_blocks == -1:
            return None
        self._manager.allocate(seq, num_cached_blocks)
        seq.num_scheduled_tokens = seq.num_tokens - seq.num_cached_tokens
        self._seqs[seq_id] = seq
        return int(seq.num_cached_tokens)

    def computed(self, seq_id: int) -> None:
        seq = self._seqs[seq_id]
        self._manager.hash_blocks(seq)
        seq.num_cached_tokens += seq.num_scheduled_tokens
        seq.num_scheduled_tokens = 0

    def append(self, seq_id: int, token_id: int) -> bool:
        seq = self._seqs[seq_id]
        seq.append_token(token_id)
        if not self._manager.can_append(seq):  # its scheduler would preempt; here the token is taken back
            seq.token_ids.pop()
            seq.num_tokens, seq.last_token = seq.num_tokens - 1, seq.token_ids[-1]
            return False
        self._manager.may_append(seq)
        seq.num_scheduled_tokens = 1
        return True

    def block_ids(self, seq_id: int) -> Sequence[int]:
        return list(self._seqs[seq_id].block_table)

    def free(self, seq_id: int) -> None:
        self._manager.deallocate(self._seqs[seq_id])

    def num_free_blocks(self) -> int:
        return len(self._manager.free_block_ids)


if __name__ == "__main__":
    print(check_manager(NanoAdapter, block_sizes=(2, 3, 4)))
