"""Blocks inside transformers' own ``model.generate()``: caches to pass to it, and the pool that caches share."""

from __future__ import annotations

from pagedkv.generation.cache import PagedCache
from pagedkv.generation.encoder_decoder import PagedEncoderDecoderCache
from pagedkv.generation.pool import CachePool

__all__ = ["CachePool", "PagedCache", "PagedEncoderDecoderCache"]
