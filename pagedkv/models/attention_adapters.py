"""Adapters for attention modules that never ask transformers' attention interface: found in a model, and put in place for each step.

Owns which modules have one, the reason where one does not fit, and their coming and going. What adapters compute is said in
``adapted_attention.py``, and whether a model is right with them is found by the self-check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models import stand_ins
from pagedkv.models.adapted_attention import ADAPTERS, Adapted, Shared
from pagedkv.models.compiled import is_compiled
from pagedkv.models.context import active_step
from pagedkv.models.stand_ins import Place


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One adapted module, its place, and what takes it during a step."""

    module: nn.Module
    places: list[Place]
    stand_in: nn.Module


class AttentionAdapters:
    """The adapters of one model; none where its code has the attention interface, or none is known for its modules.

    Args:
        model: the model; looked at, not changed.

    Raises:
        UnsupportedModelError: there is an adapter for a class of its modules, but not for these; says why.

    Attributes:
        classes: names of the classes that the adapters in use are written for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._entries: list[_Entry] = []
        self.classes: tuple[str, ...] = ()
        if type(model)._can_set_attn_implementation() or is_compiled(model):
            return
        shared: Shared = {}
        names: dict[str, None] = {}
        for path, module in model.named_modules():
            cls = _known_class(module)
            if cls is None:
                continue
            try:
                _check(model, path, module, cls)
                adapted = ADAPTERS[_qualified(cls)](module, shared)
            except Exception as error:  # in another release a module may have no such attribute
                reason = str(error) if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {error}"
                raise UnsupportedModelError(f"the adapter for {cls.__name__} does not fit {path}: {reason}") from error
            parent, _, name = path.rpartition(".")
            places: list[Place] = [(model.get_submodule(parent)._modules, name)]
            self._entries.append(_Entry(module, places, _stand_in(module, adapted)))
            names.setdefault(cls.__name__)
        self.classes = tuple(names)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put them in their places for a ``with`` block, and the model's own modules back whatever happens."""
        with stand_ins.in_place(self._entries):
            yield


def _known_class(module: nn.Module) -> type[nn.Module] | None:
    """The class among a module's own and those that it derives from which an adapter is written for."""
    return next((cls for cls in type(module).__mro__ if _qualified(cls) in ADAPTERS), None)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check(model: nn.Module, path: str, module: nn.Module, cls: type[nn.Module]) -> None:
    """Refuse a module that has code of its own, and one within others than those that its class is made for.

    A self-check is short: what only shows in long sequences must not come from code that the adapter was not written for.
    """
    for name, method in vars(cls).items():
        if callable(method) and name != "__init__" and (getattr(type(module), name) is not method or name in vars(module)):
            raise UnsupportedModelError(f"{type(module).__name__} has a {name} of its own")
    parts = path.split(".")
    for length in range(1, len(parts)):
        around = type(model.get_submodule(".".join(parts[:length])))
        if around.__module__ not in (cls.__module__, nn.ModuleList.__module__):
            raise UnsupportedModelError(f"it is part of a {around.__name__}, which is not of the same modeling file")


def _stand_in(module: nn.Module, adapted: Adapted) -> nn.Module:
    own, compute = getattr(module, adapted.method), adapted.compute

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step = active_step()
        return own(*args, **kwargs) if step is None else compute(step, *args, **kwargs)

    return stand_ins.derived(module, {adapted.method: method})
