"""One step over pages: new K/V into their slots, attention through the block tables.

Owns the way from the hooks to a backend for the length of one forward, and (per runner) the options that layers attend
with. It owns neither pools nor kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from pagedkv.attention import AttendOptions, AttentionBackend, Mask, StepAttention
from pagedkv.attention.cpu_backend import CpuBackend
from pagedkv.attention.native.decoder import DecoderRun
from pagedkv.attention.ragged import attend_ragged
from pagedkv.errors import UnsupportedModelError
from pagedkv.models.context import AttentionCall, MaskFunction
from pagedkv.models.facade import marked_layer
from pagedkv.models.fused_rotation import are_angles
from pagedkv.models.masks import MaskCarriers, resolve_mask
from pagedkv.models.native_layer import NativeLayer
from pagedkv.models.probe import check_gathered, checked_layer
from pagedkv.models.run_ahead import RunAhead, run_from
from pagedkv.storage.pool import LayerPool
from pagedkv.storage.slots import Slots, packed_slots

_MAX_OPTIONS = 1024
_LEAST_LEFT_OUT = 64  # tokens that the last layer computes nothing for, from which on that is worth a dozen calls
_MOST_AHEAD_NBYTES = 8 << 20  # of results that are computed before they are asked for: what a processor's cache may hold

_ByHead = tuple[Tensor | None, Tensor | None]  # sinks and slopes, as a call gives them


class Rows(NamedTuple):
    """What goes into decoder layers: ``x [1, T, H]``, cosines and sines ``[1, T, D]``."""

    x: Tensor
    cosines: Tensor
    sines: Tensor


class LastLayer(Protocol):
    """A decoder layer of which some rows are wanted."""

    def __call__(self, rows: Rows, wanted: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``[1, K, H]`` for rows at the places ``wanted [K]``; ``attend`` stores K and V ``[T, Hkv, D]`` of all and takes their queries."""


class OptionsTable:
    """The ``AttendOptions`` of a model, made once per distinct way of attending and found again at every layer and step."""

    def __init__(self, carriers: MaskCarriers) -> None:
        self._carriers = carriers
        self._options: dict[tuple[object, ...], tuple[AttendOptions, _ByHead]] = {}
        self._plain: tuple[Tensor | None, float, AttendOptions] | None = None

    def plain(self, mask: Tensor | None, scale: float) -> AttendOptions:
        """The options of a call with a mask and a scale and nothing else. The same mask object as in the last call costs nothing."""
        plain = self._plain
        if plain is None or plain[0] is not mask or plain[1] != scale:
            found = self.of(Mask.causal() if mask is None else self._carriers.mask_of(mask), scale)
            self._plain = plain = (mask, scale, found)
        return plain[2]

    def of(self, mask: Mask, scale: float) -> AttendOptions:
        """The options of attention with a mask and a scale and nothing else."""
        return self._find(mask, scale, None, (None, None))

    def find(self, call: AttentionCall) -> AttendOptions:
        """The options of a call. A call with other sinks (a replaced parameter) or slopes gets other options."""
        return self._find(resolve_mask(call, self._carriers), call.scale, call.softcap, (call.sinks, call.alibi_slopes))

    def _find(self, mask: Mask, scale: float, softcap: float | None, by_head: _ByHead) -> AttendOptions:
        key = (mask, scale, softcap, *map(id, by_head))
        found = self._options.get(key)
        # The entry keeps its tensors alive, so their ids cannot come back as other tensors'.
        if found is not None and all(kept is given for kept, given in zip(found[1], by_head, strict=True)):
            return found[0]
        if len(self._options) >= _MAX_OPTIONS:
            self._options.clear()
        sinks, slopes = (None if given is None else given.detach().reshape(-1) for given in by_head)
        options = AttendOptions(mask=mask, scale=scale, softcap=softcap, sinks=sinks, alibi_slopes=slopes)
        self._options[key] = (options, by_head)
        return options


