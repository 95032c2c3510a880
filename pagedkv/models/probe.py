"""Learns a model's layers from what it writes: one forward of a few tokens with a recording step, on any device or none.

Owns the recording. Shapes come from the tensors of the first cache update of every layer, never from a config, which
does not say them for every model. On the meta device nothing is allocated and nothing computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from pagedkv.attention import AttentionSpec, Mask
from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models.attention_adapters import AttentionAdapters
from pagedkv.models.bridge import attention_configs, pointed_at_us
from pagedkv.models.call import ModelCall
from pagedkv.models.context import AttentionCall, MaskFunction, StepContext, activate
from pagedkv.models.facade import CacheFacade, cross_id, marked_layer
from pagedkv.models.limits import max_positions, num_token_ids
from pagedkv.models.masks import MaskCarriers, resolve_mask
from pagedkv.models.positions import PositionTables
from pagedkv.models.refusals import refusal
from pagedkv.models.states import StatefulCache, state_specs
from pagedkv.storage import LayerSpec, StateSpec

_NUM_TOKENS = 3
# Tokens that gathered layers pretend to have stored before, so that whoever mistakes new tokens for all of them is seen.
_NUM_PAST = 5
_EXPERTS = "_experts_implementation_internal"


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """What one forward showed about an encoder, and the decoder's use of it.

    A slot holds K and V of self attention for a token of the decoder, or of cross attention for one of the encoder.

    Attributes:
        cross: from transformers' index of a layer with cross attention to the layer of a storage that holds its K and V: that of the same
            layer's self attention where they have one shape, one of its own elsewhere.
        width: of the encoder's hidden states.
        dtype: of them.
        max_source_tokens: tokens that the encoder has positions for; None where nothing limits them.
        max_decoder_tokens: the same of the decoder.
        tables: those of learned positions in the decoder.
    """

    cross: Mapping[int, int]
    width: int
    dtype: torch.dtype
    max_source_tokens: int | None
    max_decoder_tokens: int | None
    tables: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What one forward showed about a model.

    Attributes:
        layer_ids: transformers' layer indices that store K/V, ascending; layer ``i`` of a storage is ``layer_ids[i]``. Before them come
            negative ones for what indexers store, see ``facade.indexer_id``, and cross attention, see ``facade.cross_id``.
        layers: the geometry of each of them.
        dtype: dtype of K and V.
        vocab_size: width of the logits.
        requests: what layers that read K/V in place ask of attention, without repeats, ``block_size`` still 1.
        gathered: those of ``layer_ids`` whose K/V the model changes after storing them, so that it is given all of them.
        masks: for each of ``layers`` the masks with which its K/V are read, without repeats; none where the model's own code masks.
        states: the recurrent state that layers keep for each sequence.
        encoder: of a model that has one, what it is asked and where its layers are stored.
    """

    layer_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    vocab_size: int
    requests: tuple[AttentionSpec, ...] = ()
    gathered: frozenset[int] = frozenset()
    masks: tuple[tuple[Mask, ...], ...] = ()
    states: tuple[StateSpec, ...] = ()
    encoder: EncoderShape | None = None

    def nbytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V of self attention for a token, stored in a dtype."""
        layers = zip(self.layer_ids, self.layers, strict=True)
        return sum(layer.nbytes_per_token(dtype) for number, layer in layers if number > cross_id(0))

    def nbytes_per_source_token(self, dtype: torch.dtype) -> int:
        """The same of cross attention for a token of the encoder; 0 without one."""
        places = () if self.encoder is None else self.encoder.cross.values()
        return sum(self.layers[place].nbytes_per_token(dtype) for place in places)

    @property
    def windows(self) -> tuple[Mask, ...]:
        """The sliding and chunked masks of all layers, smallest first."""
        windows = {mask for masks in self.masks for mask in masks if mask.kind != "causal"}
        return tuple(sorted(windows, key=lambda mask: (mask.size, mask.kind)))


def probe_model(model: PreTrainedModel) -> ModelShape:
    """What a model stores, by the first way of running it that its probe does not rule out; also on the meta device.

    Raises:
        UnsupportedModelError: none is left; names the reason against each.
    """
    call = ModelCall(model)
    rejected: dict[str, str] = {}
    probes: dict[str, Callable[[], ModelShape]] = {
        "packed": lambda: probe_packed(call, AttentionAdapters(model)),
        "dense": lambda: probe_dense(call),
    }
    for name, probe in probes.items():
        try:
            return probe()
        except UnsupportedModelError as error:
            rejected[name] = str(error)
    raise refusal(model, rejected)


def probe_packed(call: ModelCall, adapters: AttentionAdapters) -> ModelShape:
    """Run a few tokens through a model and record what its layers store and ask of attention.

    Args:
        call: how to call it; the model may live on the meta device.
        adapters: for its attention modules.

    Raises:
        UnsupportedModelError: the model failed, stored nothing, or did something with K/V that paging cannot follow.

    Cost: one forward of 3 tokens, two where layers are gathered; no computation on the meta device.
    """
    name = type(call.model).__name__
    if not (adapters.classes or type(call.model)._can_set_attn_implementation()):
        raise UnsupportedModelError(f"the code of {name} does not call attention through transformers' AttentionInterface")
    # With an adapter, what knows positions may be attention alone.
    if not (adapters.classes or call.takes_positions):
        raise UnsupportedModelError(f"{name}.forward takes no position_ids: sequences of a batch cannot keep their own")
    configs = attention_configs(call.model)
    changed: frozenset[int] = frozenset()
    while True:
        step = _PackedRecording(changed, shapes_only=call.model.device.type == "meta", adapted=bool(adapters.classes))
        with pointed_at_us(configs), adapters.in_place():
            vocab_size = _record(call, step, CacheFacade(step))
        if step.changed <= changed:
            return step.shape(name, vocab_size, dtype=call.model.dtype)
        changed |= step.changed


def probe_dense(call: ModelCall) -> ModelShape:
    """The same for a model whose own attention runs: it is asked nothing but what its layers store.

    Cost: one forward of 3 tokens; no computation on the meta device.
    """
    step = _Recording()
    cache = StatefulCache(step, 0, config=call.model.config)
    vocab_size = _record(call, step, cache)
    shape = step.shape(type(call.model).__name__, vocab_size, states=state_specs(cache), dtype=call.model.dtype)
    if shape.layers and not call.takes_mask:
        raise UnsupportedModelError(f"{type(call.model).__name__}.forward takes no attention_mask: rows of several lengths cannot be told")
    return shape


def _record(call: ModelCall, step: StepContext, cache: Cache) -> int:
    """Run the tokens; returns the width of the logits."""
    device = call.model.device
    positions = torch.arange(_NUM_TOKENS, device=device)
    tables = PositionTables(positions)
    try:
        with tables, _experts_without_data(attention_configs(call.model), device), activate(step):
            logits = call(torch.zeros_like(positions)[None], positions[None], cache=cache, columns=positions)
    except ConfigError:
        raise
    except Exception as error:
        # Whatever a model raises over our cache means one thing to the caller: it cannot be run.
        raise UnsupportedModelError(f"{type(call.model).__name__} failed over a paged cache: {type(error).__name__}: {error}") from error
    vocab_size = int(logits.shape[-1])
    check_stated(call.model, vocab_size, tables.reach)
    return vocab_size


class _Recording:
    """A step that stores nothing and notes what it should."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerSpec] = {}
        self._dtypes: set[torch.dtype] = set()

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3] or key.shape[0] != 1 or key.shape[2] != _NUM_TOKENS:
            raise UnsupportedModelError(
                f"layer {layer_idx} stores K {list(key.shape)} and V {list(value.shape)}; [1, heads, {_NUM_TOKENS}, dim] each is expected"
            )
        if layer_idx in self._layers:
            raise UnsupportedModelError(f"layer {layer_idx} stores K/V twice in one forward")
        self._layers[layer_idx] = LayerSpec(num_kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3])
        self._dtypes |= {key.dtype, value.dtype}
        return None

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        raise UnsupportedModelError("the model's own attention was asked for, but it asks ours")

    def attend(self, call: AttentionCall) -> Tensor:
        raise UnsupportedModelError("the model's own attention was asked for, but it asks ours")

    def shape(self, name: str, vocab_size: int, *, dtype: torch.dtype, states: tuple[StateSpec, ...] = ()) -> ModelShape:
        """What was noted; ``dtype`` where no K/V were stored."""
        if not self._layers and not states:
            raise UnsupportedModelError(f"{name} stored no K/V: its layers do not use the cache that they are given")
        if len(self._dtypes) > 1:
            raise UnsupportedModelError(f"{name} stores K/V in several dtypes: {', '.join(sorted(map(str, self._dtypes)))}")
        ids = tuple(sorted(self._layers))
        layers = tuple(self._layers[layer] for layer in ids)
        return ModelShape(ids, layers, dtype=next(iter(self._dtypes), dtype), vocab_size=vocab_size, states=states)


