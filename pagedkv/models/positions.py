"""How many positions of a model can be served, and why not more.

Owns two trials. Rotary embeddings that pick their frequencies from the largest position of a forward (transformers' ``longrope`` and
``dynamic``) would let a request's tokens depend on its neighbours: they are run alone, and sequences end where they switch, so that every
one has the frequencies that it has alone. Prompts that are longer from the start are served, too, where all longer forwards are alike.
Tables of learned positions are watched while the model runs: they may be shorter than stated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.context import active_step
from pagedkv.models.limits import max_positions
from pagedkv.models.stand_ins import forwards_changed

_BATCH_DEPENDENT = ("dynamic", "longrope")
_WITHOUT_LIMIT = 2**20  # positions that are tried where the config states no number
_NOTHING = object()  # in place of an attribute that is not there

_State = dict[tuple[bool, str], Any]  # by whether it is a buffer, and its name


@dataclass(frozen=True, slots=True)
class PositionReach:
    """How long sequences of a model may be.

    Attributes:
        stated: what the config says, or None.
        reach: what is served, or None for no limit.
        reason: why ``reach`` is less than stated; None where it is not.
        far_reach: what is served to prompts longer than ``reach``, which have other frequencies from the first token on; None where no
            such prompt is.
    """

    stated: int | None
    reach: int | None
    reason: str | None
    far_reach: int | None = None


class RotaryEmbeddings:
    """The rotary embeddings of a model that can change their frequencies from one forward to the next.

    Args:
        model: the model. Its rotary embeddings are called, and are afterwards what they were.

    Raises:
        UnsupportedModelError: the config names a rope type that depends on the batch, and there is no module to try.

    Attributes:
        positions: how many positions are served.

    Cost: a few calls of each rotary embedding on three positions; some 60 where it switches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        stated = max_positions(model.config)
        tried = [rotary for module in model.modules() for rotary in _rotaries(module)]
        declared = sorted({kind for kind in _rope_types(model.config) if kind in _BATCH_DEPENDENT})
        if declared and not tried:
            raise UnsupportedModelError(
                f"{type(model).__name__} uses rope type {declared[0]!r}, which picks its frequencies from the longest sequence of the "
                "batch, and has no rotary embedding that could be tried alone: tokens would depend on a request's neighbours"
            )
        longest = stated or _WITHOUT_LIMIT
        reaches = [rotary.reach(longest) for rotary in tried]
        reach = min(reaches, default=longest)
        self._pinned = [(rotary.module, rotary.memory(reach)) for rotary in tried if rotary.remembers(reach)]
        reason = None if reach == longest else _reason(stated, reach, _rope_type(tried[reaches.index(reach)]))
        self._switching = [rotary for rotary, length in zip(tried, reaches, strict=True) if length < longest]
        self._switch = reach
        # Rows of both kinds share a step where there are just two kinds, and every rotary embedding switches at the same length.
        two_kinds = all(rotary.reach(longest) == reach and rotary.is_constant_beyond(reach, longest) for rotary in self._switching)
        far = stated if reason is not None and two_kinds else None
        self.positions = PositionReach(stated, stated if reason is None else reach, reason, far)

    @property
    def is_steady(self) -> bool:
        """Whether no frequency depends on how long a forward is, or one before it was."""
        return not self._pinned and not self._switching

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """For a ``with`` block, the rotary embeddings as they are in a model that has seen no long forward; then as they were."""
        held: list[tuple[nn.Module, _State]] = []
        try:
            for module, memory in self._pinned:
                held.append((module, _exchange(module, memory)))
            yield
        finally:
            for module, memory in reversed(held):
                _exchange(module, memory)

    @contextmanager
    def far_apart(self, is_far: Tensor) -> Iterator[None]:
        """For a ``with`` block, rotate some tokens of a step at the frequencies of long forwards, and all others at those of short ones.

        Args:
            is_far: ``[T]`` bool, on the model's device: tokens of prompts longer than ``positions.reach``.
        """
        modules = dict.fromkeys(rotary.module for rotary in self._switching)
        with forwards_changed(modules, lambda forward: _both(forward, is_far, self._switch)):
            yield


