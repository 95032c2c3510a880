"""Blocks and bytes of one pool of caches: who holds which block, where they lie, and for models with an encoder both once more.

Owns the manager and the storage. It does not know caches or forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pagedkv.core import CheckLevel, KVCacheManager, Window
from pagedkv.generation.cross import CrossPool
from pagedkv.generation.trial import Reference
from pagedkv.models import ModelRunner
from pagedkv.storage import KVStorage, LayerSpec


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the books are: see ``CachePool``; ``num_blocks`` of each layer group."""

    num_blocks: Sequence[int]
    block_size: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """Layers by what they keep: the geometry of each with its group, and for each group how far back it reads, None for everything."""

    layers: tuple[LayerSpec, ...]
    windows: tuple[Window | None, ...] = (None,)

    @classmethod
    def of(cls, runner: ModelRunner) -> Grouping:
        """The layer groups of a packed model.

        A layer that reads its own chunk keeps as many tokens as a chunk has, wherever they are: where rows have padding between their
        tokens, transformers counts chunks in columns, which begin elsewhere.
        """
        return cls(runner.grouped_layers, tuple(None if mask is None else Window.sliding(mask.size) for mask in runner.windows))


class Books:
    """Made for a model that was tried.

    Args:
        reference: what its layers store.
        grouping: of these layers.
        sizes: blocks and sequences.
        device: of the pools.
        check: what the managers verify.

    Attributes:
        manager, storage: of self attention.
        index: from transformers' layer index to the place in ``storage.layers``.
        cross: of cross attention; None for a decoder alone.
        group_nbytes: of one block in each layer group, all of its layers.
        shared_names: the namespaces whose prefixes several caches share, in the order in which they came.
        peak, peak_nbytes: the most blocks of self attention that were held at once, and the most bytes.
    """

    def __init__(self, reference: Reference, grouping: Grouping, sizes: Sizes, *, device: torch.device, check: CheckLevel) -> None:
        shared: Any = {"num_blocks": sizes.num_blocks, "block_size": sizes.block_size}
        stored: Any = {**shared, "dtype": reference.dtype, "device": device}
        layers = reference.cross_layers
        # The tokens of a decoder do not say what its K and V are where there is an encoder.
        self.manager = KVCacheManager(
            **shared, windows=grouping.windows, max_num_seqs=sizes.max_num_seqs, enable_prefix_caching=not layers, check=check
        )
        self.storage = KVStorage(grouping.layers, **stored)
        nbytes = [0] * len(grouping.windows)
        for layer in grouping.layers:
            nbytes[layer.group] += sizes.block_size * layer.nbytes_per_token(reference.dtype)
        self.group_nbytes = tuple(nbytes)
        self.index = {layer: place for place, layer in enumerate(reference.layer_ids)}
        self.cross: CrossPool | None = None
        if layers:
            self.cross = CrossPool(tuple(layers.values()), list(layers), **stored, max_num_seqs=sizes.max_num_seqs, check=check)
        self.shared_names: dict[str, None] = {}
        self.peak = self.peak_nbytes = 0

    @property
    def in_use(self) -> tuple[int, ...]:
        """Blocks of self attention that are held now, in each layer group."""
        manager = self.manager
        return tuple(usable - free for usable, free in zip(manager.usable_blocks, manager.available_blocks, strict=True))

    def note_use(self) -> None:
        """Look for the most blocks and bytes."""
        used = self.in_use
        self.peak = max(self.peak, sum(used))
        self.peak_nbytes = max(self.peak_nbytes, sum(count * size for count, size in zip(used, self.group_nbytes, strict=True)))

    def reset_peak(self) -> None:
        """Look for them from now on."""
        self.peak = self.peak_nbytes = 0
        self.note_use()

    def forget_shared(self) -> None:
        """Make the prefixes unfindable that several caches share."""
        for name in self.shared_names:
            self.manager.purge(name)

    def fill_free(self, value: float) -> int:
        """Overwrite all blocks that hold nothing; returns how many."""
        pairs = [(self.manager, self.storage)] + ([(self.cross.manager, self.cross.storage)] if self.cross else [])
        count = 0
        for manager, storage in pairs:
            for group, free in enumerate(manager.free_block_ids()):
                storage.fill(free, value, group=group)
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
