"""Blocks and bytes of one pool of caches: who holds which block, where they lie, and for models with an encoder both once more.

Owns the manager and the storage. It does not know caches or forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pagedkv.core import CheckLevel, KVCacheManager
from pagedkv.generation.cross import CrossPool
from pagedkv.generation.trial import Reference
from pagedkv.storage import KVStorage


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the books are: see ``CachePool``."""

    num_blocks: int
    block_size: int
    max_num_seqs: int


class Books:
    """Made for a model that was tried.

    Args:
        reference: what its layers store.
        sizes: blocks and sequences.
        device: of the pools.
        check: what the managers verify.

    Attributes:
        manager, storage: of self attention.
        index: from transformers' layer index to the place in ``storage.layers``.
        cross: of cross attention; None for a decoder alone.
        shared_names: the namespaces whose prefixes several caches share, in the order in which they came.
        peak: the most blocks of self attention that were held at once.
    """

    def __init__(self, reference: Reference, sizes: Sizes, *, device: torch.device, check: CheckLevel) -> None:
        shared: Any = {"num_blocks": sizes.num_blocks, "block_size": sizes.block_size}
        stored: Any = {**shared, "dtype": reference.dtype, "device": device}
        layers = reference.cross_layers
        # The tokens of a decoder do not say what its K and V are where there is an encoder.
        self.manager = KVCacheManager(**shared, max_num_seqs=sizes.max_num_seqs, enable_prefix_caching=not layers, check=check)
        self.storage = KVStorage(reference.layers, **stored)
        self.index = {layer: place for place, layer in enumerate(reference.layer_ids)}
        self.cross: CrossPool | None = None
        if layers:
            self.cross = CrossPool(tuple(layers.values()), list(layers), **stored, max_num_seqs=sizes.max_num_seqs, check=check)
        self.shared_names: dict[str, None] = {}
        self.peak = 0

    @property
    def num_in_use(self) -> int:
        """Blocks of self attention that are held now."""
        return self.manager.num_usable_blocks - self.manager.num_available_blocks

    def note_use(self) -> None:
        """Look for the most blocks."""
        self.peak = max(self.peak, self.num_in_use)

    def forget_shared(self) -> None:
        """Make the prefixes unfindable that several caches share."""
        for name in self.shared_names:
            self.manager.purge(name)

    def fill_free(self, value: float) -> int:
        """Overwrite all blocks that hold nothing; returns how many."""
        pairs = [(self.manager, self.storage)] + ([(self.cross.manager, self.cross.storage)] if self.cross else [])
        count = 0
        for manager, storage in pairs:
            (free,) = manager.free_block_ids()
            storage.fill(free, value)
            count += len(free)
        return count

    def check(self) -> None:
        """Verify the managers; raises ``InvariantError``."""
        self.manager.check()
        if self.cross is not None:
            self.cross.manager.check()

    def close(self) -> None:
        """Give the memory back."""
        self.storage.close()
        if self.cross is not None:
            self.cross.storage.close()
