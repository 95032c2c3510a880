"""Learns a model's layers from what it writes: one forward of a few tokens with a recording step, on any device or none.

Owns the recording. Shapes come from the tensors of the first cache update of every layer, never from a config, which
does not say them for every model. On the meta device nothing is allocated and nothing computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pagedkv.attention import AttentionSpec, Mask
from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models.bridge import attention_configs, pointed_at_us
from pagedkv.models.call import PackedCall
from pagedkv.models.context import AttentionCall, MaskFunction, activate
from pagedkv.models.facade import CacheFacade, marked_layer
from pagedkv.models.limits import max_positions, num_token_ids
from pagedkv.models.masks import MaskCarriers, resolve_mask
from pagedkv.models.positions import PositionTables
from pagedkv.storage import LayerSpec

_NUM_TOKENS = 3
_EXPERTS = "_experts_implementation_internal"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What one forward showed about a model.

    Attributes:
        layer_ids: transformers' layer indices that store K/V, ascending; layer ``i`` of a storage is ``layer_ids[i]``.
        layers: the geometry of each of them.
        dtype: dtype of K and V.
        requests: what layers ask of attention, without repeats, ``block_size`` still 0.
        vocab_size: width of the logits.
    """

    layer_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    requests: tuple[AttentionSpec, ...]
    vocab_size: int


def probe_model(model: PreTrainedModel, call: PackedCall) -> ModelShape:
    """Run a few tokens through a model and record what its layers store and ask.

    Args:
        model: a causal language model that ``refusals.check_model`` accepted; may live on the meta device.
        call: how to call it.

    Raises:
        UnsupportedModelError: the model failed, stored nothing, or did something with K/V that paging cannot follow.

    Cost: one forward of 3 tokens; no computation on the meta device.
    """
    device = model.device
    step = _RecordingStep(shapes_only=device.type == "meta")
    tokens = torch.zeros(_NUM_TOKENS, dtype=torch.int64, device=device)
    positions = torch.arange(_NUM_TOKENS, device=device)
    configs = attention_configs(model)
    tables = PositionTables(positions)
    try:
        with tables, pointed_at_us(configs), _experts_without_data(configs, device), activate(step):
            logits = call(tokens, positions, cache=CacheFacade(step), logits_indices=positions)
    except ConfigError:
        raise
    except Exception as error:
        # Whatever a model raises over our cache means one thing to the caller: it cannot be run.
        raise UnsupportedModelError(f"{type(model).__name__} failed over a paged cache: {type(error).__name__}: {error}") from error
    shape = step.shape(type(model).__name__, int(logits.shape[-1]))
    _check_config(model, shape, tables)
    return shape


class _RecordingStep:
    """A step that stores nothing and answers zeros of the right shape."""

    def __init__(self, *, shapes_only: bool) -> None:
        self._carriers = MaskCarriers(shapes_only=shapes_only)
        self._layers: dict[int, LayerSpec] = {}
        self._dtypes: set[torch.dtype] = set()
        self._requests: dict[AttentionSpec, None] = {}
        self._attended: set[int] = set()

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        return self._carriers.carrier(mask_function, num_queries, device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> None:
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3] or key.shape[0] != 1 or key.shape[2] != _NUM_TOKENS:
            raise UnsupportedModelError(
                f"layer {layer_idx} stores K {list(key.shape)} and V {list(value.shape)}; [1, heads, {_NUM_TOKENS}, dim] each is expected"
            )
        if layer_idx in self._layers:
            raise UnsupportedModelError(f"layer {layer_idx} stores K/V twice in one forward")
        self._layers[layer_idx] = LayerSpec(num_kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3])
        self._dtypes |= {key.dtype, value.dtype}

    def attend(self, call: AttentionCall) -> Tensor:
        layer = checked_layer(call)
        self._attended.add(layer)
        spec = self._layers[layer]
        request = AttentionSpec(
            num_heads=call.query.shape[1],
            num_kv_heads=spec.num_kv_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            block_size=1,  # the runner knows, and puts it in
            dtype=call.query.dtype,
            device_type=call.query.device.type,
            mask=resolve_mask(call, self._carriers),
            softcap=call.softcap,
            sinks=call.sinks is not None,
            scale=call.scale,
        )
        self._requests.setdefault(request)
        return call.query.new_zeros((1, call.query.shape[2], call.query.shape[1], spec.value_dim))

    def shape(self, name: str, vocab_size: int) -> ModelShape:
        if not self._layers:
            raise UnsupportedModelError(f"{name} stored no K/V: its layers do not use the cache that they are given")
        unread = sorted(set(self._layers) - self._attended)
        if unread:
            raise UnsupportedModelError(f"{name} does not read the K/V of layers {unread} through transformers' AttentionInterface")
        if len(self._dtypes) > 1:
            raise UnsupportedModelError(f"{name} stores K/V in several dtypes: {', '.join(sorted(map(str, self._dtypes)))}")
        ids = tuple(sorted(self._layers))
        return ModelShape(
            layer_ids=ids,
            layers=tuple(self._layers[layer] for layer in ids),
            dtype=next(iter(self._dtypes)),
            requests=tuple(self._requests),
            vocab_size=vocab_size,
        )


def _check_config(model: PreTrainedModel, shape: ModelShape, tables: PositionTables) -> None:
    """Raise ``UnsupportedModelError`` where the config says more than the model has: positions, or tokens."""
    name, stated = type(model).__name__, max_positions(model.config)
    if tables.reach is not None and stated is not None and tables.reach < stated:
        raise UnsupportedModelError(
            f"the config of {name} states {stated} positions, its table of learned positions has rows for {tables.reach}"
        )
    named = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    for part, rows in (("output head scores", shape.vocab_size), ("embedding reads", num_token_ids(model))):
        if isinstance(named, int) and rows < named:
            raise UnsupportedModelError(f"the config of {name} states a vocabulary of {named} tokens, its {part} {rows}")


def checked_layer(call: AttentionCall) -> int:
    """The layer whose stored K/V a call wants to read; refuses K/V that the model changed after storing it."""
    layer = marked_layer(call.key, call.value)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} changes K or V after storing it (latent attention, for example), "
            "so reading the stored blocks would be wrong; not supported in this release"
        )
    return layer


def windows(requests: tuple[AttentionSpec, ...]) -> tuple[Mask, ...]:
    """The sliding and chunked masks among requests, without repeats, smallest first."""
    return tuple(sorted({request.mask for request in requests if request.mask.kind != "causal"}, key=lambda mask: (mask.size, mask.kind)))


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
