"""vLLM's KV cache manager under the kit: an adapter, called as its scheduler calls the manager. Salts are its namespaces.

    python examples/vllm_adapter.py

Needs vLLM (written for 0.33), and no GPU. vLLM makes the full blocks of a step findable when their slots are allocated, before the step has
run, because its scheduler runs every step that it plans. Here steps may fail, so it is asked to wait, as it does itself for blocks that
come from elsewhere (``delay_cache_blocks``).
"""

from collections.abc import Sequence
from typing import Any

from pagedkv.testing.manager_check import check_manager


class VllmAdapter:
    """One ``KVCacheManager`` with one group of full attention layers."""

    delay_cache_blocks = True

    def __init__(self, num_blocks: int, block_size: int) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        longest = num_blocks * block_size
        self._manager = KVCacheManager(config, max_model_len=longest, scheduler_block_size=block_size, hash_block_size=block_size)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._requests: dict[int, Any] = {}

    def allocate(self, seq_id: int, token_ids: Sequence[int], namespace: str) -> int | None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=1 << 20)
        request = Request(str(seq_id), list(token_ids), params, None, cache_salt=namespace or None, block_hasher=self._hasher)
        blocks, num_found, _ = self._manager.get_computed_blocks(request)
        if self._slots(request, len(token_ids) - num_found, num_found, blocks) is None:
            return None
        self._requests[seq_id] = request
        return int(num_found)

    def computed(self, seq_id: int) -> None:
        request = self._requests[seq_id]
        request.num_computed_tokens = request.num_tokens
        if self.delay_cache_blocks:
            self._manager.cache_blocks(request, request.num_tokens)

    def append(self, seq_id: int, token_id: int) -> bool:
        request = self._requests[seq_id]
        num_hashes = len(request.block_hashes)
        request.append_output_token_ids(token_id)
        if self._slots(request, 1) is not None:
            return True
        request._output_token_ids.pop()  # it has no call that takes a token back: its scheduler would preempt the request
        request._all_token_ids.pop()
        del request.block_hashes[num_hashes:]
        return False

    def block_ids(self, seq_id: int) -> Sequence[int]:
        return list(self._manager.get_block_ids(str(seq_id))[0])

    def free(self, seq_id: int) -> None:
        self._manager.free(self._requests[seq_id])

    def num_free_blocks(self) -> int:
        return int(self._manager.block_pool.get_num_free_blocks())

    def _slots(self, request: Any, num_new: int, num_found: int = 0, blocks: Any = None) -> Any:
        return self._manager.allocate_slots(request, num_new, num_found, blocks, delay_cache_blocks=self.delay_cache_blocks)


if __name__ == "__main__":
    print(check_manager(VllmAdapter, namespaces=True))
