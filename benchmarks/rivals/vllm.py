"""vLLM's scheduler and KV cache manager, unchanged, without executor, model or inter-process queues.

Built and driven as its ``EngineCore`` does it: prefix caching on with the default hash, ``schedule``, then ``update_from_output``;
environment cached, statistics off, the synchronous scheduler. A one-layer model configuration in a temporary folder stands in for a
model: nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where `rivals` is found; this folder would hide the real vllm

from rivals.workload import BLOCK_SIZE, VOCAB_SIZE, DecodeHarness, Workload, measure, report_main

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "bfloat16",
}


def available() -> str | None:
    """None when the scheduler can be imported, else the reason."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed in this interpreter"
    try:
        with _quiet():
            importlib.import_module("vllm.v1.core.sched.scheduler")
    except ImportError as error:
        return f"vllm does not import: {error}"
    return None


def decode_step_times(num_running: int, steps: int, seed: int) -> list[float]:
    """Seconds per planned and completed decode step."""
    with _quiet():
        return measure(Workload(num_running, steps, seed), VllmHarness)


def version() -> str:
    """Its version."""
    import vllm

    return str(vllm.__version__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its log lines go to standard output by default; there they would mix with the figures."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _config(workload: Workload, folder: str) -> Any:
    import vllm.platforms

    if vllm.platforms.current_platform.device_type == "":  # a build for GPUs where there is none: its scheduler needs no device
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms.current_platform = CpuPlatform()
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig

    Path(folder, "config.json").write_text(json.dumps(MODEL_CONFIG))
    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=workload.max_model_len, seed=0)
    cache = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True)
    scheduler = SchedulerConfig(
        max_num_seqs=workload.num_running,
        max_num_batched_tokens=max(workload.num_prompt_tokens, workload.max_model_len),
        max_model_len=workload.max_model_len,
        is_encoder_decoder=False,
        enable_chunked_prefill=True,
        async_scheduling=False,
    )
    config = VllmConfig(model_config=model, cache_config=cache, scheduler_config=scheduler)
    config.cache_config.num_gpu_blocks = workload.num_blocks
    return config


def _kv_cache_config(workload: Workload) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    return KVCacheConfig(num_blocks=workload.num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])


class VllmHarness(DecodeHarness):
    """Its scheduler as ``EngineCore.step`` drives it."""

    def __init__(self, workload: Workload) -> None:
        from vllm.envs import enable_envs_cache
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        with tempfile.TemporaryDirectory() as folder:
            config = _config(workload, folder)
        self._scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=_kv_cache_config(workload),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=False,
        )
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
        self._workload = workload
        self._rng = workload.sampled()
        enable_envs_cache()

    def prefill(self) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        for number, prompt in enumerate(self._workload.prompts()):
            params = SamplingParams(max_tokens=self._workload.max_new_tokens, ignore_eos=True)
            self._scheduler.add_request(Request(str(number), prompt, params, None, block_hasher=self._hasher))
        while self._scheduler.get_request_counts()[1]:
            plan = self.plan()
            self.complete(plan, self.answer(plan))

    def plan(self) -> Any:
        return self._scheduler.schedule()

    def answer(self, plan: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(plan.num_scheduled_tokens)
        tokens = [[self._rng.randrange(VOCAB_SIZE)] for _ in ids]
        return ModelRunnerOutput(req_ids=ids, req_id_to_index={name: index for index, name in enumerate(ids)}, sampled_token_ids=tokens)

    def complete(self, plan: Any, answer: Any) -> None:
        self._scheduler.update_from_output(plan, answer)

    def num_running(self, plan: Any) -> int:
        return sum(count == 1 for count in plan.num_scheduled_tokens.values())


if __name__ == "__main__":
    report_main(__doc__.splitlines()[0], available=available, version=version, times=decode_step_times)
