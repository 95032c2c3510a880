"""Runs steps of an unmodified transformers model over paged K/V.

Owns the public face: a model that was found right in one of the ways of ``tiers.py``, its limits, and the forward of one step. It
owns no storage: pools are made here on request and belong to the caller. Outside ``forward`` the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from torch import Tensor
from transformers import Cache, PreTrainedModel

from pagedkv.attention import AttentionBackend
from pagedkv.checks import integer
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, UnsupportedModelError
from pagedkv.models.adapters import AdaptedModel
from pagedkv.models.alterations import Alterations
from pagedkv.models.encoder_limits import encoder_limits
from pagedkv.models.fusion import FusionReport
from pagedkv.models.groups import group_layers
from pagedkv.models.hidden_states import HiddenStates
from pagedkv.models.input_embeddings import InputEmbeddings
from pagedkv.models.limits import eos_token_ids, num_decoder_token_ids, num_token_ids
from pagedkv.models.own_cache import bounded_by_own_cache
from pagedkv.models.packed import PackedTier
from pagedkv.models.packed_linears import PackingReport
from pagedkv.models.positions import RotaryEmbeddings
from pagedkv.models.recurrence import RecurrentState
from pagedkv.models.refusals import check_model
from pagedkv.models.selfcheck import SelfCheck
from pagedkv.models.tiers import TierName, TierReport, choose_tier
from pagedkv.storage import KVStorage, LayerSpec, StateSpec, StateStorage
from pagedkv.storage.batch import StepBatch


class ModelRunner:
    """One model, made ready for steps over paged K/V.

    Building it runs the model: a probe of 3 tokens, and a self-check that compares paged steps with the model's own
    forward, for each way of running it until one passes. A model that passes none is refused, so that a wrong token is never served.

    Args:
        model: a language model in evaluation mode on one device, a decoder or an encoder-decoder, or a wrapper around one with
            adapters in its layers (PEFT's). It is not changed; its attention implementation is switched, and packed layers are put in
            place, only while ``forward`` runs, and ordinary calls of the model in between (also from other threads) compute what they
            did before. Parameters may require gradients: ``forward`` runs under ``no_grad``.
        backend: name or object, as ``get_backend`` takes it. Where one is named, only the packed tier is tried.
        block_size: tokens per block.
        tier: ``"auto"``: the fastest way of running the model that is right. ``"packed"``: attention reads blocks in place, where
            needed over gathered K/V, or by adapters for modules that never ask for attention. ``"dense"``: the model's own attention over
            K/V gathered for each step, which any model with a K/V cache allows; ``"dense-equal"``: the same for sequences of one length
            at a time, for models that count positions from one number for the whole batch. ``"encoder-decoder"`` and
            ``"encoder-decoder-equal"`` are these two of an encoder-decoder.
        pack_linears: whether linear layers run with repacked weights, natively or by oneDNN, those that read the same input as one
            product; on the CPU only. True: all that can be. False: none. ``"auto"``: those large enough to gain (with one
            thread and AVX2, an output head at most), where the copies take at most half of the free memory. The copies are in
            float32 where the processor has no instructions for the weights' own half precision, and stay beside the model's
            own weights; ``packing`` says how much they take. Weights that are changed between steps are
            packed again by the next one. Seen are other parameters or storages and all changes that torch counts; of changes
            in place through ``weight.data``, which it does not count, those that touch one of 16 numbers of the layer, as
            merging an adapter does: to write to a few rows, use ``torch.no_grad()`` instead.
            ``"int8"``: **the tokens are no longer those of the model.** As True, but the weights are rounded to eight bits, with one scale
            for each output, to read less memory when few tokens are computed; inputs, K/V and everything that is no linear layer
            are as before. This is the one option that changes what is computed. The model is found right first, with exact copies;
            then ``packing.weight_error`` says what rounding loses of the weights, and ``report.int8`` how far the logits are from the
            model's. The copies take 3 bytes a weight in half precision and 5 in float32: eight bits for few rows, and the same
            numbers in the layout of ``"auto"`` for many. It needs the native library.
        fuse: whether norms, gates of MLPs and rotations run as one native operation each, and decoder layers made of them and
            of packed products as one function, and in bfloat16 the model's body of such layers as one call, on the CPU only, where trials
            show that they compute just that. ``"auto"`` and
            True: all that do, but True refuses a model without any. False: none.

    Raises:
        UnsupportedModelError: the model cannot be run exactly; says why.
        UnsupportedBackendError: unknown, or gives its reason against one of the model's layers.
        ConfigError: the block size is below 1, the tier unknown, or ``pack_linears`` is True or ``"int8"``, or ``fuse`` is True, and cannot
            be done.

    Attributes:
        layers: geometry of each layer that stores K/V, all in one group.
        grouped_layers: the same, by layer group: layers with a sliding or chunked mask of one size share one.
        windows: what the layers of each group read; None for everything, as in the first group always.
        vocab_size: width of the logits.
        num_token_ids: token ids from 0 that the model can read, its encoder where it has one; usually ``vocab_size``.
        encoder: what the encoder and the decoder of an encoder-decoder can be asked; None for others.
        max_positions: longest sequence that is served, or None for no limit; of an encoder-decoder both parts together.
        max_positions_reason: why it is less than the config states; None where it is not.
        far_positions: longest sequence that is served where the prompt alone is longer than ``max_positions`` and its tokens are marked by
            ``far_apart``; None where none is.
        dtype: of K and V.
        device: of the model.
        eos_token_ids: ascending, possibly none.
        report: what the self-check saw.
        states: the recurrent state that each sequence has.
        tier: which way the model runs, and what was against faster ones.

    Cost: about 10 short forwards for each way that is tried, and with packed layers a few readings of all weights.
    """

    def __init__(
        self,
        model: PreTrainedModel | AdaptedModel,
        *,
        backend: str | AttentionBackend = "auto",
        block_size: int = 16,
        pack_linears: bool | Literal["auto", "int8"] = "auto",
        fuse: bool | Literal["auto"] = "auto",
        tier: TierName = "auto",
    ) -> None:
        integer("block_size", block_size, least=1, most=2**31 - 1)
        self._model = model = check_model(model)
        if model.device.type == "meta":
            raise UnsupportedModelError(f"{type(model).__name__} has no weights (meta device): plan_memory works without, running does not")
        self._rotaries = RotaryEmbeddings(model)
        with self._rotaries.pinned():
            choice = choose_tier(
                model,
                wanted=tier,
                backend=backend,
                block_size=block_size,
                max_positions=self._rotaries.positions.reach,
                pack_linears=pack_linears,
                fuse=fuse,
            )
        self._tier, self._replacements = choice.tier, choice.replacements
        self._alterations = Alterations(model)
        self._hidden_states = HiddenStates(model)
        self._input_embeddings = InputEmbeddings(model)
        self._closed = False
        self.report: SelfCheck = choice.check
        self.tier: TierReport = choice.report
        self.layers: tuple[LayerSpec, ...] = choice.tier.shape.layers
        self.states: tuple[StateSpec, ...] = choice.tier.shape.states
        self.block_size = block_size
        self.dtype = choice.tier.shape.dtype
        self.device = model.device
        self.num_token_ids = num_token_ids(model)
        # Ids that a head could name but the embedding could not read are never offered to a sampler.
        self.vocab_size = min(choice.tier.shape.vocab_size, num_decoder_token_ids(model))
        self.encoder = encoder_limits(model, choice.tier.shape)
        if self.encoder is not None:
            positions = self.encoder.positions(self._rotaries)
        else:
            positions = bounded_by_own_cache(self._rotaries.positions, model, choice.tier.shape)
        self.max_positions, self.max_positions_reason = positions.reach, positions.reason
        self.far_positions = positions.far_reach
        self.eos_token_ids = eos_token_ids(model)
        groups = group_layers(choice.tier.shape, max_positions=self.max_positions)
        self.grouped_layers, self.windows = groups.layers, groups.windows

    @property
    def recurrent_state(self) -> RecurrentState:
        """What sequences have beside their K/V; see ``TierReport``."""
        return self.tier.recurrent_state

    @property
    def backend_name(self) -> str:
        """Name of the attention backend in use; ``"own"`` where the model's own attention runs."""
        return self._tier.attention

    @property
    def packing(self) -> PackingReport:
        """Which linear layers run with repacked weights, which do not and why, and what the copies take."""
        return self._replacements.packing

    @property
    def fusion(self) -> FusionReport:
        """Which norms, MLPs, rotations and decoder layers run natively, and whether the body around them is one call."""
        return self._replacements.fusion

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, for ordinary use."""
        return self._model

    @property
    def group_nbytes(self) -> tuple[int, ...]:
        """Bytes of one block of K and V in each layer group, all of its layers."""
        nbytes = [0] * len(self.windows)
        for layer in self.grouped_layers:
            nbytes[layer.group] += self.block_size * layer.nbytes_per_token(self.dtype)
        return tuple(nbytes)

    def new_storage(self, num_blocks: int | Sequence[int], *, num_rows: int | None = None) -> KVStorage:
        """Zeroed pools of ``num_blocks`` blocks (the null block included) for this model's layers; the caller owns them.

        Args:
            num_blocks: one number, for one table of all layers; or one for each layer group.
            num_rows: rows of the sequence table, each with a slot of recurrent state; needed where the model has any.

        Raises:
            PoolAllocationError: the device refused the memory; nothing was kept.
            ConfigError: another number of groups; or the model has recurrent state, and for how many rows was not said.
        """
        state = None
        if self.states:
            if num_rows is None:
                raise ConfigError("num_rows is missing: the model has recurrent state, a slot for each row of the sequence table")
            state = StateStorage(self.states, num_rows=num_rows, device=self.device)
        layers = self.grouped_layers if isinstance(num_blocks, Sequence) else self.layers
        return KVStorage(layers, num_blocks=num_blocks, block_size=self.block_size, dtype=self.dtype, device=self.device, state=state)

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Run one step: write the K/V of its tokens, attend through the block tables, return the wanted logits.

        Args:
            batch: the step; its block copies must have been made. Block tables, slots and positions are trusted here.
            storage: pools made by ``new_storage`` (or of the same geometry). Recurrent state is staged there, and counts when the caller
                commits it.

        Returns:
            ``[K, V]`` float32 on the model's device, one row per entry of ``batch.logits_indices``, in that order.

        Raises:
            ClosedError: after ``close()``.
            UnsupportedModelError: the model is in training mode, or left the path that the probe saw.
            ConfigError: the storage is not of this model's geometry.
            StepError: another step of the same model is running (in another thread).

        Cost: packed, one forward; our own part is about 25 microseconds a layer and 100 a step. Dense, one forward for each query
        length of the step, and a copy of all K/V that it reads. The head runs on ``K`` rows only. The encoder of an encoder-decoder
        runs where the first tokens of its inputs are due.
        """
        self._check_open()
        self._check_storage(storage)
        with self._rotaries.pinned():
            return self._tier.forward(batch, storage)[:, : self.vocab_size].float()

    def check_hidden_states(self) -> None:
        """Raise ``UnsupportedModelError`` where ``forward_with_hidden_states`` cannot be used; a forward of 3 tokens the first time."""
        self._check_open()
        self._refuse_with_encoder("hidden states as embeddings")
        self._hidden_states.body()

    def forward_with_hidden_states(self, batch: StepBatch, storage: KVStorage) -> tuple[Tensor, Tensor]:
        """``forward``, and the last hidden states of the step's tokens beside it.

        Arguments and errors as for ``forward``, and:

        Returns:
            the logits, and ``[T, H]`` ``last_hidden_state`` of the model's body, in the model's dtype.

        Raises:
            UnsupportedModelError: the model does not give them.

        Cost: the first time a forward of 3 tokens more, and a copy of the hidden states.
        """
        with self._hidden_states.taken(batch.plan.num_tokens) as states:
            logits = self.forward(batch, storage)
        return logits, states[0]

    def far_apart(self, is_far: Tensor) -> AbstractContextManager[None]:
        """A ``with`` block within which ``forward`` rotates the tokens of ``is_far [T]`` as of long prompts: see ``far_positions``."""
        return self._rotaries.far_apart(is_far)

    def as_prompt_embeds(self, values: object) -> Tensor:
        """A prompt given as embeddings, ``[P, H]``, checked, on the model's device and in its dtype.

        Raises:
            InvalidRequestError: no float tensor, of another width than the model's embedding, or with numbers that are not finite.
            UnsupportedModelError: the model takes no such prompts; a forward or two of 3 tokens, the first time.
        """
        self._check_open()
        self._refuse_with_encoder("prompt_embeds")
        width = self._input_embeddings.width()
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 2 or values.shape[1] != width:
            form = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InvalidRequestError(f"prompt_embeds is {form}: it must be a tensor of floats, [P, {width}]")
        if not bool(values.isfinite().all()):
            raise InvalidRequestError("prompt_embeds has numbers that are not finite")
        return values.detach().to(self.device, self._model.dtype, copy=True)

    def prompt_embeds(self, rows: Tensor, is_given: Tensor) -> AbstractContextManager[None]:
        """A ``with`` block within which ``forward`` takes some tokens' embeddings from ``rows [T, H]``: those of ``is_given [T]``."""
        return self._input_embeddings.given(rows, is_given)

    @contextmanager
    def step(self, batch: StepBatch, storage: KVStorage) -> Iterator[Cache]:
        """One step of a packed model as a ``with`` block, within which the caller calls the model.

        The call has ``batch.token_ids[None]`` as tokens, ``batch.positions[None]`` as positions, no mask, and the cache that comes with
        the block. Arguments and errors as for ``forward``, and:

        Raises:
            ConfigError: the model is not of the packed tier.
            UnsupportedModelError: at the end of the block, when not every layer was stored and read.
        """
        self._check_open()
        self._check_storage(storage)
        if not isinstance(self._tier, PackedTier):
            raise ConfigError(f"the model runs in tier {self.tier.name!r}: only a packed one can be called by others within a step")
        with self._rotaries.pinned(), self._tier.step(batch, storage.layers) as cache:
            yield cache

    def altered(self) -> bool:
        """Whether the model was altered since the last call, so that K/V computed before are not what it would compute now.

        See ``Alterations`` for what is seen: weights, modules, hooks, switches of adapters. Cost: some
        microseconds for each module and parameter.
        """
        return self._alterations.seen()

    def close(self) -> None:
        """End the use of the model, which is as it was, and free packed weights. May be called again; ``forward`` raises afterwards."""
        self._closed = True
        self._replacements.close("the model runner is closed")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the model runner is closed")
        if self._model.training:
            raise UnsupportedModelError("the model was put in training mode: a K/V cache is for inference, call model.eval()")

    def _refuse_with_encoder(self, what: str) -> None:
        if self.encoder is not None:
            raise UnsupportedModelError(f"{type(self._model).__name__} is an encoder-decoder model: {what} are served for decoders only")

    def _check_storage(self, storage: KVStorage) -> None:
        pools = storage.layers
        layers = self.layers if len(storage.num_blocks) == 1 else self.grouped_layers
        if (
            len(pools) != len(self.layers)
            or storage.block_size != self.block_size
            or storage.dtype != self.dtype
            or any(pool.spec is not spec and pool.spec != spec for pool, spec in zip(pools, layers, strict=True))
            or self.states != (() if storage.state is None else storage.state.specs)
        ):
            raise ConfigError(
                f"the storage ({len(pools)} layers, block size {storage.block_size}, {storage.dtype}) is not for this model "
                f"({len(self.layers)} layers, block size {self.block_size}, {self.dtype}): make it with new_storage()"
            )
