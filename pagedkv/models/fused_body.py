"""A model's body as one call: embeddings, all decoder layers in one native call, and a norm, without the model's own code in between.

Owns when that may be: as long as the body, its configuration and every layer are what they were when they were proven (``body_proofs.py``).
Nothing of the model's own runs between that look and the native call. Else the body runs as its own code says, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pagedkv.attention.native.decoder import DecoderRun
from pagedkv.models.body_proofs import Body, as_body, reads_wanted_alone
from pagedkv.models.bridge import pointed_at_us
from pagedkv.models.call import CACHE_ARGUMENTS
from pagedkv.models.context import active_step
from pagedkv.models.facade import CacheFacade
from pagedkv.models.fused_layers import FusedLayer
from pagedkv.models.native_layer import NativeStack
from pagedkv.models.stand_ins import Place, derived, is_plain
from pagedkv.models.step import PagedStep, Rows
from pagedkv.models.watches import CodeWatch, ModuleWatch

Apart = Callable[[], AbstractContextManager[None]]
"""Puts what stands in for a body's parts in place for a ``with`` block."""


def find_body(model: nn.Module, layers: Sequence[FusedLayer], configs: tuple[PreTrainedConfig, ...], apart: Apart) -> FusedBody | None:
    """The body of a model, if it is proven and all its layers can run natively. The model is not changed; a copy of the body is called."""
    native = {id(layer.module): layer for layer in layers if layer.native is not None}
    for name, place, module, listed in _candidates(model):
        inside = [native.get(id(layer)) for layer in module._modules[listed]._modules.values()]  # type: ignore[union-attr]
        found = [layer for layer in inside if layer is not None]
        if not found or len(found) != len(inside) or not any(vars(module).get("config") is config for config in configs):
            continue
        body = as_body(module, listed, configs) if is_plain(module) and _is_known(module) else None
        if body is None:
            continue
        has_head = place[0] is model._modules and _is_known(model) and is_plain(model)
        head = model if has_head and reads_wanted_alone(model, place[1], body, configs) else None
        with pointed_at_us(configs):  # as the configuration is during a step
            return FusedBody(name, place, body, layers=found, listed=listed, head=head, apart=apart)
    return None


def _candidates(model: nn.Module) -> Iterator[tuple[str, Place, nn.Module, str]]:
    """Modules inside a model that have a list of others: the dotted name, where the module stands, itself, and the name of the list."""
    for parent_name, parent in model.named_modules():
        for key, module in parent._modules.items():
            for listed, child in () if module is None else module._modules.items():
                if module is not None and isinstance(child, nn.ModuleList):
                    yield f"{parent_name}.{key}".removeprefix("."), (parent._modules, key), module, listed


