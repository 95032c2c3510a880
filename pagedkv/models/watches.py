"""What must still be what it was: modules in their places, and tensors. Any number of them are looked at in one go.

A look happens at every step, mostly at memory that the weights drove out of the cache, so it is a loop of the interpreter's own over flat
lists: it touches little beside what it compares. Owns what counts as a change. It does not own what follows from one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, contains, is_, is_not, itemgetter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

_SAMPLED_NUMBERS = 16  # of each tensor

_Parameters = Mapping[str, Tensor | None]  # of one module, its own dict: attribute access through the module costs more

_get: Any = dict.get
_version = attrgetter("_version")
_in_use = itemgetter("training", "_forward_hooks", "_forward_pre_hooks")


class _FlatWatch:
    """Several lists, one in each slot, so that many watches can be one."""

    __slots__: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of_all(cls, watches: Iterable[Self]) -> Self:
        """What all of some watch, as one."""
        watch = cls.__new__(cls)
        for name in cls.__slots__:
            setattr(watch, name, [])
        for other in watches:
            for name in cls.__slots__:
                getattr(watch, name).extend(getattr(other, name))
        return watch


class ModuleWatch(_FlatWatch):
    """Modules in evaluation mode, without hooks, computing what their class says; and their children.

    Args:
        modules: that are watched themselves.
        owners: whose children are to stay the same objects.
    """

    __slots__ = ("_attributes", "_children", "_classes", "_modules", "_names", "_owners")

    def __init__(self, modules: Sequence[nn.Module], owners: Sequence[nn.Module]) -> None:
        children = [(owner._modules, name, child) for owner in owners for name, child in owner._modules.items()]
        self._owners, self._names, self._children = ([each[place] for each in children] for place in range(3))
        self._modules, self._classes, self._attributes = list(modules), list(map(type, modules)), list(map(vars, modules))

    def still(self) -> bool:
        """Whether all is as it was. Cost: 0.2 microseconds a module while it is in the processor's cache."""
        attributes = self._attributes
        return (
            all(map(is_, map(_get, self._owners, self._names), self._children))
            and all(map(is_, map(type, self._modules), self._classes))
            and not any(map(any, map(_in_use, attributes)))
            and not any(map(contains, attributes, repeat("forward")))
            and not any(map(_get, attributes, repeat("_compiled_call_impl")))
        )


class TensorWatch(_FlatWatch):
    """Parameters as they are now, and others that are None.

    Seen are another object or storage in a parameter's place, and every change that torch counts (``_version``). A change in place through
    ``.data`` is not counted, and merging an adapter is one, so some of the numbers are compared as well.

    Args:
        places: of parameters for each of which there is no reason in ``why_not_watched``, or of none.
    """

    __slots__ = ("_addresses", "_before", "_empty_names", "_empty_owners", "_names", "_owners", "_samples", "_tensors", "_versions")

    def __init__(self, places: Sequence[tuple[_Parameters, str]]) -> None:
        there = [(owner, name, tensor) for owner, name in places if (tensor := owner.get(name)) is not None]
        empty = [(owner, name) for owner, name in places if owner.get(name) is None]
        self._owners, self._names = [each[0] for each in there], [each[1] for each in there]
        self._tensors: list[Tensor] = [each[2] for each in there]
        self._empty_owners, self._empty_names = [each[0] for each in empty], [each[1] for each in empty]
        self._versions, self._addresses = list(map(_version, self._tensors)), list(map(Tensor.data_ptr, self._tensors))
        self._samples = [_sample(tensor.detach()) for tensor in self._tensors]
        self._before = [sample.tobytes() for sample in self._samples]

    def counted(self) -> bool:
        """Whether nothing that torch counts happened: the same objects, at the same versions."""
        return (
            not any(map(is_not, map(_get, self._empty_owners, self._empty_names), repeat(None)))
            and all(map(is_, map(_get, self._owners, self._names), self._tensors))
            and list(map(_version, self._tensors)) == self._versions
        )

    def still(self) -> bool:
        """Whether nothing happened that is seen. Cost: 0.2 microseconds a tensor while it is in the processor's cache."""
        return (
            self.counted()
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(memoryview.tobytes, self._samples)) == self._before
        )


class ValueWatch:
    """Attributes and what they hold now, of a kind that can be compared.

    Args:
        places: whose, their own dicts, and names.
    """

    __slots__ = ("_names", "_owners", "_values")

    def __init__(self, places: Sequence[tuple[Mapping[str, object], str]]) -> None:
        self._owners, self._names = [owner for owner, _ in places], [name for _, name in places]
        self._values = list(map(_get, self._owners, self._names))

    def still(self) -> bool:
        """Whether they hold the same."""
        return list(map(_get, self._owners, self._names)) == self._values


class CodeWatch:
    """A module's own part of what it computes: its class's forward and the globals that this names, its attributes, its configuration.

    Args:
        module: with a ``config``, as all of transformers' models have.
    """

    __slots__ = ("_attributes", "_config", "_forward", "_globals", "_module", "_names", "_settings", "_used", "_values")

    def __init__(self, module: nn.Module) -> None:
        self._module, self._attributes, self._forward = module, vars(module), type(module).forward
        function: Any = inspect.unwrap(self._forward)
        self._globals: dict[str, object] = function.__globals__
        self._names = [name for name in function.__code__.co_names if name in self._globals]
        self._used, self._values = [self._globals[name] for name in self._names], list(self._attributes.values())
        self._config: dict[str, object] = vars(module.config)
        self._settings = {name: _copied(value) for name, value in self._config.items()}

    def still(self) -> bool:
        """Whether all of it is as it was. Cost: some microseconds."""
        values = self._attributes.values()
        try:
            return (
                type(self._module).forward is self._forward
                and all(map(is_, map(self._globals.get, self._names), self._used))
                and len(values) == len(self._values)
                and all(map(is_, values, self._values))
                and self._config == self._settings
            )
        except Exception:  # settings that cannot be compared are others
            return False


def _copied(value: object) -> object:
    """A setting, such that it is seen when what it holds changes, where that can be had."""
    try:
        return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value
    except Exception:  # it holds what cannot be copied
        return value


def why_not_watched(tensor: Tensor) -> str | None:
    """The reason why changes of a weight could not be seen, or its numbers not packed; None when they can."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return f"its weights are {tensor.layout} on {tensor.device}"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weights are {tensor.dtype}"
    if tensor.is_inference():
        return "its weights were made in inference mode, where torch counts no changes"
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return "its weights are not contiguous"
    return None


def _sample(tensor: Tensor) -> memoryview:
    """The bytes of a few numbers in the midst of a contiguous tensor, in its own memory: a look costs 0.1 us, a torch operator 2 us."""
    start = max(tensor.numel() // 2 - _SAMPLED_NUMBERS, 0)
    numbers = tensor.view(-1)[start : start + _SAMPLED_NUMBERS]
    return memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