class _PackedRecording(_Recording):
    """One that answers attention with zeros of the right shape, and notes what was asked.

    Args:
        gathered: layers that are given all K/V of (pretended) sequences.
        shapes_only: as ``MaskCarriers`` takes it.
        adapted: whether adapters attend.

    Attributes:
        changed: layers whose K/V came to attention as other tensors than those that were stored.
    """

    def __init__(self, gathered: frozenset[int], *, shapes_only: bool, adapted: bool) -> None:
        super().__init__()
        self.changed: frozenset[int] = frozenset()
        self._gathered = gathered
        self._carriers = MaskCarriers(shapes_only=shapes_only, harmless=adapted)
        self._requests: dict[AttentionSpec, None] = {}
        self._masks: dict[int, dict[Mask, None]] = {}
        self._latest = -1

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        super().update(key, value, layer_idx)
        self._latest = layer_idx
        if layer_idx not in self._gathered:
            return None
        return _with_past(key), _with_past(value)

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        return self._carriers.carrier(mask_function, num_queries, device)

    def attend(self, call: AttentionCall) -> Tensor:
        mask = resolve_mask(call, self._carriers)
        layer = marked_layer(call.key, call.value)
        if layer is None:
            # It has no mark, so it is taken for the one that was stored last; the numbers of the self-check tell if that is wrong.
            layer = self._latest
            self.changed |= {layer}
            check_gathered(call, _NUM_TOKENS + _NUM_PAST if layer in self._gathered else None)
        else:
            self._requests.setdefault(self._request(call, self._layers[layer], mask))
        self._masks.setdefault(layer, {}).setdefault(mask)
        return call.query.new_zeros((1, call.query.shape[2], call.query.shape[1], call.value.shape[3]))

    def shape(self, name: str, vocab_size: int, *, dtype: torch.dtype, states: tuple[StateSpec, ...] = ()) -> ModelShape:
        unread = sorted(set(self._layers) - set(self._masks))
        if unread:
            raise UnsupportedModelError(f"{name} does not read the K/V of layers {unread} through transformers' AttentionInterface")
        shape = super().shape(name, vocab_size, dtype=dtype, states=states)
        masks = tuple(tuple(self._masks[layer]) for layer in shape.layer_ids)
        return replace(shape, requests=tuple(self._requests), gathered=self._gathered, masks=masks)

    def _request(self, call: AttentionCall, spec: LayerSpec, mask: Mask) -> AttentionSpec:
        return AttentionSpec(
            num_heads=call.query.shape[1],
            num_kv_heads=spec.num_kv_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            block_size=1,  # the tier knows, and puts it in
            dtype=call.query.dtype,
            device_type=call.query.device.type,
            mask=mask,
            softcap=call.softcap,
            sinks=call.sinks is not None,
            alibi=call.alibi_slopes is not None,
            scale=call.scale,
        )


