"""The bridge to transformers: the only place that imports it. Models run unmodified; what cannot be run exactly is refused."""

from __future__ import annotations

from pagedkv.models.adapters import AdaptedModel
from pagedkv.models.call import CACHE_ARGUMENT
from pagedkv.models.linear_products import product_dtype, why_not_packable
from pagedkv.models.loading import load_model, load_tokenizer
from pagedkv.models.masks import classify_mask
from pagedkv.models.memory import MemoryPlan, plan_memory
from pagedkv.models.packed_linears import PackingReport
from pagedkv.models.processors import PROCESSOR_OPTIONS, build_processors, split_options
from pagedkv.models.runner import ModelRunner
from pagedkv.models.selfcheck import SelfCheck
from pagedkv.models.tiers import TierName, TierReport

__all__ = [
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
]
