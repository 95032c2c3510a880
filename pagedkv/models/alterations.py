"""Sees that a model was altered between two looks, so that K/V which it computed before are not served any more.

Owns the look: modules, hooks, switches of adapters, parameters. What it cannot see is said at ``Alterations``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SIMPLE = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, list, tuple, set})
_FEW = 16  # members of a container that is compared, numbers of a parameter
_NOT_SETTINGS = frozenset(vars(nn.Module()))  # what every module has: hooks, children and parameters are looked at by themselves

_ModuleLook = tuple[str, "weakref.ref[nn.Module]", tuple[object, ...], tuple[tuple[str, object], ...]]


class _TensorLook:
    """A tensor as it is: which object, how often torch counted a change, and a few of its numbers."""

    __slots__ = ("_address", "_sample", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)  # an id alone could be given again
        self._version = -1 if tensor.is_inference() else tensor._version
        self._address = tensor.data_ptr() if tensor.layout is torch.strided else 0
        self._sample = _sample(tensor)

    def same(self, other: _TensorLook) -> bool:
        mine, theirs = self._tensor(), other._tensor()
        seen = (self._version, self._address, self._sample) == (other._version, other._address, other._sample)
        return seen and mine is not None and mine is theirs


class Alterations:
    """Tells whether a model is still what it was at the look before.

    Seen are modules that came, went or were replaced; hooks; simple attributes of modules, which is how adapters are switched, scaled
    and merged; parameters and saved buffers replaced or changed in any way that torch counts; of those changed through ``.data`` on the
    CPU, which it does not count, what touches a few numbers in their midst. Not seen is what a hook or a module reads from elsewhere.

    Args:
        model: the model, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules, self._tensors = _look(model)

    def seen(self) -> bool:
        """Whether the model was altered since the last call, or since this was made. Cost: some microseconds per module and parameter."""
        modules, tensors = self._modules, self._tensors
        self._modules, self._tensors = _look(self._model)
        if modules != self._modules or tensors.keys() != self._tensors.keys():
            return True
        return not all(look.same(self._tensors[name]) for name, look in tensors.items())


def _look(model: nn.Module) -> tuple[list[_ModuleLook], dict[str, _TensorLook]]:
    modules: list[_ModuleLook] = []
    tensors: dict[str, _TensorLook] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            hooks = (*module._forward_hooks, *module._forward_pre_hooks, id(vars(module).get("forward")))
            modules.append((name, weakref.ref(module), hooks, tuple(_settings(module))))
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    tensors[f"{name}.{key}"] = _TensorLook(tensor)
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    tensors[f"{name}.{key}"] = _TensorLook(buffer)
    return modules, tensors


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    for key, value in vars(module).items():
        if key in _NOT_SETTINGS:
            continue
        kind = type(value)
        if kind in _SIMPLE:
            yield key, value
        elif kind in _CONTAINERS and 0 < len(value) <= _FEW:
            members: list[Any] = [*value, *value.values()] if kind is dict else list(value)
            if all(type(member) in _SIMPLE for member in members):
                yield key, repr(value)


def _sample(tensor: Tensor) -> bytes:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.is_contiguous():
        return b""
    start = max(tensor.numel() // 2 - _FEW, 0)
    return tensor.view(-1)[start : start + _FEW].view(torch.uint8).numpy().tobytes()
