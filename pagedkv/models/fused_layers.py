"""A decoder layer as one function of packed products and native operations, in place of a hundred calls of Python and torch.

Owns two proofs. An attention module is run on random rows with a cache and an attention of ours, which see what it stores, what it asks and
what it makes of the answer. A layer is copied with stubs for children, and what it passes to each and adds up is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pagedkv.attention.native.operations import DTYPES, Operations
from pagedkv.models.bridge import pointed_at_us
from pagedkv.models.context import AttentionCall, MaskFunction, activate, active_step
from pagedkv.models.facade import CacheFacade
from pagedkv.models.fused_modules import Fused, GatedMlp, Norm
from pagedkv.models.fused_rotation import are_angles
from pagedkv.models.packed_linears import PackedLinear, PackedLinears
from pagedkv.models.probe import checked_layer
from pagedkv.models.stand_ins import Place, is_plain, stand_in_for
from pagedkv.models.step import PagedStep
from pagedkv.models.trials import agree, emptied

_SEED = 20260105
_ROWS = 3


@dataclass(frozen=True, slots=True)
class Attention:
    """What an attention module was found to be: rotated queries and keys, values, and a product of what attention gives.

    Attributes:
        products: names of the children that make queries, keys and values.
        output: of the one that takes the result.
        layer_idx: transformers' index of the layer.
        scale: the attribute that holds the factor on the scores.
        width: of a head.
    """

    products: tuple[str, str, str]
    output: str
    layer_idx: int
    scale: str
    width: int


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
        order = _order_of_norms(layer, norms, others[0], mlps[0])
        if order is None:
            return None
        for width in widths:
            attention = _as_attention(attention_module, configs, width, operations)
            if attention is not None:
                first, second, mlp = (parts[key] for key in (*order, mlps[0]))
                return FusedLayer.of(name, layer, (first, second, mlp), attention_module, attention, linears, operations)
    return None


class _Stub(nn.Module):
    """A child whose result tells which child it was, and that remembers what it was called with."""

    def __init__(self, factor: float, *, in_tuple: bool = False) -> None:
        super().__init__()
        self.factor, self.in_tuple = factor, in_tuple
        self.seen: dict[str, object] = {}

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Any:
        self.seen = kwargs
        result = torch.sin(hidden_states * self.factor) + self.factor
        return (result, None) if self.in_tuple else result


def _order_of_norms(layer: nn.Module, norms: list[str], attention: str, mlp: str) -> tuple[str, str] | None:
    """The norm before attention and the one before the MLP, if the layer is two residual branches of norm and module."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn((1, _ROWS, 8), generator=generator)
    stubs = {norms[0]: _Stub(1.1), norms[1]: _Stub(0.7), attention: _Stub(1.7, in_tuple=True), mlp: _Stub(0.4)}
    passed = {"attention_mask": torch.zeros(1), "position_embeddings": (x, x), "past_key_values": object()}
    try:
        theirs = emptied(layer, {}, dict(stubs))(x, position_ids=torch.arange(_ROWS)[None], use_cache=True, **passed)
    except Exception:  # whatever a module raises, it is not one of ours
        return None
    if any(stubs[attention].seen.get(key) is not value for key, value in passed.items()):
        return None
    for first, second in permutations(norms):
        middle = x + stubs[attention](stubs[first](x))[0]
        ours = middle + stubs[mlp](stubs[second](middle))
        if agree(ours, theirs):
            return first, second
    return None