def check_gathered(call: AttentionCall, num_keys: int | None) -> None:
    """Refuse a call that does not attend over so many gathered keys, one row of them; any number where it is None."""
    key, value, query = call.key, call.value, call.query
    if key.ndim != 4 or value.ndim != 4 or key.shape[0] != 1 or key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1]:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} attends over K {list(key.shape)} and V {list(value.shape)} made from stored ones"
        )
    if num_keys is not None and key.shape[2] != num_keys:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} attends over K/V of {key.shape[2]} tokens, made from the stored ones of {num_keys}"
        )


def check_stated(model: PreTrainedModel, vocab_size: int, reach: int | None) -> None:
    """Raise ``UnsupportedModelError`` where the config says more than the model has: positions, or tokens."""
    name, stated = type(model).__name__, max_positions(model.config)
    if reach is not None and stated is not None and reach < stated:
        raise UnsupportedModelError(f"the config of {name} states {stated} positions, its table of learned positions has rows for {reach}")
    named = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    for part, rows in (("output head scores", vocab_size), ("embedding reads", num_token_ids(model))):
        if isinstance(named, int) and rows < named:
            raise UnsupportedModelError(f"the config of {name} states a vocabulary of {named} tokens, its {part} {rows}")


def checked_layer(call: AttentionCall) -> int:
    """The layer whose stored K/V a call wants to read in place; refuses K/V that the model changed after storing it."""
    layer = marked_layer(call.key, call.value)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} changes K or V after storing it, which it did not in the probe: stored blocks must not be read"
        )
    return layer


def _with_past(new: Tensor) -> Tensor:
    return torch.cat([new.new_zeros(1, new.shape[1], _NUM_PAST, new.shape[3]), new], dim=2)


@contextmanager
def _experts_without_data(configs: tuple[PreTrainedConfig, ...], device: torch.device) -> Iterator[None]:
    # Without data no expert can be chosen, so a model on the meta device computes all of them for shape's sake.
    chosen = [config for config in configs if device.type == "meta" and getattr(config, _EXPERTS, None) is not None]
    before = [getattr(config, _EXPERTS) for config in chosen]
    try:
        for config in chosen:
            setattr(config, _EXPERTS, "batched_mm")
        yield
    finally:
        for config, previous in zip(chosen, before, strict=True):
            setattr(config, _EXPERTS, previous)
