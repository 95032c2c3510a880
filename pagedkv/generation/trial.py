"""Tries a model before it is served: what its layers store, and whether it computes the same over blocks as over transformers' cache.

Owns the tokens of the trial and its bound. The reference is transformers' own dynamic cache, never code of ours.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.generation.cache import PagedCache
from pagedkv.generation.states import keeps_states
from pagedkv.models.call import ModelCall, logits_of
from pagedkv.models.limits import num_token_ids
from pagedkv.storage import LayerSpec

if TYPE_CHECKING:
    from pagedkv.generation.pool import CachePool

_SEED = 20261129
_PADDING = (0, 3, 1)  # columns of padding before each of the rows
_CHUNKS = (6, 5, 1, 1)  # columns of each forward
_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-3}
_HALF_BOUND = 5e-2


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What a model does over transformers' cache.

    Attributes:
        layer_ids: transformers' indices of the layers that store K and V, ascending.
        layers: the geometry of each.
        dtype: of K and V.
        keeps_states: whether layers keep more than K and V.
        logits: the last logits of each row after each forward, ``[R, V]`` float32.
    """

    layer_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    keeps_states: bool
    logits: tuple[Tensor, ...]


def run_reference(model: PreTrainedModel) -> Reference:
    """Run a few tokens in a left-padded batch over transformers' dynamic cache.

    Raises:
        UnsupportedModelError: the model is none that ``generate`` runs over a K/V cache alone; says why.
    """
    _check(model)
    name = type(model).__name__
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    try:
        logits = _run(model, cache)
    except Exception as error:  # whatever a model raises, it cannot be tried
        raise UnsupportedModelError(f"{name} failed over transformers' own cache: {type(error).__name__}: {error}") from error
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.numel():
            found[index] = (keys, values)
    if not found:
        raise UnsupportedModelError(f"{name} stored no K/V: its layers do not use the cache that they are given")
    dtypes = {tensor.dtype for pair in found.values() for tensor in pair}
    devices = {tensor.device for pair in found.values() for tensor in pair}
    if len(dtypes) > 1 or len(devices) > 1:
        several = sorted(map(str, dtypes)) + sorted(map(str, devices))
        raise UnsupportedModelError(f"{name} stores K/V in more than one dtype or on more than one device: {', '.join(several)}")
    return Reference(
        layer_ids=tuple(found),
        layers=tuple(LayerSpec(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in found.values()),
        dtype=dtypes.pop(),
        keeps_states=keeps_states(cache),
        logits=logits,
    )


def trial_blocks(block_size: int) -> int:
    """Blocks that ``compare`` needs, the null block included."""
    return 1 + sum(-(-(sum(_CHUNKS) - padding) // block_size) for padding in _PADDING)


def compare(pool: CachePool, reference: Reference) -> None:
    """Run the same tokens over blocks, which hold NaN until they are written.

    Raises:
        UnsupportedModelError: the logits are others.
    """
    name = type(pool.model).__name__
    pool.fill_free_blocks(float("nan"))
    with PagedCache(pool) as cache:
        try:
            logits = _run(pool.model, cache)
        except ConfigError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"{name} failed over a paged cache: {type(error).__name__}: {error}") from error
    bound = _BOUNDS.get(reference.dtype, _HALF_BOUND)
    for step, (ours, own) in enumerate(zip(logits, reference.logits, strict=True)):
        finite = own.isfinite()
        worst = float((ours - own).masked_fill(~finite, 0.0).abs().max() / own[finite].abs().max().clamp_min(1e-30))
        if not worst <= bound or not torch.equal(ours[~finite], own[~finite]):
            raise UnsupportedModelError(
                f"{name} computes other logits over blocks than over transformers' cache: forward {step} differs by {worst:.2g} of the "
                f"largest (allowed {bound:.0e})"
            )


def _check(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers PreTrainedModel (an unwrapped one is needed)")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model, which a cache of self-attention alone would make silently wrong")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} does not generate: load it with AutoModelForCausalLM")
    ModelCall(model)  # refuses a model that takes no past_key_values
    if "cache_params" in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{name} takes its cache as cache_params, not past_key_values: it keeps recurrent state alone")
    if model.training:
        raise UnsupportedModelError(f"{name} is in training mode: a K/V cache is for inference, call model.eval()")
    if model.device.type == "meta":
        raise UnsupportedModelError(f"{name} has no weights (meta device)")
    supports: Any = model._supports_default_dynamic_cache
    if not supports():
        raise UnsupportedModelError(f"{name} has a cache class of its own, and cannot run over another")


def _run(model: PreTrainedModel, cache: Cache) -> tuple[Tensor, ...]:
    """The last logits ``[R, V]`` of each forward, of random tokens."""
    columns = sum(_CHUNKS)
    generator = torch.Generator().manual_seed(_SEED)
    token_ids = torch.randint(0, num_token_ids(model), (len(_PADDING), columns), generator=generator).to(model.device)
    mask = (torch.arange(columns) >= torch.tensor(_PADDING)[:, None]).long().to(model.device)
    prepare: Any = model.prepare_inputs_for_generation
    logits, end = [], 0
    with torch.no_grad():
        for count in _CHUNKS:
            begin, end = end, end + count
            arguments: dict[str, Any] = prepare(
                token_ids[:, begin:end],
                past_key_values=cache,
                attention_mask=mask[:, :end],
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, begin:end],
                use_cache=True,
                is_first_iteration=not begin,
            )
            logits.append(logits_of(model(**arguments))[:, -1].float())
    return tuple(logits)
