"""Which way a model is run: the ways there are, tried from the fastest on, and the first that the self-check finds right.

Owns the choice and the account of it. What a way is, is said in ``packed.py``, ``dense.py`` and ``encoder_decoder.py``; what right is, in
``selfcheck.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.attention import AttentionBackend, Mask
from pagedkv.checks import shown
from pagedkv.errors import ConfigError, UnsupportedBackendError, UnsupportedModelError
from pagedkv.models.call import ModelCall
from pagedkv.models.dense import DenseTier
from pagedkv.models.encoder_decoder import EncoderDecoderTier
from pagedkv.models.float32_copy import Float32Copy
from pagedkv.models.packed import PackedTier
from pagedkv.models.packed_linears import WantedPacking
from pagedkv.models.pair_call import PairCall
from pagedkv.models.pair_probe import check_keeps_modules
from pagedkv.models.probe import ModelShape
from pagedkv.models.recurrence import RecurrentState, reads_state_in_chunks
from pagedkv.models.refusals import refusal
from pagedkv.models.replacements import Replacements, Wanted
from pagedkv.models.selfcheck import EXACT_DTYPES, CopyCheck, SelfCheck, compare_int8, self_check
from pagedkv.storage import KVStorage, StepBatch

TierName = Literal["auto", "packed", "dense", "dense-equal", "encoder-decoder", "encoder-decoder-equal"]
_TIERS = ("packed", "dense", "dense-equal")
_PAIR_TIERS = ("encoder-decoder", "encoder-decoder-equal")


class Tier(Protocol):
    """One way of running a model's steps, made ready.

    Attributes:
        name: of the way.
        shape: what the model stores.
        recurrent_state: whether it has recurrent state, and whether a prompt may be split; see ``SchedulerConfig``.
    """

    name: str
    shape: ModelShape
    recurrent_state: RecurrentState

    @property
    def attention(self) -> str:
        """Name of the attention backend; ``"own"`` where the model's own attention runs."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Classes of attention modules that adapters stand in for."""

    def forward(self, batch: StepBatch, storage: KVStorage) -> Tensor:
        """Write the K/V of a step's tokens, attend over all of their sequences, and compute the logits that are wanted.

        Args:
            batch: the step; block tables, slots and positions are trusted.
            storage: a pool for each entry of ``shape.layers``, and state of ``shape.states``; what becomes of that is staged.

        Returns:
            ``[K, shape.vocab_size]``, one row per entry of ``batch.logits_indices``, in that order.
        """


@dataclass(frozen=True, slots=True)
class TierReport:
    """Which way a model runs, and why.

    Attributes:
        name: ``"packed"``: all tokens of a step in one row, attention reads blocks in place; ``"dense"``: one row a sequence, the model's
            own attention over K/V gathered from blocks; ``"dense-equal"``: the same, for rows of one length at a time.
            ``"encoder-decoder"`` and ``"encoder-decoder-equal"``: the same for a decoder with an encoder, whose K/V of cross attention lie
            in blocks, too.
        layers: for each layer that stores K/V, how they are read: ``"in place"``, ``"gathered"`` (the model changes them after storing)
            or ``"dense"``.
        masks: for each of them the masks with which they are read; none where the model's own code masks.
        recurrent_state: what sequences have beside their K/V: ``"none"``; ``"chunked"``, state that goes on from any position; ``"whole"``,
            state from which the model goes on by one token only, so that prompts are computed in one step.
        rejected: faster ways that were tried, each with the reason against it.
        adapters: classes of attention modules that have no attention interface, for which adapters of ours stand in while a step runs.
    """

    name: str
    layers: tuple[str, ...]
    masks: tuple[tuple[Mask, ...], ...]
    recurrent_state: RecurrentState
    rejected: Mapping[str, str]
    adapters: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} layers {kind}" for kind, count in Counter(self.layers).items()) or "no K/V"
        if self.recurrent_state != "none":
            kinds += f", recurrent state, prompts {'in chunks' if self.recurrent_state == 'chunked' else 'in one piece'}"
        if self.adapters:
            kinds += f", by an adapter for {' and '.join(self.adapters)}"
        return "; ".join([f"{self.name} ({kinds})", *(f"not {name}: {reason}" for name, reason in self.rejected.items())])


@dataclass(frozen=True, slots=True)
class Choice:
    """A tier that passed its self-check. ``replacements`` are those it runs with."""

    tier: Tier
    replacements: Replacements
    check: SelfCheck
    report: TierReport