class _Trial:
    """A step that shows what one attention module does."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self.stored: list[tuple[Tensor, Tensor, int]] = []
        self.calls: list[AttentionCall] = []
        self.answer = torch.zeros(0)

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        raise NotImplementedError

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> None:
        self.stored.append((key.clone(), value.clone(), layer_idx))

    def attend(self, call: AttentionCall) -> Tensor:
        checked_layer(call)
        self.calls.append(call)
        shape = (1, call.query.shape[2], call.query.shape[1], call.value.shape[3])
        self.answer = torch.randn(shape, generator=self._generator).to(call.query.dtype)
        return self.answer.clone()


def _as_attention(module: nn.Module, configs: tuple[PreTrainedConfig, ...], width: int, operations: Operations) -> Attention | None:
    linears = {key: child for key, child in module._modules.items() if isinstance(child, nn.Linear)}
    if len(linears) != 4 or len(module._modules) != 4:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    dtype = next(iter(linears.values())).weight.dtype
    if dtype not in DTYPES:
        return None
    x = torch.randn((1, _ROWS, next(iter(linears.values())).in_features), generator=generator).to(dtype)
    cos, sin = (torch.randn((1, _ROWS, width), generator=generator).to(dtype) for _ in range(2))
    trial = _Trial(generator)
    try:
        with pointed_at_us(configs), activate(trial):
            output = module(
                hidden_states=x,
                attention_mask=None,
                position_ids=torch.arange(_ROWS)[None],
                past_key_values=CacheFacade(trial),
                use_cache=True,
                position_embeddings=(cos, sin),
            )
        return _recognised(module, linears, trial, (x, cos[0], sin[0]), output, operations)
    except Exception:  # whatever a module raises, it is not one of ours
        return None


def _recognised(
    module: nn.Module, linears: Mapping[str, nn.Linear], trial: _Trial, given: tuple[Tensor, Tensor, Tensor], output: Any, ops: Operations
) -> Attention | None:
    if len(trial.stored) != 1 or len(trial.calls) != 1 or len(output) != 2 or output[1] is not None:
        return None
    (key, value, layer_idx), call = trial.stored[0], trial.calls[0]
    x, cos, sin = given
    width = cos.shape[1]
    if any(variant is not None for variant in (call.softcap, call.window, call.sinks)) or value.shape[-1] != width:
        return None
    rows = {
        name: linear(x)[0].view(_ROWS, -1, width).transpose(0, 1) for name, linear in linears.items() if linear.in_features == x.shape[2]
    }
    turned = {name: ops.rotate(row, cos, sin) for name, row in rows.items()}
    scales = [name for name, number in vars(module).items() if type(number) is float and number == call.scale]
    for q, k, v, o in permutations(linears):
        if scales and all(name in rows for name in (q, k, v)):
            results = (call.query[0], key[0], value[0], output[0])
            ours = (turned[q], turned[k], rows[v], linears[o](trial.answer.flatten(2)))
            if all(agree(mine, their) for mine, their in zip(ours, results, strict=True)):
                return Attention((q, k, v), o, layer_idx, scales[0], width)
    return None


class FusedLayer:
    """One decoder layer, computed by products and operations.

    Attributes:
        name: its dotted name.
        module: the layer.
        parts: its norms and its MLP, which stand in by themselves where the layer cannot.
        places: as those of ``Fused``.
        stand_in: what takes the places during a step.
        linears: ids of its linear layers, which need no stand-ins of their own.
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
        self._children = [(owner._modules, key, child) for owner in owners for key, child in owner._modules.items()]
        inside = [child for _, _, child in self._children if child is not None]
        self._watched = [(each, type(each), vars(each)) for each in (module, *inside)]
        self.linears = frozenset(id(child) for child in inside if isinstance(child, nn.Linear))
        self._attention_module, self._attention, self._operations = attention_module, attention, operations
        self._norms = [(part.module._parameters, vars(part.module), _norm(part)) for part in parts[:2]]
        self._products = tuple(packed[key].product for key in (attention.products[0], attention.output, found.gate, found.down))
        self._gate_first = packed[found.gate].place == 0
        self._form = found.form
        sizes = [size // attention.width for size in self._products[0].sizes]
        self._num_heads, self._num_turned = sizes[0], sizes[0] + sizes[1]
        self._inner = self._products[2].sizes[0]
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

    def still(self) -> bool:
        """Whether the layer and what is in it are what they were when they were looked at, in evaluation mode and without hooks."""
        # Spelled out: this runs for every layer of every step, mostly on memory that the weights drove out of the cache.
        for modules, key, child in self._children:
            if modules.get(key) is not child:
                return False
        for module, cls, attributes in self._watched:
            if (
                type(module) is not cls
                or attributes["training"]
                or attributes["_forward_hooks"]
                or attributes["_forward_pre_hooks"]
                or "forward" in attributes
                or attributes.get("_compiled_call_impl") is not None
            ):
                return False
        return True

    def _compute(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: object = None,
        **others: object,
    ) -> Tensor | None:
        """``[1, T, H]`` of ``x [1, T, H]``; None where this is not the call that was proven."""
        step = active_step()
        if type(step) is not PagedStep or type(past_key_values) is not CacheFacade or position_embeddings is None:
            return None
        cos, sin = position_embeddings
        if x.dtype is not self._dtype or x.shape[0] != 1 or not are_angles(cos, sin, x.dtype, x.shape[1], self._attention.width):
            return None
        if not self._norms_fit(x) or not all(product.usable() for product in self._products):
            return None
        qkv, output, gate_up, down = self._products
        middle = output.whole(self._attend(step, qkv.whole(self._normed(0, x)), cos[0], sin[0], attention_mask)).add_(x)
        both = gate_up.whole(self._normed(1, middle))
        gate, up = both[..., : self._inner], both[..., self._inner :]
        if not self._gate_first:
            gate, up = up, gate
        return down.whole(self._operations.gate(gate, up, self._form)).add_(middle)

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
        heads = joined.view(1, num_tokens, -1, attention.width).transpose(1, 2)
        self._operations.rotate_in_place(heads[0, : self._num_turned], cos, sin)
        call = AttentionCall(
            module=module,
            query=heads[:, : self._num_heads],
            key=heads[:, self._num_heads : self._num_turned],
            value=heads[:, self._num_turned :],
            mask=mask,
            scale=vars(module)[attention.scale],
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