class PositionTables(TorchFunctionMode):
    """While active, finds tables that are read at given positions, or at a constant distance from them: learned positions.

    Args:
        positions: ``[T]`` positions of the forward that runs meanwhile.

    Attributes:
        reach: positions that the shortest table has rows for; None where no table was read.
        tables: those that were read.
    """

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self._positions = positions
        self.reach: int | None = None
        self.tables: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at lookups in tables on their way."""
        if func is F.embedding:
            self._look(kwargs["weight"] if kwargs and "weight" in kwargs else args[1], args[0])
        elif func is torch.embedding:
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, table: Tensor, indices: Tensor) -> None:
        if indices.numel() != self._positions.numel() or indices.device.type == "meta":
            return
        distance = indices.reshape(-1) - self._positions
        if bool((distance == distance[0]).all()):
            self.tables.append(table)
            rows = int(table.shape[0]) - int(distance[0])
            self.reach = rows if self.reach is None else min(self.reach, rows)


@dataclass(frozen=True, slots=True, eq=False)
class _Rotary:
    """One rotary embedding, or one layer type of it.

    Attributes:
        module: transformers' module.
        arguments: what its forward takes besides hidden states and positions.
        num_axes: of positions; 0 where there is no such dimension.
    """

    module: nn.Module
    arguments: dict[str, str]
    num_axes: int

    def angles(self, *positions: int) -> Tensor:
        """Cosines and sines ``[2, ..., N, D]`` of a forward on just these positions, in float32."""
        device = next((buffer.device for buffer in self.module.buffers()), torch.device("cpu"))
        row = torch.tensor([positions], device=device)
        if self.num_axes:
            row = row.expand(self.num_axes, 1, -1)
        with torch.no_grad():
            return torch.stack(self.module(torch.zeros((1, 1, 1), device=device), row, **self.arguments))

    def reach(self, longest: int) -> int:
        """The largest number of positions, up to ``longest``, whose angles are the same in every forward within them."""
        with _left_alone(self.module):
            self.angles(0)  # which undoes what a long forward before has left
            if self._agrees(longest):
                return longest
            least, most = 1, longest
            while most - least > 1:
                middle = (least + most) // 2
                least, most = (middle, most) if self._agrees(middle) else (least, middle)
            if not all(self._agrees(part) for part in range(1, least, max(least // 8, 1))):
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} changes its frequencies with the number of positions, and not at one number alone"
                )
            return least

    def is_constant_beyond(self, reach: int, longest: int) -> bool:
        """Whether all forwards longer than ``reach`` rotate alike."""
        if self.num_axes:
            return False  # rows of such positions are not told apart
        with _left_alone(self.module):
            probes = min(1, reach - 1), reach // 2, reach
            first = self.angles(*probes)
            middle = (reach + longest) // 2
            within = all(torch.equal(self.angles(*probes, other)[..., :3, :], first) for other in (middle, longest - 1))
            alone = torch.cat([self.angles(middle), self.angles(longest - 1)], dim=-2)
            return within and torch.equal(self.angles(middle, longest - 1), alone)

    def remembers(self, reach: int) -> bool:
        """Whether what it answers within ``reach`` depends on longer forwards before."""
        with _left_alone(self.module):
            self.angles(0)
            before = self._within(reach)
            self.angles(4 * reach)
            return not torch.equal(before, self._within(reach))

    def memory(self, reach: int) -> _State:
        """What a forward longer than ``reach`` changes in the module, as it is without one.

        Raises:
            UnsupportedModelError: the answers within ``reach`` still depend on it.
        """
        with _left_alone(self.module):
            self.angles(0)
            fresh, before = _state(self.module), self._within(reach)
            self.angles(4 * reach)
            changed = _state(self.module)
            memory = {key: fresh.get(key, _NOTHING) for key in {**fresh, **changed} if fresh.get(key, _NOTHING) is not changed.get(key)}
            _exchange(self.module, memory)
            if torch.equal(before, self._within(reach)):
                return memory
        raise UnsupportedModelError(
            f"{type(self.module).__name__} rotates by what it was called with before, in a way that cannot be undone"
        )

    def _within(self, reach: int) -> Tensor:
        return self.angles(0, reach // 2, reach - 1)

    def _agrees(self, length: int) -> bool:
        # A small position far below a switch and one that turns far enough to show a small change of frequency.
        low, middle = min(1, length - 1), length // 2
        together = self.angles(low, middle, length - 1)
        alone = torch.cat([self.angles(low), self.angles(middle)], dim=-2)
        return torch.equal(together[..., :2, :], alone)


def _both(forward: Callable[..., Any], is_far: Tensor, switch: int) -> Callable[..., Any]:
    """A rotary embedding's forward at both frequencies at once, each token at its own."""

    def at_both(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        step = active_step()
        if step is None:
            return forward(x, position_ids, *args, **kwargs)  # another thread's ordinary forward
        tokens: Tensor | None = getattr(step, "tokens", None)
        which = (is_far[None] if tokens is None else is_far[tokens])[..., None]
        near = forward(x, position_ids.clamp(max=switch - 1), *args, **kwargs)
        beyond = position_ids.new_full((*position_ids.shape[:-1], 1), switch)
        far = forward(x, torch.cat([position_ids, beyond], dim=-1), *args, **kwargs)
        return tuple(torch.where(which, long[..., :-1, :], short) for long, short in zip(far, near, strict=True))

    return at_both


def _rotaries(module: nn.Module) -> list[_Rotary]:
    """A module's rotary embeddings, if it has the form of transformers' ones and can be called as they are."""
    kind = vars(module).get("rope_type")
    if kind is None:
        return []
    arguments: list[dict[str, str]] = [{"layer_type": name} for name in kind] if isinstance(kind, Mapping) else [{}]
    found = []
    for given in arguments:
        for num_axes in (0, 3):
            rotary = _Rotary(module, given, num_axes)
            try:
                with _left_alone(module):
                    fits = rotary.angles(0, 1, 2).shape[-2] == 3
            except Exception:  # whatever a module raises, it is not one of these
                continue
            if fits:
                found.append(rotary)
                break
    return found


def _rope_types(config: PreTrainedConfig) -> Iterator[str]:
    text = config.get_text_config(decoder=True)
    waiting: list[object] = [getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)]
    while waiting:  # one mapping for the model, or one per layer type
        parameters = waiting.pop()
        if isinstance(parameters, Mapping):
            waiting.extend(parameters.values())
            yield from (value for key, value in parameters.items() if key in ("rope_type", "type") and isinstance(value, str))


