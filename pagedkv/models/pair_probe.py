"""Learns what an encoder-decoder stores from a forward of a few tokens over transformers' own caches, on any device or none."""

from __future__ import annotations

import torch

from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models.context import OwnAttention, activate
from pagedkv.models.facade import cross_id
from pagedkv.models.pair_call import ANY_TOKEN, PairCall
from pagedkv.models.positions import PositionTables
from pagedkv.models.probe import EncoderShape, ModelShape, check_stated
from pagedkv.models.stored import spec_of, stored_tensors
from pagedkv.storage import LayerSpec

_NUM_SOURCE_TOKENS, _NUM_TOKENS = 5, 3


def probe_pair(call: PairCall) -> ModelShape:
    """Run a few tokens through encoder and decoder and look at what the layers have stored.

    Args:
        call: how to call the model, which may live on the meta device.

    Raises:
        UnsupportedModelError: the model failed, or stored other things than K and V of self attention and cross attention.

    Cost: one forward of 5 tokens of the encoder and 3 of the decoder; no computation on the meta device.
    """
    name, device = type(call.model).__name__, call.model.device
    source = torch.full((1, _NUM_SOURCE_TOKENS), ANY_TOKEN, device=device)
    tokens = torch.full((1, _NUM_TOKENS), ANY_TOKEN, device=device)
    read = PositionTables(torch.arange(_NUM_SOURCE_TOKENS, device=device))
    counted = PositionTables(torch.arange(_NUM_TOKENS, device=device))
    mask = None if device.type == "meta" else torch.ones_like(source)  # there, nobody can look whether it hides anything
    try:
        with activate(OwnAttention()):
            with read:
                states = call.encode(source, mask)
            with counted:
                cache, logits = call.stored(states, mask, tokens)
    except ConfigError:
        raise
    except Exception as error:  # whatever a model raises, it cannot be tried
        raise UnsupportedModelError(f"{name} failed over transformers' own caches: {type(error).__name__}: {error}") from error
    check_stated(call.model, int(logits.shape[-1]), _least(read.reach, counted.reach))
    own, cross = stored_tensors(cache.self_attention_cache), stored_tensors(cache.cross_attention_cache)
    for part, found, count in (("self attention", own, _NUM_TOKENS), ("cross attention", cross, _NUM_SOURCE_TOKENS)):
        if not found or any(len(pair[0].shape) != 4 or pair[0].shape[2] != count for pair in found.values()):
            raise UnsupportedModelError(f"{name} does not store one K and V of {part} for each token: its caches are of another kind")
    tensors = [tensor for pair in (*own.values(), *cross.values()) for tensor in pair]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise UnsupportedModelError(f"{name} stores K/V in several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    specs, crossed = {layer: spec_of(pair) for layer, pair in own.items()}, {layer: spec_of(pair) for layer, pair in cross.items()}
    layers = _layers(specs, crossed)
    places = {layer: place for place, layer in enumerate(layers)}
    return ModelShape(
        layer_ids=tuple(layers),
        layers=tuple(layers.values()),
        dtype=dtypes.pop(),
        vocab_size=int(logits.shape[-1]),
        encoder=EncoderShape(
            cross={layer: places[layer if specs.get(layer) == spec else cross_id(layer)] for layer, spec in crossed.items()},
            width=int(states.shape[-1]),
            dtype=states.dtype,
            max_source_tokens=read.reach,
            max_decoder_tokens=counted.reach,
            tables=tuple(counted.tables),
        ),
    )


def check_keeps_modules(call: PairCall) -> None:
    """Refuse a model whose encoder is another one after it has read a few tokens, for good: there is no one answer to compare with."""
    before = list(call.model.modules())
    source = torch.full((1, _NUM_SOURCE_TOKENS), ANY_TOKEN, device=call.model.device)
    try:
        call.encode(source, torch.ones_like(source))
    except Exception:  # whatever a model raises, the probe meets it again
        return
    if any(module is not former for module, former in zip(call.model.modules(), before, strict=False)):
        name = type(call.model).__name__
        raise UnsupportedModelError(
            f"a short input makes {name} exchange modules of it for good: what it computes depends on what ran before"
        )


def _layers(own: dict[int, LayerSpec], cross: dict[int, LayerSpec]) -> dict[int, LayerSpec]:
    """By number, the layers of a storage: of self attention, and those of cross attention that cannot lie in them."""
    more = {cross_id(layer): spec for layer, spec in cross.items() if own.get(layer) != spec}
    return dict(sorted({**own, **more}.items()))


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)
