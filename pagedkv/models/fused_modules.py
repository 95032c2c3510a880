"""Norms and gated MLPs that run as one native operation each, in a model's place of its own modules for the length of a step.

Owns the proof that a module computes what the operation does. It knows no model by name: a module is copied without its weights, the copy
is given small random ones, and what it then makes of random rows is compared in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from pagedkv.attention.native.operations import DTYPES, GATE_FORMS, NORM_FORMS, Operations, evenly_spaced
from pagedkv.models.stand_ins import Compute, Place, is_plain, stand_in_for
from pagedkv.models.trials import agree, emptied, tried

_SEED = 20260103
_WIDTH, _INNER = 8, 12  # of the small weights


@dataclass(frozen=True, slots=True)
class Norm:
    """What a norm was found to be: the attribute that holds its epsilon, and the form as an index of ``NORM_FORMS``."""

    epsilon: str
    form: int


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """What an MLP was found to be: the names of its children, and the form as an index of ``GATE_FORMS``."""

    gate: str
    up: str
    down: str
    activation: str
    form: int


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """A module that an operation can stand in for.

    Attributes:
        name: its dotted name.
        module: the module.
        found: what it was found to be.
        places: where it stands; more than one where parents share it.
        stand_in: what takes the places during a step.
        still: whether the module is what it was when it was looked at; a module with hooks is not: they are told which module they serve.
    """

    name: str
    module: nn.Module
    found: Norm | GatedMlp
    places: list[Place]
    stand_in: nn.Module
    still: Callable[[], bool]


def find_fusable(model: nn.Module, operations: Operations) -> list[Fused]:
    """The norms and gated MLPs of a model, each proven. Nothing of the model is changed, and no generator of the user drawn from.

    Cost: some hundred microseconds per module.
    """
    found: dict[int, Fused | None] = {}
    for parent_name, parent in model.named_modules():
        for name, module in parent._modules.items():
            if module is None:
                continue
            if id(module) not in found:
                found[id(module)] = _looked_at(f"{parent_name}.{name}".removeprefix("."), module, operations)
            entry = found[id(module)]
            if entry is not None:
                entry.places.append((parent._modules, name))
    return [entry for entry in found.values() if entry is not None]


def _looked_at(name: str, module: nn.Module, operations: Operations) -> Fused | None:
    if not is_plain(module):
        return None
    children = [child for child in module._modules.values() if child is not None]
    with torch.no_grad():
        if not children and set(module._parameters) == {"weight"}:
            return _as_norm(name, module, operations)
        if not module._parameters and len(children) == len(module._modules) == 4:
            return _as_gated_mlp(name, module, operations)
    return None


def _as_norm(name: str, module: nn.Module, operations: Operations) -> Fused | None:
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter or weight.dim() != 1 or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return None
    generator = torch.Generator().manual_seed(_SEED)
    random = torch.randn(weight.shape, generator=generator)
    probe = emptied(module, {"weight": nn.Parameter(random, requires_grad=False)}, {})
    rows = torch.randn((1, 3, weight.shape[0]), generator=generator)
    # Small rows, because only there the number that is added to the mean shows.
    samples = [rows, rows * 1e-3]
    theirs = [tried(probe, sample) for sample in samples]
    for attribute in [key for key, value in vars(module).items() if type(value) is float and value > 0]:
        for form in (0, len(NORM_FORMS) - 1):
            ours = [operations.norm(sample, random, vars(module)[attribute], form) for sample in samples]
            if all(agree(mine, their) for mine, their in zip(ours, theirs, strict=True)):
                norm = Norm(attribute, _rounding(module, rows.to(weight.dtype), attribute, form, operations))
                return Fused(name, module, norm, [], stand_in_for(module, _norm_of(module, norm, operations)), lambda: is_plain(module))
    return None


def _rounding(module: nn.Module, rows: Tensor, attribute: str, form: int, operations: Operations) -> int:
    """Of the two forms that are one in float32, the one that rounds where the module does."""
    if form == len(NORM_FORMS) - 1 or rows.dtype == torch.float32:
        return form
    random = torch.linspace(0.3, 1.7, rows.shape[-1]).to(rows.dtype)
    theirs = tried(emptied(module, {"weight": nn.Parameter(random, requires_grad=False)}, {}), rows)
    wrong = [int((operations.norm(rows, random, vars(module)[attribute], kind) != theirs).sum()) for kind in (0, 1)]
    return int(wrong[1] < wrong[0])


def _norm_of(module: nn.Module, found: Norm, operations: Operations) -> Compute:
    attributes, norm, attribute, form = vars(module), operations.norm, found.epsilon, found.form
    parameters = module._parameters

    def compute(x: Tensor, **unknown: object) -> Tensor | None:
        weight, epsilon = parameters.get("weight"), attributes.get(attribute)
        if unknown or weight is None or type(epsilon) is not float or x.dtype is not weight.dtype or x.dtype not in DTYPES:
            return None
        if x.device.type != "cpu" or x.shape[-1] != weight.shape[0] or not weight.is_contiguous() or x.numel() == 0:
            return None
        return norm(x, weight, epsilon, form)

    return compute


def _as_gated_mlp(name: str, module: nn.Module, operations: Operations) -> Fused | None:
    linears = {key: child for key, child in module._modules.items() if isinstance(child, nn.Linear)}
    others = {key: child for key, child in module._modules.items() if key not in linears}
    if len(linears) != 3 or any(child is None or next(child.parameters(), None) is not None for child in others.values()):
        return None
    ((key, activation),) = others.items()
    if activation is None or not is_plain(activation):
        return None
    modules, function = module._modules, activation

    def still() -> bool:
        return is_plain(module) and modules.get(key) is function and is_plain(function)

    generator = torch.Generator().manual_seed(_SEED)
    rows = torch.randn((1, 3, _WIDTH), generator=generator) * 2
    for gate, up, down in permutations(linears):
        sizes = {linears[child].in_features for child in (gate, up)}, {linears[child].out_features for child in (gate, up)}
        if sizes != ({linears[down].out_features}, {linears[down].in_features}):
            continue
        small = {child: _small_linear(linears[child], child == down, generator) for child in linears}
        theirs = tried(emptied(module, {}, {**small, key: activation}), rows)
        for form in range(len(GATE_FORMS)):
            ours = small[down](operations.gate(small[gate](rows), small[up](rows), form))
            if agree(ours, theirs):
                mlp = GatedMlp(gate, up, down, key, form)
                return Fused(name, module, mlp, [], stand_in_for(module, _gated_of(module, mlp, function, operations)), still)
    return None


def _small_linear(linear: nn.Linear, is_down: bool, generator: torch.Generator) -> nn.Linear:
    sizes = (_INNER, _WIDTH) if is_down else (_WIDTH, _INNER)
    small: nn.Linear = nn.utils.skip_init(nn.Linear, *sizes, bias=linear.bias is not None)  # type: ignore[no-untyped-call]
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return small


def _gated_of(module: nn.Module, found: GatedMlp, activation: nn.Module, operations: Operations) -> Compute:
    modules, fused = module._modules, operations.gate
    gate_name, up_name, down_name, form = found.gate, found.up, found.down, found.form

    def compute(x: Tensor, **unknown: object) -> Tensor | None:
        # The linears are called as they stand there now: packed, with an adapter, with hooks.
        gate, up, down = modules[gate_name], modules[up_name], modules[down_name]
        if unknown or gate is None or up is None or down is None:
            return None
        left, right = gate(x), up(x)
        known = left.dtype is right.dtype and left.dtype in DTYPES and left.shape == right.shape and left.device.type == "cpu"
        if known and evenly_spaced(left) and evenly_spaced(right):
            result: Tensor = down(fused(left, right, form))
        else:
            result = down(activation(left) * right)
        return result

    return compute