@dataclass(slots=True, eq=False)
class PagedStep:
    """The step context of a forward of packed tokens.

    Attributes:
        pools: one per layer that stores K/V.
        index: from transformers' layer index to the place in ``pools``.
        backend: writes and attends.
        attention: the backend's metadata of this step.
        carriers: the runner's masks.
        options: the runner's options.
        num_tokens: packed tokens, ``T``.
        gathered: layers that the model is given all K/V of, because it goes on to change them.
        is_for_logits: whether nobody asks what the model makes of other tokens than those whose logits are wanted.
        masks: for each pool, the masks that its K/V are kept for, where they are given back behind a window.
        written: layers that stored their K/V so far.
        attended: layers whose K/V was read so far.
        ahead: results of decoder layers that wait to be asked for.
    """

    pools: Sequence[LayerPool]
    index: Mapping[int, int]
    backend: AttentionBackend
    attention: StepAttention
    carriers: MaskCarriers
    options: OptionsTable
    num_tokens: int
    gathered: Set[int] = frozenset()
    masks: Sequence[Sequence[Mask]] = ()
    is_for_logits: bool = False
    written: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)
    ahead: RunAhead = field(default_factory=RunAhead)
    _slots: dict[int, Slots] = field(default_factory=dict)
    _latest: int = -1

    @property
    def complete(self) -> bool:
        """Whether every layer was stored and read through this step: nothing of the forward went another way."""
        return len(self.written) == len(self.attended) == len(self.index)

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        """The carrier of a mask function."""
        return self.carriers.carrier(mask_function, num_queries, device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Write ``[1, Hkv, T, D]`` keys and values of one layer to the step's slots; a gathered layer gets ``[1, Hkv, K, D]`` back."""
        pool = self._new_layer(layer_idx, key.shape[2] if key.shape[0] == 1 else -1, key.shape)
        self.backend.write(pool, key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1), self.attention)
        return self._gather(pool) if layer_idx in self.gathered else None

    def attend_new(self, call: AttentionCall, layer_idx: int) -> Tensor:
        """``update`` and ``attend`` in one, for K and V that are read as they are stored: ``[1, T, Hq, Dv]``."""
        self.update(call.key, call.value, layer_idx)
        return self._attend(call, layer_idx)

    def attend_joined(
        self, rows: Tensor, cosines: Tensor, sines: Tensor, *, mask: Tensor | None, scale: float, num_heads: int, layer_idx: int
    ) -> Tensor | None:
        """``attend_new`` with a rotation before it, for plain attention: ``[T, Hq * D]`` of ``rows [T, (Hq + 2 Hkv) * D]``.

        None, with nothing done, where the backend has no such call, or angles ``[T, D]`` have gaps between their rows.
        """
        if type(self.backend) is not CpuBackend or not (cosines.is_contiguous() and sines.is_contiguous()):
            return None
        pool = self._new_layer(layer_idx, rows.shape[0], rows.shape)
        options = self._plain_options(pool, layer_idx, mask, scale)
        return self.backend.attend_joined(rows, cosines, sines, pool, self.attention, options, num_heads=num_heads)

    def take(self, layer: NativeLayer, x: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor | None) -> Tensor | None:
        """``[1, T, H]``, the result of a decoder layer that was computed before it was asked for; None where there is none."""
        result = self.ahead.take(layer, x, (cosines, sines, mask))
        if result is not None:
            self._plain_layer(layer, x.shape, mask)
        return result

    def run_decoders(self, layer: NativeLayer, x: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor | None) -> Tensor | None:
        """A whole decoder layer, ``[1, T, H]`` of ``x [1, T, H]``, and those that will follow it; None as for ``attend_joined``."""
        backend, weights = self.backend, layer.weights()
        if type(backend) is not CpuBackend or weights is None or weights.build != backend.build or not x.is_contiguous():
            return None
        if not (cosines.is_contiguous() and sines.is_contiguous()):
            return None
        given = (cosines, sines, mask)
        can_wait = not (torch.is_inference_mode_enabled() or any(each is not None and each.is_inference() for each in (x, *given)))
        if can_wait:  # of an inference tensor torch counts no changes
            self.ahead.follows(layer, x, given)
        most = max(_MOST_AHEAD_NBYTES // x.nbytes, 1) if can_wait else 1
        options = self._plain_layer(layer, x.shape, mask)
        pool = self.pools[self.index[layer.layer_idx]]
        layers, run = run_from(layer, weights, pool, self._pool_ahead, most=most)
        results = backend.run_decoders(run, x[0], cosines[0], sines[0], self.attention, options, num_heads=layer.num_heads)
        rows = [results.narrow(0, place, 1) for place in range(len(layers))]
        return self.ahead.hold(layers, run.layers, rows, given) if can_wait else rows[0]

    def pools_of(self, layers: Sequence[NativeLayer]) -> list[LayerPool] | None:
        """The pools of layers that are all of the model's, before any of them stored K and V; else None."""
        index = self.index
        if self.written or len(layers) != len(index):
            return None
        places = [index.get(layer.layer_idx) for layer in layers]
        pools = [self.pools[place] for place in dict.fromkeys(places) if place is not None]
        return pools if len(pools) == len(layers) else None

    def run_all(self, layers: Sequence[NativeLayer], run: DecoderRun, rows: Rows, mask: Mask) -> Tensor | None:
        """All decoder layers, ``[1, T, H]`` of ``rows``; None, with nothing done, where the rows are not such as they take."""
        if not self._fit(run, rows):
            return None
        return self._run(layers, run, rows, mask, len(layers))

    def run_wanted(self, layers: Sequence[NativeLayer], run: DecoderRun, rows: Rows, mask: Mask, last: LastLayer) -> Tensor | None:
        """The same of the wanted tokens, ``[1, K, H]``; None, with nothing done, where that is no gain or cannot be.

        Of the last layer, other tokens need no more than their K and V: attention and all that follows is computed for the wanted ones.
        """
        batch = self.attention.batch
        if not self.is_for_logits or len(layers) < 2 or self.num_tokens - len(batch.plan.logits_indices) < _LEAST_LEFT_OUT:
            return None
        wanted = batch.wanted()
        if wanted is None or not self._fit(run, rows):
            return None
        x = self._run(layers, run, rows, mask, len(layers) - 1)
        options, pool = self.options.of(mask, layers[0].scale), self.pools[self.index[layers[-1].layer_idx]]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.backend.write(pool, key, value, self.attention)
            if not wanted.plan.num_seqs:
                return query.new_empty(0, query.shape[1] * pool.spec.value_dim)
            return self.backend.attend(query[batch.logits_indices], pool, self.backend.plan(wanted), options).flatten(1)

        return last(Rows(x, rows.cosines, rows.sines), batch.logits_indices, attend)

    def _fit(self, run: DecoderRun, rows: Rows) -> bool:
        """Whether rows are such as the layers of a run take."""
        (x, cosines, sines), (weights, *_), (pool, *_) = rows, run.layers, run.pools
        return (
            type(self.backend) is CpuBackend
            and weights.build == self.backend.build
            and x.dtype is torch.bfloat16
            and x.shape == (1, self.num_tokens, weights.hidden_size)
            and are_angles(cosines, sines, x.dtype, self.num_tokens, pool.spec.key_dim)
            and x.is_contiguous()
            and cosines.is_contiguous()
            and sines.is_contiguous()
        )

    def _run(self, layers: Sequence[NativeLayer], run: DecoderRun, rows: Rows, mask: Mask, num_layers: int) -> Tensor:
        """The first layers, for rows that fit; all are noted as stored and read, the rest being the caller's to compute."""
        options = self.options.of(mask, layers[0].scale)
        for layer_idx, place in self.index.items():
            self._check_kept(self.pools[place], layer_idx, options)
        self.written.update(self.index)
        self.attended.update(self.index)
        x, cosines, sines = (each[0] for each in rows)
        backend = cast(CpuBackend, self.backend)  # as _fit saw it
        return backend.run_decoders(
            run, x, cosines, sines, self.attention, options, num_heads=layers[0].num_heads, num_layers=num_layers, keeps_all=False
        )

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention ``[1, T, Hq, Dv]`` of one call over the K/V of every sequence: stored, or gathered and then changed by the model."""
        if self._latest in self.gathered and marked_layer(call.key, call.value) is None:
            return self._attend_gathered(call)
        return self._attend(call, checked_layer(call))

    def _new_layer(self, layer_idx: int, num_tokens: int, stored: Sequence[int]) -> LayerPool:
        place = self.index.get(layer_idx)
        if place is None or layer_idx in self.written or num_tokens != self.num_tokens:
            raise UnsupportedModelError(
                f"layer {layer_idx} stored K {list(stored)} where one [1, heads, {self.num_tokens}, dim] per known layer is expected"
            )
        self.written.add(layer_idx)
        self._latest = layer_idx
        return self.pools[place]

    def _plain_layer(self, layer: NativeLayer, shape: Sequence[int], mask: Tensor | None) -> AttendOptions:
        """Note that a layer stores and reads, and check that it may; the same for each layer that is asked for, computed before or not."""
        pool = self._new_layer(layer.layer_idx, shape[1], shape)
        return self._plain_options(pool, layer.layer_idx, mask, layer.scale)

    def _plain_options(self, pool: LayerPool, layer_idx: int, mask: Tensor | None, scale: float) -> AttendOptions:
        self.attended.add(layer_idx)
        options = self.options.plain(mask, scale)
        self._check_kept(pool, layer_idx, options)
        return options

    def _pool_ahead(self, layer_idx: int) -> LayerPool | None:
        place = self.index.get(layer_idx)
        return None if place is None or layer_idx in self.written else self.pools[place]

    def _attend(self, call: AttentionCall, layer: int) -> Tensor:
        self.attended.add(layer)
        pool = self.pools[self.index[layer]]
        options = self.options.find(call)
        self._check_kept(pool, layer, options)
        return self.backend.attend(call.query.squeeze(0).transpose(0, 1), pool, self.attention, options).unsqueeze(0)

    def _check_kept(self, pool: LayerPool, layer: int, options: AttendOptions) -> None:
        """Refuse a mask that a layer was not seen to read with, where blocks behind its window are given back."""
        if pool.spec.group and options.mask not in self.masks[self.index[layer]]:
            raise UnsupportedModelError(f"layer {layer} reads with {options.mask}, which it did not in the probe: K/V may be gone")

    def _gather(self, pool: LayerPool) -> tuple[Tensor, Tensor]:
        group = pool.spec.group
        slots = self._slots.get(group)
        if slots is None:
            plan = self.attention.batch.plan
            slots = self._slots[group] = packed_slots(plan, group=group, block_size=pool.block_size, device=pool.device)
        key, value = pool.gather_slots(slots.blocks, slots.offsets)
        return key[None], value[None]

    def _attend_gathered(self, call: AttentionCall) -> Tensor:
        plan = self.attention.batch.plan
        check_gathered(call, int(plan.seq_lens.sum()))
        self.attended.add(self._latest)
        query, key, value = (tensor.squeeze(0) for tensor in (call.query, call.key, call.value))
        return attend_ragged(query, key, value, plan=plan, options=self.options.find(call)).unsqueeze(0)
