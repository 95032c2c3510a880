"""Which linear layers of a model could be packed, where they stand, and which of them read the same input.

Owns the rules and the recording of one forward. It knows no model by name: who shares an input is seen, not spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from pagedkv.models.context import active_step
from pagedkv.models.watches import why_not_watched


@dataclass(frozen=True, slots=True, eq=False)
class FoundLinear:
    """A linear layer that could be packed.

    Attributes:
        name: its dotted name.
        linear: the layer.
        places: the modules of a parent, and its name among them; more than one where parents share it.
    """

    name: str
    linear: nn.Linear
    places: list[tuple[dict[str, nn.Module | None], str]]


@dataclass(slots=True, eq=False)
class LinearCensus:
    """The linear layers of a model, looked at once.

    Attributes:
        found: what could be packed, in the order of the modules.
        plain: the names of the others, each with the reason.
        calls: what ``recording`` saw: the layer, its input and the version of it, in the order of the calls.
    """

    found: list[FoundLinear] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[FoundLinear, Tensor, int | None]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls that steps of this thread make within a ``with`` block."""
        handles = [found.linear.register_forward_pre_hook(self._recorder(found)) for found in self.found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def groups(self) -> list[list[FoundLinear]]:
        """The layers that were called, in the order of their calls, those together that can be one product.

        Together are layers of one parent and dtype that were called once, with the very same tensor.
        """
        times: dict[int, int] = {}
        for found, _, _ in self.calls:
            times[id(found)] = times.get(id(found), 0) + 1
        groups: dict[tuple[object, ...], list[FoundLinear]] = {}
        for found, x, version in self.calls:
            alone = times[id(found)] > 1 or version is None
            # The record keeps every input alive, so that an id means one tensor.
            key = (id(found),) if alone else (id(x), version, id(found.places[0][0]), found.linear.weight.dtype)
            members = groups.setdefault(key, [])
            if found not in members:
                members.append(found)
        return list(groups.values())

    def _recorder(self, found: FoundLinear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if active_step() is not None and inputs:
                self.calls.append((found, inputs[0], None if inputs[0].is_inference() else inputs[0]._version))

        return record


def take_census(model: nn.Module) -> LinearCensus:
    """Look at every linear layer of a model; nothing is run and nothing changed."""
    census = LinearCensus()
    seen: dict[int, FoundLinear | None] = {}
    for parent_name, parent in model.named_modules():
        for name, module in parent._modules.items():
            if not isinstance(module, nn.Linear):
                continue
            if id(module) not in seen:
                dotted = f"{parent_name}.{name}".removeprefix(".")
                reason = _why_plain(module)
                seen[id(module)] = FoundLinear(dotted, module, []) if reason is None else None
                if reason is not None:
                    census.plain[dotted] = reason
            found = seen[id(module)]
            if found is not None:
                found.places.append((parent._modules, name))
    census.found = [found for found in seen.values() if found is not None]
    return census


def _why_plain(linear: nn.Linear) -> str | None:
    # A subclass computes something else: quantised, parametrised (torch makes a class for it), an adapter's.
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, not a plain Linear"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has hooks"
    if "forward" in vars(linear) or linear._compiled_call_impl is not None:
        return "its forward was replaced or compiled"
    for name, parameter in linear._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        reason = why_not_watched(parameter) if parameter is not None else None
        if reason is not None:
            return reason
    return None if set(linear._parameters) == {"weight", "bias"} and linear.weight is not None else "its weight is not a parameter"
