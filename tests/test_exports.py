"""What the package and its parts export: exactly this, each name importable, nothing by accident."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

EXPORTS = {
    "pagedkv": {
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
    },
    "pagedkv.core": {
        "NULL_BLOCK",
        "Allocation",
        "BlockPool",
        "CacheStatistics",
        "CheckLevel",
        "EvictionPolicy",
        "Extension",
        "GroupStatistics",
        "GuardedKVCacheManager",
        "KVCacheManager",
        "LeastRecentlyUsed",
        "Match",
        "Opened",
        "PrefixCache",
        "SequenceSnapshot",
        "SequenceTable",
        "Snapshot",
        "Window",
    },
    "pagedkv.scheduling": {
        "Assignment",
        "Branch",
        "Candidate",
        "Event",
        "EventKind",
        "FinishReason",
        "FirstComeFirstServed",
        "LongestCachedPrefix",
        "MissReason",
        "Priority",
        "Request",
        "RequestRecord",
        "Scheduler",
        "SchedulerConfig",
        "SchedulingPolicy",
        "Status",
        "WaitReason",
    },
    "pagedkv.storage": {"BatchBuilder", "KVStorage", "LayerPool", "LayerSpec", "Source", "StateSpec", "StateStorage", "StepBatch"},
    "pagedkv.attention": {"AttendOptions", "AttentionBackend", "AttentionSpec", "Mask", "StepAttention", "get_backend"},
    "pagedkv.models": {
        "CACHE_ARGUMENT",
        "PROCESSOR_OPTIONS",
        "AdaptedModel",
        "MemoryPlan",
        "ModelRunner",
        "PackingReport",
        "SelfCheck",
        "TierName",
        "TierReport",
        "build_processors",
        "classify_mask",
        "load_model",
        "load_tokenizer",
        "plan_memory",
        "product_dtype",
        "split_options",
        "why_not_packable",
    },
    "pagedkv.generation": {"CachePool", "PagedCache", "PagedEncoderDecoderCache"},
    "pagedkv.sampling": {
        "IncrementalDetokenizer",
        "Logprob",
        "SampledTokens",
        "Sampler",
        "SamplingParams",
        "StopStrings",
        "TokenHistories",
        "TokenLogprobs",
        "Tokenizer",
        "encode_bad_words",
        "prompt_logprobs",
        "stream",
        "token_logprobs",
        "uniforms",
    },
}
# Names that a module has anyway.
INCIDENTAL = {"annotations", "import_module", "TYPE_CHECKING"}


def public_names(module: ModuleType) -> set[str]:
    """What a user sees who looks into the module, without its submodules."""
    names = {name for name in dir(module) if not name.startswith("_")}
    return {name for name in names if not isinstance(getattr(module, name), ModuleType)} - INCIDENTAL


@pytest.mark.parametrize("name", EXPORTS)
def test_all_is_exactly_what_is_meant(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) == EXPORTS[name]
    assert len(module.__all__) == len(EXPORTS[name])


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_importable_and_nothing_else_is_public(name: str) -> None:
    module = importlib.import_module(name)
    for export in EXPORTS[name]:
        assert getattr(module, export) is not None
    assert public_names(module) == EXPORTS[name]


@pytest.mark.parametrize("name", ["pagedkv", "pagedkv.sampling"])
def test_lazy_module_refuses_unknown_names(name: str) -> None:
    module = importlib.import_module(name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
    assert set(EXPORTS[name]) <= set(dir(module))


def test_errors_export_one_tree() -> None:
    errors = importlib.import_module("pagedkv.errors")
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    assert {each.__name__ for each in classes} == {
        "ClosedError",
        "ConfigError",
        "DuplicateRequestError",
        "HandleError",
        "InvalidRequestError",
        "InvariantError",
        "OutOfBlocksError",
        "PagedKVError",
        "PoolAllocationError",
        "RequestTooLargeError",
        "StaleHandleError",
        "StepError",
        "TraceError",
        "UnknownHandleError",
        "UnsupportedBackendError",
        "UnsupportedModelError",
    }
    assert all(issubclass(each, errors.PagedKVError) for each in classes)
    tree = (errors.__doc__ or "").split("\n")
    assert all(any(each.__name__ in line for line in tree) for each in classes)
