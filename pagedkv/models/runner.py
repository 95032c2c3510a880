"""Runs steps of an unmodified transformers model over paged K/V.

Owns the decision whether a model can be run (refusals, probe, backend, self-check) and the forward of one step. It owns
no storage: pools are made here on request and belong to the caller. Outside ``forward`` the model is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.attention import AttentionBackend, AttentionSpec, get_backend
from pagedkv.checks import integer
from pagedkv.errors import ClosedError, ConfigError, UnsupportedBackendError, UnsupportedModelError
from pagedkv.models.bridge import attention_configs, pointed_at_us
from pagedkv.models.call import PackedCall
from pagedkv.models.compiled import OutsideOfGraphs, is_compiled
from pagedkv.models.context import activate
from pagedkv.models.facade import CacheFacade
from pagedkv.models.fusion import Fusion, FusionReport
from pagedkv.models.limits import eos_token_ids, num_token_ids
from pagedkv.models.masks import MaskCarriers
from pagedkv.models.packed_linears import PackedLinears, PackingReport
from pagedkv.models.positions import RotaryEmbeddings
from pagedkv.models.probe import ModelShape, probe_model
from pagedkv.models.refusals import check_model
from pagedkv.models.selfcheck import SelfCheck, self_check
from pagedkv.models.step import OptionsTable, PagedStep
from pagedkv.storage import KVStorage, LayerSpec
from pagedkv.storage.batch import StepBatch


class ModelRunner:
    """One model, made ready for steps over paged K/V.

    Building it runs the model: a probe of 3 tokens, and a self-check that compares paged steps with the model's own
    forward. A model that does not pass is refused, so that a wrong token is never served.

    Args:
        model: a causal language model in evaluation mode on one device. It is not changed; its attention implementation
            is switched, and packed layers are put in place, only while ``forward`` runs, and ordinary calls of the model in
            between (also from other threads) compute what they did before. Parameters may require gradients: ``forward``
            runs under ``no_grad``.
        backend: name or object, as ``get_backend`` takes it.
        block_size: tokens per block.
        pack_linears: whether linear layers run with weights repacked for oneDNN, those that read the same input as one
            product; on the CPU only. True: all that can be. False: none. ``"auto"``: those large enough to gain (with one
            thread and AVX2, an output head at most), where the copies take at most half of the free memory. The copies are in
            float32 where the processor has no instructions for the weights' own half precision, and stay beside the model's
            own weights; ``packing`` says how much they take. Weights that are changed between steps are
            packed again by the next one. Seen are other parameters or storages and all changes that torch counts; of changes
            in place through ``weight.data``, which it does not count, those that touch one of 16 numbers of the layer, as
            merging an adapter does: to write to a few rows, use ``torch.no_grad()`` instead.
        fuse: whether norms, gates of MLPs and rotations run as one native operation each, and decoder layers made of them and
            of packed products as one function, on the CPU only, where trials show that they compute just that. ``"auto"`` and
            True: all that do, but True refuses a model without any. False: none.

    Raises:
        UnsupportedModelError: the model cannot be run exactly; says why.
        UnsupportedBackendError: unknown, or gives its reason against one of the model's layers.
        ConfigError: the block size is below 1, or ``pack_linears`` or ``fuse`` is True and cannot be done.

    Attributes:
        layers: geometry of each layer that stores K/V.
        vocab_size: width of the logits.
        num_token_ids: token ids from 0 that the model can read; usually ``vocab_size``.
        max_positions: longest sequence that is served, or None for no limit.
        max_positions_reason: why it is less than the config states; None where it is not.
        dtype: of K and V.
        device: of the model.
        eos_token_ids: ascending, possibly none.
        report: what the self-check saw.

    Cost: about 10 short forwards, and with packed layers a few readings of all weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backend: str | AttentionBackend = "auto",
        block_size: int = 16,
        pack_linears: bool | Literal["auto"] = "auto",
        fuse: bool | Literal["auto"] = "auto",
    ) -> None:
        integer("block_size", block_size, least=1, most=2**31 - 1)
        self._model = check_model(model)
        if model.device.type == "meta":
            raise UnsupportedModelError(f"{type(model).__name__} has no weights (meta device): plan_memory works without, running does not")
        self._call = PackedCall(model)
        self._rotaries = RotaryEmbeddings(model)
        self._linears = PackedLinears(model, pack_linears)
        self._fusion = Fusion(model, fuse)
        with self._linears.recording(), self._rotaries.pinned():
            shape = probe_model(model, self._call)
        specs = [replace(request, block_size=block_size) for request in shape.requests]
        self._backend = get_backend(backend, device=model.device, specs=specs)
        if is_compiled(model):
            self._backend = OutsideOfGraphs(self._backend)
        _check_backend(self._backend, specs, shape.dtype)
        self._configs = attention_configs(model)
        self._index = {layer: place for place, layer in enumerate(shape.layer_ids)}
        self._carriers = MaskCarriers()
        self._options = OptionsTable(self._carriers)
        self._closed = False
        self.layers: tuple[LayerSpec, ...] = shape.layers
        self.block_size = block_size
        self.dtype = shape.dtype
        self.device = model.device
        self.num_token_ids = num_token_ids(model)
        # Ids that a head could name but the embedding could not read are never offered to a sampler.
        self.vocab_size = min(shape.vocab_size, self.num_token_ids)
        self.max_positions = self._rotaries.positions.reach
        self.max_positions_reason = self._rotaries.positions.reason
        self.eos_token_ids = eos_token_ids(model)
        self._linears.pack()
        self._fusion.fuse_layers(self._linears, self._configs, sorted({layer.key_dim for layer in self.layers}))
        self.report: SelfCheck = self._self_check(shape, may_unpack=pack_linears == "auto", may_unfuse=fuse == "auto")

    @property
    def backend_name(self) -> str:
        """Name of the attention backend in use."""
        return self._backend.name

    @property
    def packing(self) -> PackingReport:
        """Which linear layers run with repacked weights, which do not and why, and what the copies take."""
        return self._linears.report

    @property
    def fusion(self) -> FusionReport:
        """Which norms, MLPs and rotations run as one native operation each."""
        return self._fusion.report

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, for ordinary use."""
        return self._model

    def new_storage(self, num_blocks: int | Sequence[int]) -> KVStorage:
        """Zeroed pools of ``num_blocks`` blocks (the null block included) for this model's layers; the caller owns them.

        Raises:
            PoolAllocationError: the device refused the memory; nothing was kept.
        """
        return KVStorage(self.layers, num_blocks=num_blocks, block_size=self.block_size, dtype=self.dtype, device=self.device)

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Run one step: write the K/V of its tokens, attend through the block tables, return the wanted logits.

        Args:
            batch: the step; its block copies must have been made. Block tables, slots and positions are trusted here.
            storage: pools made by ``new_storage`` (or of the same geometry).

        Returns:
            ``[K, V]`` float32 on the model's device, one row per entry of ``batch.logits_indices``, in that order.

        Raises:
            ClosedError: after ``close()``.
            UnsupportedModelError: the model is in training mode, or left the path that the probe saw.
            ConfigError: the storage is not of this model's geometry.
            StepError: another step of the same model is running (in another thread).

        Cost: one forward; the head runs on ``K`` rows only. Our own part is about 25 microseconds a layer and 100 a step.
        """
        self._check_open()
        self._check_storage(storage)
        step = PagedStep(
            pools=storage.layers,
            index=self._index,
            backend=self._backend,
            attention=self._backend.plan(batch),
            carriers=self._carriers,
            options=self._options,
            num_tokens=batch.plan.num_tokens,
        )
        with (
            self._rotaries.pinned(),
            pointed_at_us(self._configs),
            self._fusion.in_place() as fused,
            self._linears.in_place(fused),
            activate(step),
        ):
            logits = self._call(batch.token_ids, batch.positions, cache=CacheFacade(step), logits_indices=batch.logits_indices)
        if not step.complete:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} stored K/V in {len(step.written)} and read it in {len(step.attended)} of its "
                f"{len(self._index)} layers: was its attention implementation changed during the step?"
            )
        return logits[:, : self.vocab_size].float()

    def close(self) -> None:
        """End the use of the model, which is as it was, and free packed weights. May be called again; ``forward`` raises afterwards."""
        self._closed = True
        self._fusion.give_up("the model runner is closed")
        self._linears.unpack("the model runner is closed")

    def _self_check(self, shape: ModelShape, *, may_unpack: bool, may_unfuse: bool) -> SelfCheck:
        # Whatever goes wrong (logits, a view that a part of a merged product does not allow): if it is due to what stands in for
        # the model's modules, the model passes without, and if not, it fails again.
        ways_out = iter([give_up for may, give_up in ((may_unfuse, self._fusion.give_up), (may_unpack, self._linears.unpack)) if may])
        while True:
            try:
                with self._rotaries.pinned():
                    return self_check(self, self._call, shape)
            except Exception as error:
                reason = f"the self-check failed with it: {error}"
                if not any(give_up(reason) for give_up in ways_out):  # tried up to the first that had something to give up
                    raise

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model runner is closed")
        if self._model.training:
            raise UnsupportedModelError("the model was put in training mode: a K/V cache is for inference, call model.eval()")

    def _check_storage(self, storage: KVStorage) -> None:
        pools = storage.layers
        if (
            len(pools) != len(self.layers)
            or storage.block_size != self.block_size
            or storage.dtype != self.dtype
            or any(pool.spec is not spec and pool.spec != spec for pool, spec in zip(pools, self.layers, strict=True))
        ):
            raise ConfigError(
                f"the storage ({len(pools)} layers, block size {storage.block_size}, {storage.dtype}) is not for this model "
                f"({len(self.layers)} layers, block size {self.block_size}, {self.dtype}): make it with new_storage()"
            )


def _check_backend(backend: AttentionBackend, specs: Sequence[AttentionSpec], dtype: torch.dtype) -> None:
    for spec in specs:
        if spec.dtype != dtype:
            raise UnsupportedModelError(f"queries are {spec.dtype} but K/V are stored as {dtype}")
        reason = backend.supports(spec)
        if reason is not None:
            raise UnsupportedBackendError(f"attention backend {backend.name!r} cannot run this model: {reason} (asked for {spec})")
