"""The proof that a model's body is an embedding, decoder layers one after the other, and a norm, with nothing in between.

The body is copied with stubs for children and called as it is called in a step. What each stub was given has to be the very objects that
others returned, unchanged: numbers could agree by chance, objects cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pagedkv.attention import Mask
from pagedkv.models.bridge import pointed_at_us
from pagedkv.models.call import CACHE_ARGUMENTS, cache_argument, logits_of, model_cache_argument
from pagedkv.models.context import AttentionCall, MaskFunction, activate
from pagedkv.models.facade import CacheFacade
from pagedkv.models.masks import MaskCarriers
from pagedkv.models.stand_ins import derived
from pagedkv.models.trials import emptied

_WIDTH = 8
_IDS, _POSITIONS = ((1, 0, 2),), ((7, 2, 9),)  # of several sequences, as in a step


@dataclass(frozen=True, slots=True)
class Body:
    """What a body was found to be.

    Attributes:
        embedding: name of the child that is given the token ids.
        rotary: of the one that makes cosines and sines, of the embeddings' kind and of positions.
        takes_positions_as: the name by which it is given these; None where by place.
        norm: of the one that is given what the last layer makes.
        mask: what all layers attend with.
        output: class of the result.
        states: its field that holds what the norm makes.
        cache: its field that holds the cache; None where there is none.
    """

    embedding: str
    rotary: str
    takes_positions_as: str | None
    norm: str
    mask: Mask
    output: type
    states: str
    cache: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _Called:
    name: str
    args: tuple[object, ...]
    kwargs: dict[str, object]
    result: Any

    def was_given(self, *args: object, **kwargs: object) -> bool:
        """Whether these very objects."""
        if len(self.args) != len(args) or self.kwargs.keys() != kwargs.keys():
            return False
        pairs = [*zip(self.args, args, strict=True), *((self.kwargs[name], value) for name, value in kwargs.items())]
        return all(one is other for one, other in pairs)


class _Trial:
    """A step in which nothing is stored and nobody attends."""

    def __init__(self) -> None:
        self.carriers = MaskCarriers()
        self.calls: list[_Called] = []
        self.ids, self.positions = torch.tensor(_IDS), torch.tensor(_POSITIONS)

    def mask(self, mask_function: MaskFunction, num_queries: int, device: torch.device) -> Tensor:
        return self.carriers.carrier(mask_function, num_queries, device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> NoReturn:
        raise NotImplementedError

    def attend(self, call: AttentionCall) -> NoReturn:
        raise NotImplementedError

    def stub(self, name: str, module: nn.Module, *, gives_angles: bool = False) -> nn.Module:
        """What looks like a child, and only remembers what it was called with."""

        def forward(_: nn.Module, *args: object, **kwargs: object) -> Any:
            rows, others = torch.ones(1, len(_IDS[0]), _WIDTH), torch.zeros(1, len(_IDS[0]), _WIDTH)
            self.calls.append(_Called(name, args, kwargs, (rows, others) if gives_angles else rows))
            return self.calls[-1].result

        return derived(module, {"forward": forward})

    def is_changed(self) -> bool:
        """Whether anything was written to what stubs were given or gave."""
        results = [result if isinstance(result, tuple) else (result,) for result in (call.result for call in self.calls)]
        return any(tensor._version for tensors in (*results, (self.ids, self.positions)) for tensor in tensors)


def as_body(module: nn.Module, layers: str, configs: tuple[PreTrainedConfig, ...]) -> Body | None:
    """What a module is whose child ``layers`` is a list of decoder layers, if it is that. Its copy is called; no child of its own is."""
    if module._parameters or type(module._modules[layers]) is not nn.ModuleList:
        return None
    with torch.no_grad(), pointed_at_us(configs):
        found = [_as_body(module, layers, rotary) for rotary in module._modules if rotary != layers]
    return next((body for body in found if body is not None), None)


def _as_body(module: nn.Module, layers: str, rotary: str) -> Body | None:
    """The same, if ``rotary`` is the child that makes angles."""
    trial, listed = _Trial(), module._modules[layers]
    if listed is None:
        return None
    children = {name: child for name, child in module._modules.items() if child is not None and name != layers}
    stubs: dict[str, nn.Module | None] = {name: trial.stub(name, child, gives_angles=name == rotary) for name, child in children.items()}
    stubs[layers] = emptied(listed, {}, {name: trial.stub(name, layer) for name, layer in listed._modules.items() if layer is not None})
    cache = CacheFacade(trial)
    given = {cache_argument(module): cache, "attention_mask": None, "inputs_embeds": None, "use_cache": True}
    try:
        with activate(trial):
            output = emptied(module, {}, stubs)(input_ids=trial.ids, position_ids=trial.positions, **given)
        return _recognised(trial, list(listed._modules), output, cache)
    except Exception:  # whatever a module raises, it is not one of ours
        return None


def _recognised(trial: _Trial, layers: Sequence[str], output: Any, cache: CacheFacade) -> Body | None:
    if not layers or [call.name for call in trial.calls[2:-1]] != layers or trial.is_changed():
        return None
    embedding, rotary, *called, norm = trial.calls
    passed, fields = called[0].kwargs, {name: value for name, value in output.items() if value is not None}
    states = [name for name, value in fields.items() if value is norm.result]
    caches = [name for name, value in fields.items() if value is cache]
    keyword = next(iter(rotary.kwargs), None)
    angles = (trial.positions,) if keyword is None else ()
    as_expected = (
        embedding.was_given(trial.ids)
        and rotary.was_given(embedding.result, *angles, **({} if keyword is None else {keyword: trial.positions}))
        and all(layer.was_given(former.result, **passed) for former, layer in pairwise((embedding, *called)))
        and passed["position_embeddings"] is rotary.result
        and [passed[name] for name in CACHE_ARGUMENTS if name in passed] == [cache]
        and norm.was_given(called[-1].result)
        and len(states) == 1
        and len(caches) == len(fields) - 1 <= 1
    )
    if not as_expected:
        return None
    mask = passed["attention_mask"]
    return Body(
        embedding=embedding.name,
        rotary=rotary.name,
        takes_positions_as=keyword,
        norm=norm.name,
        mask=Mask.causal() if not isinstance(mask, Tensor) else trial.carriers.mask_of(mask),
        output=type(output),
        states=states[0],
        cache=next(iter(caches), None),
    )


def reads_wanted_alone(model: nn.Module, name: str, body: Body, configs: tuple[PreTrainedConfig, ...]) -> bool:
    """Whether a model makes the logits that it is asked for of these tokens' hidden states alone.

    Shown by what becomes of the same states where all others are NaN. Nothing of the model but its head is called.

    Args:
        model: that takes ``logits_to_keep``.
        name: of its child that was found to be ``body``.
        body: as what it was found.
        configs: as for ``as_body``.
    """
    module, trial, wanted = model._modules[name], _Trial(), torch.tensor([0, 2])
    try:
        weight: Any = module._modules[body.embedding].weight  # type: ignore[union-attr]
        states = torch.linspace(-1, 1, wanted[-1] * weight.shape[1] + weight.shape[1]).view(1, -1, weight.shape[1]).to(weight.dtype)
        poisoned = torch.full_like(states, torch.nan)
        poisoned[:, wanted] = states[:, wanted]
        logits = []
        for given in (states, poisoned):
            stub = derived(module, {"forward": lambda _, given=given, **kwargs: body.output(**{body.states: given})})  # type: ignore[arg-type]
            probe = emptied(model, model._parameters, {**model._modules, name: stub})
            with torch.no_grad(), pointed_at_us(configs), activate(trial):
                arguments = {model_cache_argument(model): CacheFacade(trial), "use_cache": True, "logits_to_keep": wanted}  # type: ignore[arg-type]
                logits.append(logits_of(probe(input_ids=trial.ids, position_ids=trial.positions, **arguments)))
        return torch.equal(*logits) and bool(logits[0].isfinite().all()) and logits[0].shape[1] == len(wanted)
    except Exception:  # whatever a module raises, it is not one of ours
        return False
