"""The bytes: pools of K/V blocks on a device, and a step plan as device tensors. It knows no request and no kernel."""

from __future__ import annotations

from pagedkv.storage.batch import BatchBuilder, StepBatch
from pagedkv.storage.pool import LayerPool
from pagedkv.storage.source import Source
from pagedkv.storage.spec import LayerSpec
from pagedkv.storage.state import StateSpec, StateStorage
from pagedkv.storage.storage import KVStorage

__all__ = ["BatchBuilder", "KVStorage", "LayerPool", "LayerSpec", "Source", "StateSpec", "StateStorage", "StepBatch"]
