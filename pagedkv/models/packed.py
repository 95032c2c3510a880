"""The packed tier: the step's tokens in one row without padding, attention through a function of ours that reads blocks in place.

Layers whose K/V the model changes after storing them are gathered instead: see ``step.py``. Attention modules that ask for no function
are adapted where an adapter fits: see ``attention_adapters.py``. It owns the masks and options that layers attend with, found once and
kept from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from pagedkv.attention import AttentionBackend, AttentionSpec, get_backend
from pagedkv.errors import UnsupportedBackendError, UnsupportedModelError
from pagedkv.models.attention_adapters import AttentionAdapters
from pagedkv.models.bridge import attention_configs, pointed_at_us
from pagedkv.models.call import ModelCall
from pagedkv.models.compiled import OutsideOfGraphs, is_compiled
from pagedkv.models.context import activate
from pagedkv.models.facade import CacheFacade
from pagedkv.models.masks import MaskCarriers
from pagedkv.models.probe import ModelShape, probe_packed
from pagedkv.models.recurrence import RecurrentState
from pagedkv.models.replacements import Replacements
from pagedkv.models.step import OptionsTable, PagedStep
from pagedkv.storage import KVStorage, LayerPool, StepBatch


class PackedTier:
    """Runs steps through an attention backend of ours.

    Args:
        call: how to call the model.
        replacements: what stands in for modules of it during a step.
        backend: as ``get_backend`` takes it.
        block_size: tokens per block.

    Raises:
        UnsupportedModelError: the model cannot be called so; says why.
        UnsupportedBackendError: unknown, or gives its reason against one of the model's layers.

    Attributes:
        name: ``"packed"``.
        attention: name of the backend.
        shape: the model's layers.
        recurrent_state: ``"none"``: in one row, state would go from one sequence to the next.
    """

    name = "packed"
    recurrent_state: RecurrentState = "none"

    def __init__(self, call: ModelCall, replacements: Replacements, *, backend: str | AttentionBackend, block_size: int) -> None:
        model = call.model
        self._call, self._replacements = call, replacements
        self._configs = attention_configs(model)
        self._adapters = AttentionAdapters(model)
        with replacements.recording():
            self.shape: ModelShape = probe_packed(call, self._adapters)
        specs = [replace(request, block_size=block_size) for request in self.shape.requests]
        self._backend = get_backend(backend, device=model.device, specs=specs)
        if is_compiled(model):
            self._backend = OutsideOfGraphs(self._backend)
        _check_backend(self._backend, specs, self.shape.dtype)
        self._index = {layer: place for place, layer in enumerate(self.shape.layer_ids)}
        self._carriers = MaskCarriers(harmless=bool(self._adapters.classes))
        self._options = OptionsTable(self._carriers)
        replacements.pack()
        replacements.fuse_layers(self._configs, sorted({layer.key_dim for layer in self.shape.layers}))

    @property
    def attention(self) -> str:
        """Name of the backend."""
        return self._backend.name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Classes of attention modules that adapters stand in for."""
        return self._adapters.classes

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Logits ``[K, V]`` of one step; see ``Tier.forward``. Cost: one forward; our own part is about 25 us a layer and 100 a step."""
        with self.step(batch, storage.layers, is_for_logits=True) as cache:
            return self._call(batch.token_ids[None], batch.positions[None], cache=cache, columns=batch.logits_indices)[0]

    @contextmanager
    def step(self, batch: StepBatch, pools: Sequence[LayerPool], *, is_for_logits: bool = False) -> Iterator[Cache]:
        """One step as a ``with`` block, within which somebody else calls the model on the packed tokens, over the cache that comes with it.

        ``is_for_logits``: that nobody asks what the model makes of other tokens than those whose logits the batch wants.

        Raises:
            UnsupportedModelError: at the end of the block, when not every layer was stored and read.
        """
        step = PagedStep(
            pools=pools,
            index=self._index,
            backend=self._backend,
            attention=self._backend.plan(batch),
            carriers=self._carriers,
            options=self._options,
            num_tokens=batch.plan.num_tokens,
            gathered=self.shape.gathered,
            masks=self.shape.masks,
            is_for_logits=is_for_logits,
        )
        with pointed_at_us(self._configs), self._replacements.in_place(), self._adapters.in_place(), activate(step):
            yield CacheFacade(step)
        if not step.complete:
            raise UnsupportedModelError(
                f"{type(self._call.model).__name__} stored K/V in {len(step.written)} and read it in {len(step.attended)} of its "
                f"{len(self._index)} layers: was its attention implementation changed during the step?"
            )


def _check_backend(backend: AttentionBackend, specs: Sequence[AttentionSpec], dtype: torch.dtype) -> None:
    for spec in specs:
        if spec.dtype != dtype:
            raise UnsupportedModelError(f"queries are {spec.dtype} but K/V are stored as {dtype}")
        reason = backend.supports(spec)
        if reason is not None:
            raise UnsupportedBackendError(f"attention backend {backend.name!r} cannot run this model: {reason} (asked for {spec})")
