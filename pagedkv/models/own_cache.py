"""Where transformers' own cache keeps less of a layer than the layer's mask shows: beyond that the model has no one answer.

Owns the comparison. Such a model computes one thing with a cache and another without, so sequences end where the two part.
"""

from __future__ import annotations

from transformers import DynamicCache, PreTrainedModel

from pagedkv.models.positions import PositionReach
from pagedkv.models.probe import ModelShape


def bounded_by_own_cache(positions: PositionReach, model: PreTrainedModel, shape: ModelShape) -> PositionReach:
    """The same positions, or those up to which the model's own cache and its own masks agree.

    Args:
        positions: what is served as far as is known.
        model: the model.
        shape: what its layers store, and the masks with which they read it. A layer without a known mask is not judged.
    """
    widths = _own_windows(model)
    masks_by_layer = zip(shape.layer_ids, shape.masks, strict=False)
    contradicted = [
        widths[layer]
        for layer, masks in masks_by_layer
        if layer in widths and any(mask.kind == "causal" or mask.size > widths[layer] for mask in masks)
    ]
    reach = min(contradicted, default=None)
    if reach is None or (positions.reach is not None and positions.reach <= reach):
        return positions
    reason = (
        f"transformers' own cache of {type(model).__name__} keeps {reach} tokens in layers whose mask shows more, so that beyond {reach} "
        "it contradicts its own forward without a cache"
    )
    return PositionReach(positions.stated, reach, reason)


def _own_windows(model: PreTrainedModel) -> dict[int, int]:
    """By layer, how many tokens the cache keeps that ``generate`` makes for this model, where it does not keep all."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # whatever it lacks in a config, then generate does not make one either
        return {}
    return {index: layer.sliding_window for index, layer in enumerate(layers) if hasattr(layer, "sliding_window")}