def choose_tier(
    model: PreTrainedModel,
    *,
    wanted: TierName,
    backend: str | AttentionBackend,
    block_size: int,
    max_positions: int | None,
    pack_linears: WantedPacking,
    fuse: Wanted,
) -> Choice:
    """The fastest way of running a model that is right.

    Args:
        model: one that ``refusals.check_model`` accepted.
        wanted: ``"auto"``, or the only one to try. Whoever names a backend wants the packed tier.
        backend: as ``get_backend`` takes it.
        block_size: tokens per block.
        max_positions: longest sequence that is served.
        pack_linears: as ``PackedLinears`` takes it.
        fuse: as ``Fusion`` takes it.

    Raises:
        UnsupportedModelError: no way is right; names the reason against each.
        UnsupportedBackendError: the backend that was named cannot run the model.
        Exception: whatever the model raised, where only one way was to be tried.
        ConfigError: an unknown tier, or settings that cannot be had.

    Cost: for each way that is tried, a probe and a self-check; in half precision another one on a copy of a few layers in float32.
    """
    call = _call_of(model)
    names = _names(wanted, backend, pair=isinstance(call, PairCall))
    rejected: dict[str, str] = {}
    copy: Float32Copy | None = None
    for name in names:
        replacements = Replacements(model, pack_linears=pack_linears, fuse=fuse)
        tier: Tier | None = None
        try:
            tier = _made(name, call, replacements, backend=backend, block_size=block_size)
            check = _proven(tier, call, replacements, block_size=block_size, max_positions=max_positions)
            if tier.shape.dtype not in EXACT_DTYPES:
                copy = copy or Float32Copy(model)
                check = _exactly(check, tier, copy, backend=backend, block_size=block_size, max_positions=max_positions)
            if replacements.quantise():  # after everything else, which is judged with exact weights
                check = replace(check, int8=compare_int8(tier, call, block_size=block_size, max_positions=max_positions))
        except Exception as error:  # whatever a model raises when it is run in a way that it was not made for
            if len(names) == 1 or _is_setting(error):
                raise
            by_adapter = f"by an adapter for {' and '.join(tier.adapters)}: " if tier is not None and tier.adapters else ""
            rejected[name] = by_adapter + _reason(error)
            continue
        report = TierReport(name, _layer_kinds(tier), tier.shape.masks, tier.recurrent_state, MappingProxyType(rejected), tier.adapters)
        return Choice(tier, replacements, check, report)
    raise refusal(model, rejected)


def _call_of(model: PreTrainedModel) -> ModelCall | PairCall:
    if not model.config.is_encoder_decoder:
        return ModelCall(model)
    call = PairCall(model)
    check_keeps_modules(call)
    return call


def _names(wanted: TierName, backend: str | AttentionBackend, *, pair: bool) -> tuple[str, ...]:
    """The ways to try of a model that is an encoder-decoder, or is not."""
    if wanted not in ("auto", *_TIERS, *_PAIR_TIERS):
        raise ConfigError(f"tier is {shown(wanted)}: it must be one of auto, {', '.join((*_TIERS, *_PAIR_TIERS))}")
    there = _PAIR_TIERS if pair else _TIERS
    if wanted not in ("auto", *there):
        kind = f"{'an' if pair else 'no'} encoder-decoder"
        raise ConfigError(f"tier is {wanted!r} and the model is {kind}: use auto, {', '.join(there)}")
    if backend == "auto":
        return there if wanted == "auto" else (wanted,)
    if pair or wanted not in ("auto", "packed"):
        way = f"tier is {wanted!r}" if not pair else "the model is an encoder-decoder"
        raise ConfigError(f"{way} and a backend is named: the model's own attention runs there, leave the backend 'auto'")
    return ("packed",)


def _made(name: str, call: ModelCall | PairCall, replacements: Replacements, *, backend: str | AttentionBackend, block_size: int) -> Tier:
    if isinstance(call, PairCall):
        return EncoderDecoderTier(call, replacements, equal=name == "encoder-decoder-equal")
    if name == "packed":
        return PackedTier(call, replacements, backend=backend, block_size=block_size)
    return DenseTier(call, replacements, equal=name == "dense-equal")


def _proven(tier: Tier, call: ModelCall | PairCall, replacements: Replacements, *, block_size: int, max_positions: int | None) -> SelfCheck:
    # Whatever goes wrong (logits, a view that a part of a merged product does not allow): if it is due to what stands in for
    # the model's modules, the model passes without, and if not, it fails again.
    while True:
        try:
            return _checked(tier, call, block_size=block_size, max_positions=max_positions)
        except Exception as error:
            if not replacements.give_up(f"the self-check failed with it: {error}"):
                raise


def _checked(tier: Tier, call: ModelCall | PairCall, *, block_size: int, max_positions: int | None) -> SelfCheck:
    """The self-check in chunks, or with prompts in one piece where the model does not go on from its state with several tokens at once."""
    if tier.recurrent_state == "none" or isinstance(call, PairCall):
        return self_check(tier, call, block_size=block_size, max_positions=max_positions)
    if reads_state_in_chunks(call, tier.shape.states):
        tier.recurrent_state = "chunked"
        with suppress(UnsupportedModelError):
            return self_check(tier, call, block_size=block_size, max_positions=max_positions)
    tier.recurrent_state = "whole"
    return self_check(tier, call, block_size=block_size, max_positions=max_positions)


def _exactly(
    check: SelfCheck, tier: Tier, copy: Float32Copy, *, backend: str | AttentionBackend, block_size: int, max_positions: int | None
) -> SelfCheck:
    """The self-check of a tier in half precision, together with that of the same tier over a copy in float32."""
    if copy.model is None:
        return replace(check, why_no_copy=copy.reason)
    call, replacements = _call_of(copy.model), Replacements(copy.model, pack_linears=False, fuse=False)
    try:
        twin = _made(tier.name, call, replacements, backend=backend, block_size=block_size)
    except Exception as error:  # the model was, so that this says something about the copy alone
        return replace(check, why_no_copy=_reason(error))
    seen = _checked(twin, call, block_size=block_size, max_positions=max_positions)
    if twin.recurrent_state == "whole":
        tier.recurrent_state = "whole"  # always right where chunks are; the copy sees what roundings hide
    return replace(check, copy=CopyCheck(copy.num_layers, seen.max_relative_error, seen.bound))


def _layer_kinds(tier: Tier) -> tuple[str, ...]:
    if tier.name != "packed":
        return ("dense",) * len(tier.shape.layer_ids)
    return tuple("gathered" if layer in tier.shape.gathered else "in place" for layer in tier.shape.layer_ids)


def _is_setting(error: Exception) -> bool:
    return isinstance(error, ConfigError) and not isinstance(error, UnsupportedModelError | UnsupportedBackendError)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
