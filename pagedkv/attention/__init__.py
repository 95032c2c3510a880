"""Reading K/V through block tables: one protocol, several backends. It sees no request and no model."""

from __future__ import annotations

from pagedkv.attention.mask import Mask
from pagedkv.attention.protocol import AttendOptions, AttentionBackend, AttentionSpec, StepAttention
from pagedkv.attention.registry import get_backend

__all__ = ["AttendOptions", "AttentionBackend", "AttentionSpec", "Mask", "StepAttention", "get_backend"]