def _reason(stated: int | None, reach: int, rope_type: str) -> str:
    config = "no limit" if stated is None else f"{stated} positions"
    return (
        f"the config states {config}, but a forward of more than {reach} rotates all of them at other frequencies (rope type {rope_type}), "
        "so that a request's tokens would depend on its neighbours"
    )


def _rope_type(rotary: _Rotary) -> str:
    kind = vars(rotary.module)["rope_type"]
    return repr(kind[rotary.arguments["layer_type"]] if isinstance(kind, Mapping) else kind)


def _state(module: nn.Module) -> _State:
    attributes: _State = {(False, name): value for name, value in vars(module).items() if name != "_buffers"}
    return attributes | {(True, name): buffer for name, buffer in module._buffers.items()}


def _exchange(module: nn.Module, state: _State) -> _State:
    """Put a state in place, attribute by attribute and buffer by buffer; returns what stood there."""
    former = {}
    for key, value in state.items():
        home = module._buffers if key[0] else vars(module)
        former[key] = home.get(key[1], _NOTHING)
        if value is _NOTHING:
            home.pop(key[1], None)
        else:
            home[key[1]] = value
    return former


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    """Give a module back what it holds now, and the numbers in its buffers."""
    state = _state(module)
    numbers = [(buffer, buffer.clone()) for buffer in module._buffers.values() if buffer is not None]
    try:
        yield
    finally:
        _exchange(module, {key: _NOTHING for key in _state(module) if key not in state} | state)
        with torch.no_grad():
            for buffer, before in numbers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
