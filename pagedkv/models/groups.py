"""Which layers of a model keep the same positions, found from the masks that they were seen to attend with. Owns no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagedkv.attention import Mask
from pagedkv.models.probe import ModelShape
from pagedkv.storage import LayerSpec

_EVERYTHING = Mask.causal()


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Layers by what they keep.

    Attributes:
        layers: the geometry of each layer, with its group.
        windows: for each group, what its layers read; None for everything. The first group always keeps everything, as prefixes are found
            by it, and may have no layers; a model without windows has no other.
    """

    layers: tuple[LayerSpec, ...]
    windows: tuple[Mask | None, ...]


def group_layers(shape: ModelShape, *, max_positions: int | None) -> LayerGroups:
    """The groups of a model: one for each sliding or chunked mask, before them one for all layers that read everything.

    Args:
        shape: what the probe saw. K/V that several layers read are kept for the one that reads most; what the model itself reads, or goes
            on to change, is kept whole.
        max_positions: longest sequence that is served; a window that it fits into is none.
    """
    read = zip(shape.layer_ids, shape.masks or ((),) * len(shape.layers), strict=True)
    kept = [None if layer in shape.gathered else _kept(masks, max_positions) for layer, masks in read]
    windows = sorted({mask for mask in kept if mask is not None}, key=lambda mask: (mask.size, mask.kind))
    places = {mask: place for place, mask in enumerate(windows, start=1)}
    groups = [0 if mask is None else places[mask] for mask in kept]
    layers = tuple(replace(layer, group=group) for layer, group in zip(shape.layers, groups, strict=True)) if windows else shape.layers
    return LayerGroups(layers, (None, *windows))


def _kept(masks: Sequence[Mask], max_positions: int | None) -> Mask | None:
    """The one mask within which all that is read lies; None for everything."""
    widest = max(masks, key=lambda mask: mask.size, default=_EVERYTHING)
    if any(mask.kind != widest.kind for mask in masks) or (widest.kind == "chunked" and any(mask != widest for mask in masks)):
        return None
    if widest == _EVERYTHING or (max_positions is not None and widest.size >= max_positions):
        return None
    return widest
