"""Two proofs of what a decoder layer is.

An attention module is run on random rows with a cache and an attention of ours, which see what it stores, what it asks and what it makes of
the answer. A layer is copied with stubs for children, and what it passes to each and adds up is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pagedkv.attention.native.operations import DTYPES, Operations
from pagedkv.models.bridge import pointed_at_us
from pagedkv.models.call import cache_argument
from pagedkv.models.context import AttentionCall, MaskFunction, activate
from pagedkv.models.facade import CacheFacade
from pagedkv.models.probe import checked_layer
from pagedkv.models.trials import agree, emptied

_SEED = 20260105
_ROWS = 3
_POSITIONS = ((0, 1, 2), (40_000, 2**20 + 1, 2**24))  # what is given these beside angles may change its rows from some position on


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


def order_of_norms(layer: nn.Module, norms: list[str], attention: str, mlp: str) -> tuple[str, str] | None:
    """The norm before attention and the one before the MLP, if the layer is two residual branches of norm and module."""
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn((1, _ROWS, 8), generator=generator)
    stubs = {norms[0]: _Stub(1.1), norms[1]: _Stub(0.7), attention: _Stub(1.7, in_tuple=True), mlp: _Stub(0.4)}
    passed = {"attention_mask": torch.zeros(1), "position_embeddings": (x, x), cache_argument(layer): object()}
    try:
        theirs, far = (
            emptied(layer, {}, dict(stubs))(x, position_ids=torch.tensor([positions]), use_cache=True, **passed) for positions in _POSITIONS
        )
    except Exception:  # whatever a module raises, it is not one of ours
        return None
    if any(stubs[attention].seen.get(key) is not value for key, value in passed.items()):
        return None
    for first, second in permutations(norms):
        middle = x + stubs[attention](stubs[first](x))[0]
        ours = middle + stubs[mlp](stubs[second](middle))
        if agree(ours, theirs) and agree(ours, far):
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


def as_attention(module: nn.Module, configs: tuple[PreTrainedConfig, ...], width: int, operations: Operations) -> Attention | None:
    """What an attention module of heads this wide is, if it is that, at whatever positions; the module is run on three rows."""
    found = [_as_attention(module, configs, width, operations, positions) for positions in _POSITIONS]
    return found[0] if all(each == found[0] for each in found) else None


def _as_attention(
    module: nn.Module, configs: tuple[PreTrainedConfig, ...], width: int, operations: Operations, positions: tuple[int, ...]
) -> Attention | None:
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
                position_ids=torch.tensor([positions]),
                **{cache_argument(module): CacheFacade(trial)},
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
