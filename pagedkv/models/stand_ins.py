"""What takes a module's place in its model for the length of a step, and gives it back.

Owns how a stand-in looks to others (as the module itself), and its coming and going. What it computes is said by whoever makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pagedkv.models.context import active_step

_NOTHING = object()  # in place of an attribute that is not there
_NOT_PLAIN = ("_forward_hooks", "_forward_pre_hooks", "_buffers")

Compute = Callable[..., Tensor | None]
Place = tuple[dict[str, nn.Module | None], str]  # the modules of a parent, and a name among them


class StandsIn(Protocol):
    """What ``in_place`` needs of a module that is fused."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def places(self) -> list[Place]:
        """Where it stands."""

    @property
    def stand_in(self) -> nn.Module:
        """What takes the places."""


@contextmanager
def in_place(entries: Sequence[StandsIn]) -> Iterator[None]:
    """Put the stand-ins where their modules are for a ``with`` block, and the modules back whatever happens.

    A module that was replaced stays. Steps of one model must not overlap.
    """
    swapped = []
    try:
        for entry in entries:
            for modules, name in entry.places:
                if modules.get(name) is entry.module:
                    modules[name] = entry.stand_in
                    swapped.append((modules, name, entry))
        yield
    finally:
        for modules, name, entry in swapped:
            if modules.get(name) is entry.stand_in:
                modules[name] = entry.module


def is_plain(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor buffers, and computes what its class says."""
    attributes = vars(module)
    if "forward" in attributes or attributes.get("_compiled_call_impl") is not None:
        return False
    return not any(attributes[name] for name in _NOT_PLAIN)


def stand_in_for(module: nn.Module, compute: Compute) -> nn.Module:
    """An object of a class derived from the module's own, with the module's own ``__dict__``: to others it is the module.

    Without a step in this thread, where a gradient is recorded, or where ``compute`` gives None, it computes what the module does.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and active_step() is not None and not torch.is_grad_enabled():
            result = compute(args[0], **kwargs)
            if result is not None:
                return result
        return module.forward(*args, **kwargs)

    return derived(module, {"forward": forward})


def derived(module: nn.Module, methods: dict[str, Callable[..., Any]]) -> nn.Module:
    """An object of a class derived from the module's own that has other methods, with the module's own ``__dict__``."""
    cls = type(module)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # A copy or a pickle made during a step (by another thread) is one of the module.
        return itself, (module,)

    stand_in: nn.Module = object.__new__(type(cls.__name__, (cls,), {**methods, "__reduce_ex__": reduce, "__module__": cls.__module__}))
    object.__setattr__(stand_in, "__dict__", vars(module))
    return stand_in


def itself(module: nn.Module) -> nn.Module:
    """The module: what a pickle or copy of a stand-in is made by."""
    return module


def has_global_hooks() -> bool:
    """Whether hooks on all modules of the process are set: they are told which module they serve, and may know only the model's own."""
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


@contextmanager
def forwards_changed(modules: Iterable[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """For a ``with`` block, modules with what ``change`` makes of their ``forward``; then as they were, one of their own included."""
    held: list[tuple[nn.Module, object]] = []
    try:
        for module in modules:
            held.append((module, vars(module).get("forward", _NOTHING)))
            vars(module)["forward"] = change(module.forward)
        yield
    finally:
        for module, former in held:
            if former is _NOTHING:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = former
