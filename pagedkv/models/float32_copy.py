"""A copy in float32 of the first layers of a model in half precision, on which a self-check can judge by numbers.

In half precision a wrong way of running a model can hide behind roundings. Which way is right is a matter of the model's code and config,
not of how many layers follow each other, so a few of each kind show it. Owns the copy, and the reason where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from pagedkv.models.call import ModelCall
from pagedkv.models.compiled import is_compiled
from pagedkv.models.memory import free_memory
from pagedkv.models.pair_call import PairCall

# Of the free memory: the copy is freed when the model is loaded, but must not push out what others hold.
_MAX_SHARE_OF_FREE_MEMORY = 0.25
_LEAST_LAYERS = 2
_NUM_TOKENS = 3


class Float32Copy:
    """The first layers of a model in float32, as many as show each kind of layer, under its embedding and head.

    Args:
        model: a model in half precision; it is read, not changed.

    Attributes:
        model: the copy; None where there is none.
        num_layers: decoder layers in it.
        reason: why there is no copy; None where there is.

    Cost: memory for the copy, at most a quarter of what is free, and a forward of 3 tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PreTrainedModel | None = None
        self.num_layers = 0
        self.reason: str | None = None
        if is_compiled(model):
            self.reason = "the model is compiled"
            return
        path, stack = _stack(model)
        self.num_layers = _num_needed(stack)
        left_out = list(stack)[self.num_layers :]
        needed, free = _nbytes(model, left_out), free_memory(model.device)
        if needed > free * _MAX_SHARE_OF_FREE_MEMORY:
            self.reason = f"{self.num_layers} layers take {needed:,} bytes, more than a quarter of the {free:,} that are free"
            return
        try:
            self.model = _copied(model, path, left_out, self.num_layers)
            _try(self.model)
        except Exception as error:  # whatever a model raises when it is copied, cast, or run without its last layers
            self.model = None
            self.reason = f"it cannot be run: {type(error).__name__}: {error}"


def _try(model: PreTrainedModel) -> None:
    """A short forward."""
    tokens = torch.zeros(_NUM_TOKENS, dtype=torch.int64, device=model.device)
    if model.config.is_encoder_decoder:
        PairCall(model).plain(tokens, tokens)
    else:
        ModelCall(model).plain(tokens)


def _stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its dotted name; an empty one where it is not plain which that is."""
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    return found[0] if len(found) == 1 else ("", nn.ModuleList())


def _num_needed(stack: nn.ModuleList) -> int:
    """How many layers from the first on hold one of each kind."""
    seen: set[tuple[object, ...]] = set()
    needed = min(_LEAST_LAYERS, len(stack))
    for number, layer in enumerate(stack):
        kind = tuple(_signature(layer))
        if kind not in seen:
            seen.add(kind)
            needed = max(needed, number + 1)
    return needed


def _signature(layer: nn.Module) -> Iterator[object]:
    """What makes a layer of its kind: classes, shapes, and settings that are flags, words or whole numbers, but for its own number."""
    for name, module in layer.named_modules():
        yield name, type(module)
        for key, value in sorted(vars(module).items()):
            if isinstance(value, bool | int | str) and "layer" not in key and "idx" not in key and not key.startswith("_"):
                yield key, value
    for name, parameter in layer.named_parameters():
        yield name, tuple(parameter.shape)


def _nbytes(model: nn.Module, left_out: list[nn.Module]) -> int:
    """Bytes of the copy while it is made: in the model's own precision, and in float32."""
    without = {id(parameter) for layer in left_out for parameter in layer.parameters()}
    kept = [parameter for parameter in model.parameters() if id(parameter) not in without]
    return sum(parameter.numel() * (parameter.element_size() + torch.float32.itemsize) for parameter in kept)


def _copied(model: PreTrainedModel, path: str, left_out: list[nn.Module], num_layers: int) -> PreTrainedModel:
    placeholders: dict[int, object] = {id(layer): nn.Identity() for layer in left_out}  # as if they had been copied already
    twin = copy.deepcopy(model, placeholders)
    if left_out:
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, nn.ModuleList(list(twin.get_submodule(path).children())[:num_layers]))
    torch.nn.Module.float(twin)
    return twin
