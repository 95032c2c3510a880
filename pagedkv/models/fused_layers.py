"""A decoder layer as one function of packed products and native operations, in place of a hundred calls of Python and torch.

Owns what the function computes, and when it may: as long as the layer is what it was when it was proven (``layer_proofs.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pagedkv.attention.native.operations import Operations
from pagedkv.models.context import AttentionCall, active_step
from pagedkv.models.facade import CacheFacade
from pagedkv.models.fused_modules import Fused, GatedMlp, Norm
from pagedkv.models.fused_rotation import are_angles
from pagedkv.models.layer_proofs import Attention, as_attention, order_of_norms
from pagedkv.models.native_layer import NativeLayer
from pagedkv.models.packed_linears import PackedLinear, PackedLinears
from pagedkv.models.stand_ins import Place, is_plain, stand_in_for
from pagedkv.models.step import PagedStep, Rows
from pagedkv.models.watches import ModuleWatch


def find_layers(
    model: nn.Module,
    parts: Sequence[Fused],
    linears: PackedLinears,
    configs: tuple[PreTrainedConfig, ...],
    widths: Sequence[int],
    operations: Operations,
) -> list[FusedLayer]:
    """The decoder layers of a model that are proven, all of whose products are packed. The model is run, but not changed.

    Args:
        model: with its own modules in place.
        parts: its norms and MLPs that are proven.
        linears: its packed products.
        configs: what ``pointed_at_us`` takes.
        widths: of the heads that layers have.
        operations: what computes.
    """
    known = {id(part.module): part for part in parts}
    found = []
    for parent_name, parent in model.named_modules():
        for name, layer in parent._modules.items():
            children = [] if layer is None else list(layer._modules.values())
            if layer is None or len(children) != 4 or sum(id(child) in known for child in children) != 3 or layer._parameters:
                continue
            fused = _as_layer(f"{parent_name}.{name}".removeprefix("."), layer, known, linears, configs, widths, operations)
            if fused is not None:
                fused.places.append((parent._modules, name))
                found.append(fused)
    return found


def _as_layer(
    name: str,
    layer: nn.Module,
    known: Mapping[int, Fused],
    linears: PackedLinears,
    configs: tuple[PreTrainedConfig, ...],
    widths: Sequence[int],
    operations: Operations,
) -> FusedLayer | None:
    parts = {key: known[id(child)] for key, child in layer._modules.items() if id(child) in known}
    norms = [key for key, part in parts.items() if isinstance(part.found, Norm)]
    mlps = [key for key, part in parts.items() if isinstance(part.found, GatedMlp)]
    others = [key for key in layer._modules if key not in parts]
    if len(norms) != 2 or len(mlps) != 1 or not is_plain(layer):
        return None
    attention_module = layer._modules[others[0]]
    if attention_module is None or not is_plain(attention_module) or attention_module._parameters:
        return None
    with torch.no_grad():
        order = order_of_norms(layer, norms, others[0], mlps[0])
        if order is None:
            return None
        for width in widths:
            attention = as_attention(attention_module, configs, width, operations)
            if attention is not None:
                first, second, mlp = (parts[key] for key in (*order, mlps[0]))
                return FusedLayer.of(name, layer, (first, second, mlp), attention_module, attention, linears, operations)
    return None


class FusedLayer:
    """One decoder layer, computed by products and operations.

    Attributes:
        name: its dotted name.
        module: the layer.
        parts: its norms and its MLP, which stand in by themselves where the layer cannot.
        places: as those of ``Fused``.
        stand_in: what takes the places during a step.
        watch: over the layer and what is in it, as they were when they were looked at.
        linears: ids of its linear layers, which need no stand-ins of their own.
        native: the layer as the native library runs it, where its products are of the kind for that; None where they never are.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parts: tuple[Fused, Fused, Fused],
        attention_module: nn.Module,
        attention: Attention,
        packed: Mapping[str, PackedLinear],
        operations: Operations,
    ) -> None:
        self.name, self.module, self.parts = name, module, parts
        self.places: list[Place] = []
        self.stand_in = stand_in_for(module, self._compute)
        mlp, found = parts[2].module, _gated(parts[2])
        owners = (module, attention_module, mlp)
        inside = [child for owner in owners for child in owner._modules.values() if child is not None]
        self.watch = ModuleWatch((module, *inside), owners)
        self.linears = frozenset(id(child) for child in inside if isinstance(child, nn.Linear))
        self._attention_module, self._attention, self._operations = attention_module, attention, operations
        self._norms = [(part.module._parameters, vars(part.module), _norm(part)) for part in parts[:2]]
        self._products = tuple(packed[key].product for key in (attention.products[0], attention.output, found.gate, found.down))
        self._gate_first = packed[found.gate].place == 0
        self._form = found.form
        sizes = [size // attention.width for size in self._products[0].sizes]
        self._num_heads, self._num_turned = sizes[0], sizes[0] + sizes[1]
        self._inner = self._products[2].sizes[0]
        has_pairs = all(product.pairs is not None for product in self._products)
        self.native = self._native(attention) if self._gate_first and has_pairs else None
        self._dtype = next(iter(packed.values())).weight.dtype

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        parts: tuple[Fused, Fused, Fused],
        attention_module: nn.Module,
        attention: Attention,
        linears: PackedLinears,
        operations: Operations,
    ) -> FusedLayer | None:
        """The layer, or None where its linear layers are not packed as it needs them."""
        found = _gated(parts[2])
        groups = (
            (attention_module, attention.products),
            (attention_module, (attention.output,)),
            (parts[2].module, (found.gate, found.up)),
            (parts[2].module, (found.down,)),
        )
        packed: dict[str, PackedLinear] = {}
        for owner, names in groups:
            stand_ins = [None if (child := owner._modules[key]) is None else linears.stand_in(child) for key in names]
            together = [stand_in for stand_in in stand_ins if stand_in is not None]
            if len(together) != len(names) or any(other.product is not together[0].product for other in together):
                return None
            if len(together[0].product.sizes) != len(names) or set(names) & set(packed):
                return None
            packed.update(zip(names, together, strict=True))
        if [packed[key].place for key in attention.products] != [0, 1, 2]:
            return None
        return cls(name, module, parts, attention_module, attention, packed, operations)

    def _native(self, attention: Attention) -> NativeLayer:
        return NativeLayer(
            self._norms,
            self._products,
            self._form,
            attributes=vars(self._attention_module),
            scale=attention.scale,
            layer_idx=attention.layer_idx,
            num_heads=self._num_heads,
        )

    def looked_at(self) -> bool:
        """Whether it stands in the model in the step that begins: as long as the layer is ``still`` what it was."""
        is_still = self.still()
        if self.native is not None:
            self.native.is_in_place = is_still
        return is_still

    def still(self) -> bool:
        """Whether the layer and what is in it are what they were when they were looked at, in evaluation mode and without hooks."""
        return self.watch.still()

    def _compute(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: object = None,
        past_key_values: object = None,
        **others: object,
    ) -> Tensor | None:
        """``[1, T, H]`` of ``x [1, T, H]``; None where this is not the call that was proven."""
        step, given = active_step(), past_key_values if cache is None else cache
        if type(step) is not PagedStep or type(given) is not CacheFacade or position_embeddings is None:
            return None
        cos, sin = position_embeddings
        if self.native is not None and (waiting := step.take(self.native, x, cos, sin, attention_mask)) is not None:
            return waiting
        if x.dtype is not self._dtype or x.shape[0] != 1 or not are_angles(cos, sin, x.dtype, x.shape[1], self._attention.width):
            return None
        if self.native is not None and (at_once := step.run_decoders(self.native, x, cos, sin, attention_mask)) is not None:
            return at_once
        qkv, output, gate_up, down = self._products
        if not (self._norms_fit(x) and qkv.usable() and output.usable() and gate_up.usable() and down.usable()):
            return None
        return self._finished(self._attend(step, qkv.whole(self._normed(0, x)), cos[0], sin[0], attention_mask), x)

    def of_wanted(self, rows: Rows, wanted: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``[1, K, H]`` of the tokens at ``wanted [K]``; only right while ``still()``, for rows that run natively."""
        x, cosines, sines = rows
        joined = self._products[0].whole(self._normed(0, x)).view(x.shape[1], -1, self._attention.width)
        self._operations.rotate_in_place(joined[:, : self._num_turned].transpose(0, 1), cosines[0], sines[0])
        query, key, value = joined[:, : self._num_heads], joined[:, self._num_heads : self._num_turned], joined[:, self._num_turned :]
        return self._finished(attend(query, key, value)[None], x[:, wanted])

    def _finished(self, attended: Tensor, x: Tensor) -> Tensor:
        """The layer's rows, of what attention gave and what went into the layer."""
        _, output, gate_up, down = self._products
        middle = output.whole(attended, x)
        both = gate_up.whole(self._normed(1, middle))
        gate, up = both[..., : self._inner], both[..., self._inner :]
        if not self._gate_first:
            gate, up = up, gate
        return down.whole(self._operations.gate(gate, up, self._form), middle)

    def _normed(self, which: int, x: Tensor) -> Tensor:
        parameters, attributes, found = self._norms[which]
        weight = cast(Tensor, parameters["weight"])  # as _norms_fit saw it
        return self._operations.norm(x, weight, attributes[found.epsilon], found.form)

    def _norms_fit(self, x: Tensor) -> bool:
        for parameters, attributes, found in self._norms:
            weight = parameters.get("weight")
            if weight is None or weight.dtype is not x.dtype or weight.shape != x.shape[2:] or not weight.is_contiguous():
                return False
            if type(attributes.get(found.epsilon)) is not float:
                return False
        return True

    def _attend(self, step: PagedStep, joined: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        num_tokens, attention, module = joined.shape[1], self._attention, self._attention_module
        scale = vars(module)[attention.scale]
        attended = step.attend_joined(joined[0], cos, sin, mask=mask, scale=scale, num_heads=self._num_heads, layer_idx=attention.layer_idx)
        if attended is not None:
            return attended[None]
        heads = joined.view(1, num_tokens, -1, attention.width).transpose(1, 2)
        self._operations.rotate_in_place(heads[0, : self._num_turned], cos, sin)
        call = AttentionCall(
            module=module,
            query=heads[:, : self._num_heads],
            key=heads[:, self._num_heads : self._num_turned],
            value=heads[:, self._num_turned :],
            mask=mask,
            scale=scale,
            softcap=None,
            window=None,
            sinks=None,
        )
        return step.attend_new(call, attention.layer_idx).view(1, num_tokens, -1)


def _gated(part: Fused) -> GatedMlp:
    if not isinstance(part.found, GatedMlp):
        raise TypeError(f"{part.name} is no gated MLP")
    return part.found


def _norm(part: Fused) -> Norm:
    if not isinstance(part.found, Norm):
        raise TypeError(f"{part.name} is no norm")
    return part.found
