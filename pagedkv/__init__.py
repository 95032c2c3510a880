"""pagedkv: a paged K/V cache to embed.

Batched generation starts at ``LLM``; an engine of your own at ``Engine``, or below it at ``pagedkv.core`` (bookkeeping without torch),
``pagedkv.scheduling``, ``pagedkv.storage`` and ``pagedkv.attention``. Names load on first use, so that a part costs only what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedkv.engine import Engine
    from pagedkv.engine_config import EngineConfig
    from pagedkv.errors import PagedKVError
    from pagedkv.generation import CachePool, PagedCache, PagedEncoderDecoderCache
    from pagedkv.llm import LLM
    from pagedkv.models import MemoryPlan, ModelRunner, plan_memory
    from pagedkv.outputs import CompletionOutput, EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
    from pagedkv.pooling import PoolingParams
    from pagedkv.sampling import SamplingParams
    from pagedkv.token_budget import TokenBudget, measure_token_budget
    from pagedkv.usage import EngineStatistics

_HOMES = {
    "LLM": "llm",
    "CachePool": "generation",
    "CompletionOutput": "outputs",
    "EmbeddingOutput": "outputs",
    "EmbeddingRequestOutput": "outputs",
    "Engine": "engine",
    "EngineConfig": "engine_config",
    "EngineStatistics": "usage",
    "MemoryPlan": "models",
    "ModelRunner": "models",
    "PagedCache": "generation",
    "PagedEncoderDecoderCache": "generation",
    "PagedKVError": "errors",
    "PoolingParams": "pooling",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling",
    "TokenBudget": "token_budget",
    "measure_token_budget": "token_budget",
    "plan_memory": "models",
}

__all__ = [
    "LLM",
    "CachePool",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Engine",
    "EngineConfig",
    "EngineStatistics",
    "MemoryPlan",
    "ModelRunner",
    "PagedCache",
    "PagedEncoderDecoderCache",
    "PagedKVError",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "TokenBudget",
    "measure_token_budget",
    "plan_memory",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
