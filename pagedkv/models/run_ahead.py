"""Layers that are computed before the model asks for them, because it asked for them in this order before.

One native call for many layers leaves no Python between them. Nothing is taken for granted: a result is handed out only where the model
calls that layer with the very tensor that the layer before it gave, with the same other arguments, and neither these nor the layer's
weights and numbers were changed meanwhile. Else it is thrown away, the layer is computed as it is called, and what was taken for the order
is forgotten. A layer computed in vain has stored K and V, which the step stores again when that layer is called: no layer is computed
ahead that was called already. Not seen is what torch does not count: a tensor changed in place through its ``data`` between two layers.

Owns the results of one step that wait to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pagedkv.attention.native.decoder import DecoderLayer, DecoderRun
from pagedkv.models.native_layer import NativeLayer
from pagedkv.storage.pool import LayerPool

PoolOf = Callable[[int], LayerPool | None]

Given = tuple[Tensor | None, ...]
"""What a layer is called with beside its input: the same objects, at the same versions, are the same."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A result: of which layer, and of which weights and factor on the scores it was made."""

    layer: NativeLayer
    weights: DecoderLayer
    scale: float
    result: Tensor


class RunAhead:
    """The results of one step."""

    def __init__(self) -> None:
        self._waiting: Iterator[_Waiting] = iter(())
        self._next: _Waiting | None = None
        self._former: NativeLayer | None = None  # whose result is the latest that was handed out
        self._latest: Tensor | None = None
        self._address = self._version = 0
        self._given: Given = ()
        self._versions: tuple[int, ...] = ()

    def take(self, layer: NativeLayer, x: Tensor, given: Given) -> Tensor | None:
        """The result of a layer for ``x``, if it waits. If another waits, nothing does any more."""
        following = self._next
        if following is None:
            return None
        if following.layer is not layer or not self._goes_on(x, given) or not layer.still(following.weights, following.scale):
            self._next = None
            if self._former is not None:
                self._former.follower = None
            return None
        self._hand_out(following)
        return following.result

    def follows(self, layer: NativeLayer, x: Tensor, given: Given) -> None:
        """Note that a layer is called for which nothing waits."""
        if self._former is not None and self._goes_on(x, given):
            self._former.follower = layer

    def hold(self, layers: Sequence[NativeLayer], weights: Sequence[DecoderLayer], results: Sequence[Tensor], given: Given) -> Tensor:
        """Keep the results of layers one after the other, which are alike but for their weights, and hand out the first."""
        scale = layers[0].scale
        self._given, self._versions = given, _versions(given)
        self._version = results[0]._version  # of all of them, which share memory
        self._waiting = iter([_Waiting(*each[:2], scale, each[2]) for each in zip(layers, weights, results, strict=True)])
        self._hand_out(next(self._waiting))
        return results[0]

    def _goes_on(self, x: Tensor, given: Given) -> bool:
        if x is not self._latest or x._version != self._version or x.data_ptr() != self._address or len(given) != len(self._given):
            return False
        return all(one is other for one, other in zip(given, self._given, strict=True)) and _versions(given) == self._versions

    def _hand_out(self, waiting: _Waiting) -> None:
        self._former, self._latest, self._address = waiting.layer, waiting.result, waiting.result.data_ptr()
        self._next = next(self._waiting, None)


def _versions(given: Given) -> tuple[int, ...]:
    return tuple(each._version for each in given if each is not None)


def run_from(
    layer: NativeLayer, weights: DecoderLayer, pool: LayerPool, pool_of: PoolOf, *, most: int
) -> tuple[list[NativeLayer], DecoderRun]:
    """A layer and those that will follow it, as far as one native call can run them all.

    Args:
        layer: the first.
        weights: its weights now.
        pool: its pool.
        pool_of: the pool of a layer by transformers' index; None for one that stored K and V in this step, which are not to be overwritten.
        most: layers in all.
    """
    layers, places, seen = [layer], [(weights, pool)], {id(layer)}
    following = layer.follower
    while following is not None and id(following) not in seen and len(layers) < most and following.is_in_place:
        more, place = following.weights(), pool_of(following.layer_idx)
        if more is None or place is None or not DecoderRun.go_together(places[0], (more, place)):
            break
        if (following.scale, following.num_heads) != (layer.scale, layer.num_heads):
            break
        layers.append(following)
        places.append((more, place))
        seen.add(id(following))
        following = following.follower
    return layers, DecoderRun([each for each, _ in places], [each for _, each in places])
