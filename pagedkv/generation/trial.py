"""Tries a model before it is served: what its layers store, and what it computes over transformers' own cache.

Owns the tokens of the trial. Whether it computes the same over blocks is found out in ``comparison.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.generation.states import keeps_states
from pagedkv.models.call import logits_of, model_cache_argument
from pagedkv.models.compiled import is_compiled
from pagedkv.models.limits import num_token_ids
from pagedkv.models.stored import spec_of, stored_tensors
from pagedkv.storage import LayerSpec

_SEED = 20261129
_PADDING = (0, 3, 1)  # columns of padding before each of the rows
_CHUNKS = (6, 5, 1, 1)  # columns of each forward


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What a model does over transformers' cache.

    Attributes:
        layer_ids: transformers' indices of the layers that store K and V, ascending.
        layers: the geometry of each.
        cross_layers: the geometry of layers of cross attention by transformers' index; empty for a decoder alone.
        dtype: of K and V.
        keeps_states: whether layers keep more than K and V.
        logits: the last logits of each row after each forward, ``[R, V]`` float32.
    """

    layer_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    cross_layers: Mapping[int, LayerSpec]
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
    config = model.config.get_text_config(decoder=True)
    # The config of some encoder-decoder models says how many layers the encoder has: there the cache finds out by itself.
    paired = bool(model.config.is_encoder_decoder)
    cache, cross = DynamicCache() if paired else DynamicCache(config=config), DynamicCache()
    try:
        logits = run_trial(model, EncoderDecoderCache(cache, cross) if paired else cache)
    except Exception as error:  # whatever a model raises, it cannot be tried
        raise UnsupportedModelError(f"{name} failed over transformers' own cache: {type(error).__name__}: {error}") from error
    found, found_cross = stored_tensors(cache), stored_tensors(cross)
    if not found:
        why = "it keeps recurrent state alone" if keeps_states(cache) else "its layers do not use the cache that they are given"
        raise UnsupportedModelError(f"{name} stored no K/V: {why}")
    tensors = [tensor for pair in (*found.values(), *found_cross.values()) for tensor in pair]
    dtypes, devices = {tensor.dtype for tensor in tensors}, {tensor.device for tensor in tensors}
    if len(dtypes) > 1 or len(devices) > 1:
        several = sorted(map(str, dtypes)) + sorted(map(str, devices))
        raise UnsupportedModelError(f"{name} stores K/V in more than one dtype or on more than one device: {', '.join(several)}")
    return Reference(
        layer_ids=tuple(found),
        layers=tuple(map(spec_of, found.values())),
        cross_layers={layer: spec_of(pair) for layer, pair in found_cross.items()},
        dtype=dtypes.pop(),
        keeps_states=keeps_states(cache),
        logits=logits,
    )


def trial_blocks(block_size: int) -> int:
    """Blocks that ``compare`` needs at most, the null block included."""
    return 1 + len(_PADDING) * -(-sum(_CHUNKS) // block_size)


def _check(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers PreTrainedModel (an unwrapped one is needed)")
    name = type(model).__name__
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"the encoder of {name} reads {model.main_input_name}: only tokens are supported")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} does not generate: load it with AutoModelForCausalLM")
    model_cache_argument(model)  # refuses a model that takes no cache
    if model.training:
        raise UnsupportedModelError(f"{name} is in training mode: a K/V cache is for inference, call model.eval()")
    if is_compiled(model):
        raise UnsupportedModelError(f"{name} is compiled (model.compile()), and a compiler cannot follow tables: use one that is not")
    if model.device.type == "meta":
        raise UnsupportedModelError(f"{name} has no weights (meta device)")
    supports: Any = model._supports_default_dynamic_cache
    if not supports():
        raise UnsupportedModelError(f"{name} has a cache class of its own, and cannot run over another")


def run_trial(model: PreTrainedModel, cache: Cache) -> tuple[Tensor, ...]:
    """The last logits ``[R, V]`` of each forward, of random tokens."""
    return _run_both(model, cache) if model.config.is_encoder_decoder else _run_decoder(model, cache)


def _run_both(model: PreTrainedModel, cache: Cache) -> tuple[Tensor, ...]:
    """Right-padded input, and a decoder without padding."""
    columns = sum(_CHUNKS)
    generator = torch.Generator().manual_seed(_SEED)
    token_ids = torch.randint(3, num_token_ids(model), (2, len(_PADDING), columns), generator=generator).to(model.device)
    mask = (torch.arange(columns) < columns - torch.tensor(_PADDING)[:, None]).long().to(model.device)
    name = model_cache_argument(model)
    logits, end = [], 0
    with torch.no_grad():
        encoder: Any = model.get_encoder()
        encoded = encoder(input_ids=token_ids[0], attention_mask=mask)
        for count in _CHUNKS:
            begin, end = end, end + count
            arguments = {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": token_ids[1, :, begin:end]}
            logits.append(logits_of(model(**arguments, **{name: cache}, use_cache=True))[:, -1].float())
    return tuple(logits)


def _run_decoder(model: PreTrainedModel, cache: Cache) -> tuple[Tensor, ...]:
    """A left-padded batch."""
    columns = sum(_CHUNKS)
    generator = torch.Generator().manual_seed(_SEED)
    token_ids = torch.randint(0, num_token_ids(model), (len(_PADDING), columns), generator=generator).to(model.device)
    mask = (torch.arange(columns) >= torch.tensor(_PADDING)[:, None]).long().to(model.device)
    name = model_cache_argument(model)
    prepare: Any = model.prepare_inputs_for_generation
    logits, end = [], 0
    with torch.no_grad():
        for count in _CHUNKS:
            begin, end = end, end + count
            arguments: dict[str, Any] = prepare(
                token_ids[:, begin:end],
                **{name: cache},
                attention_mask=mask[:, :end],
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, begin:end],
                use_cache=True,
                is_first_iteration=not begin,
            )
            logits.append(logits_of(model(**arguments))[:, -1].float())
    return tuple(logits)