def _is_harmless(module: nn.Module) -> bool:
    """Whether a module runs no code of the user's, which might change the body: nobody's hooks, no children."""
    return type(module).__module__.startswith(("torch.", "transformers.")) and not (
        module._modules or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


def _is_known(module: nn.Module) -> bool:
    """Whether a module runs code of transformers: other code may do at one time what it does not at another, and a proof is of one time."""
    cls = type(module)
    return all(str(name).startswith("transformers.") for name in (cls.__module__, getattr(cls.forward, "__module__", "")))


class FusedBody:
    """The body of one model.

    Args:
        name: its dotted name.
        place: where it stands.
        found: what it was found to be.
        layers: its decoder layers, in order, all with ``native``.
        listed: name of the child that holds them.
        head: the model around it, where that reads no hidden states but those of tokens whose logits are wanted; else None.
        apart: puts what stands in for its parts in place, for a step in which it runs as its own code says.

    Attributes:
        name: as given.
        module: the body.
        places: as those of ``Fused``.
        stand_in: what takes the place during a step.
        parts: ids of the modules that need no stand-ins of their own while this stands in.
        linears: ids of the linear layers that do not.
        stack: the layers.
    """

    def __init__(
        self, name: str, place: Place, found: Body, *, layers: Sequence[FusedLayer], listed: str, head: nn.Module | None, apart: Apart
    ) -> None:
        module = place[0][place[1]]
        if module is None:
            raise TypeError(f"{name} is no module")
        self.name, self.module, self.places = name, module, [place]
        self.stand_in = derived(module, {"forward": self._forward()})
        self.parts = frozenset(id(part) for layer in layers for part in layer.parts)
        self.linears = frozenset[int]().union(*(layer.linears for layer in layers))
        self.stack = NativeStack([layer.native for layer in layers if layer.native is not None])
        self._found, self._apart = found, apart
        self._head, self._head_code = head, None if head is None else type(head).forward
        self._last = layers[-1].of_wanted
        self._listed, self._list = listed, module._modules[listed]
        self._layers = [layer.module for layer in layers]
        self._watch = ModuleWatch.of_all(layer.watch for layer in layers)
        self._code = CodeWatch(module)
        self._run: DecoderRun | None = None
        self._is_trusted = True

    def looked_at(self) -> bool:
        """Whether it stands in the model in the step that begins: it computed in the step before, or is again what it was."""
        return self._is_trusted or self.still()

    def still(self) -> bool:
        """Whether the body and every layer are what they were, but for weights. What it calls beside layers is called as it is now.

        Cost: that of ``ModuleWatch.still``.
        """
        module, listed = self.module, self._list
        return (
            listed is not None
            and type(listed) is nn.ModuleList
            and module._modules.get(self._listed) is listed
            and [*listed._modules.values()] == self._layers
            and self._code.still()
            and not module.training
            and is_plain(module)
            and self._watch.still()
        )

    def _forward(self) -> Callable[..., Any]:
        module = self.module

        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            step = active_step()
            if type(step) is not PagedStep:
                return module.forward(*args, **kwargs)
            result = None if args or torch.is_grad_enabled() else self._computed(step, **kwargs)
            self._is_trusted = result is not None
            if result is not None:
                return result
            with self._apart():
                return module.forward(*args, **kwargs)

        return forward

    def _computed(
        self,
        step: PagedStep,
        *,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: object = None,
        **given: object,
    ) -> Any:
        """What the body makes of ids and positions, both ``[1, T]``; None where this is not the call that was proven."""
        named = {name: value for name, value in given.items() if value is not None}
        cache = next((named.pop(name) for name in CACHE_ARGUMENTS if name in named), None)
        if named or input_ids is None or position_ids is None or use_cache is not True or type(cache) is not CacheFacade:
            return None
        run = self._run_of(step) if self.still() else None
        if run is None:
            return None
        modules: dict[str, Any] = self.module._modules
        found, keyword = self._found, self._found.takes_positions_as
        embedding = modules[found.embedding]
        x = embedding(input_ids)
        rotary = modules[found.rotary]
        cosines, sines = rotary(x, position_ids) if keyword is None else rotary(x, **{keyword: position_ids})
        if not (_is_harmless(embedding) and _is_harmless(rotary)):
            run = self._run_of(step) if self.still() else None
        states = None if run is None else self._states(step, run, Rows(x, cosines, sines))
        if states is None:
            return None
        return found.output(**{found.states: states, **({} if found.cache is None else {found.cache: cache})})

    def _states(self, step: PagedStep, run: DecoderRun, rows: Rows) -> Tensor | None:
        """What the layers and the norm make of rows; zeros for tokens that nobody asks for."""
        layers, mask, head = self.stack.layers, self._found.mask, self._head
        norm: Any = self.module._modules[self._found.norm]
        if head is not None and is_plain(head) and type(head).forward is self._head_code and is_plain(norm):
            wanted = step.run_wanted(layers, run, rows, mask, self._last)
            if wanted is not None:
                states = torch.zeros_like(rows.x)
                states[:, step.attention.batch.logits_indices] = norm(wanted)
                return states
        every = step.run_all(layers, run, rows, mask)
        return None if every is None else norm(every)

    def _run_of(self, step: PagedStep) -> DecoderRun | None:
        """The layers with their weights as they are now and the step's pools; None where one native call cannot run them."""
        weights, pools = self.stack.weights(), step.pools_of(self.stack.layers)
        if weights is None or pools is None:
            return None
        if self._run is None or not self._run.is_of(weights, pools):
            places = list(zip(weights, pools, strict=True))
            alike = all(DecoderRun.go_together(places[0], place) for place in places)
            self._run = DecoderRun(weights, pools) if alike else None
        return self._run
