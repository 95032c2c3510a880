"""The recurrent state of a call's rows, as the objects that transformers' recurrent, convolutional and linear-attention layers work with.

Owns the way between those objects and named tensors, which is how state is stored. What a layer makes of its state is transformers' own
code, on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from pagedkv.models.context import StepContext
from pagedkv.models.facade import DenseCache
from pagedkv.storage import StateSpec

CONV, RECURRENT = "conv", "recurrent"


class StatefulCache(DenseCache):
    """The cache of rows of equal query length that have recurrent state, or start with none.

    Args:
        step: where K and V go, and come from.
        past_len: tokens before the new ones in the longest row.
        config: of the model, which says how many layers there are, and how many states one of them has.
        states: ``[R, ...]`` tensors as ``states`` gives them, which the model may write to; None where no row has computed a token.
    """

    def __init__(self, step: StepContext, past_len: int, *, config: PreTrainedConfig, states: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(step, past_len)
        text = config.get_text_config(decoder=True)
        count = int(getattr(text, "number_of_conv_states", 1))
        # One for every layer, though only some have state: no list of layer types says it for every model.
        self.layers: list[Any] = [LinearAttentionLayer(number_of_states=count) for _ in range(text.num_hidden_layers)]
        for name, tensor in (states or {}).items():
            _fill(self.layers, name, tensor)

    def states(self) -> dict[str, Tensor]:
        """Everything that layers hold now, by name; tensors that nobody else holds when the forward is over."""
        return dict(_held(self.layers))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a layer, or any where none is named, has the state of earlier tokens."""
        layers = self.layers if layer_idx is None else [self.layers[layer_idx]]
        return any(all(layer.has_previous_state.values()) if state_idx is None else layer.has_previous_state[state_idx] for layer in layers)

    def is_recording_past(self, layer_idx: int) -> bool:
        """False: states are not rolled back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The inputs that a layer's convolution reaches back to, or None at the start of a sequence."""
        layer = self.layers[layer_idx]
        return layer.conv_states[state_idx] if layer.has_previous_state[state_idx] else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """As transformers' layer does it."""
        full: Tensor = self.layers[layer_idx].update_conv_state(conv_states, state_idx, **kwargs)
        return full

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """What a layer has made of all earlier tokens, or None at the start of a sequence."""
        layer = self.layers[layer_idx]
        return layer.recurrent_states[state_idx] if layer.has_previous_state[state_idx] else None

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """As transformers' layer does it."""
        kept: Tensor = self.layers[layer_idx].update_recurrent_state(recurrent_states, state_idx, **kwargs)
        return kept


def state_specs(cache: StatefulCache) -> tuple[StateSpec, ...]:
    """What a model keeps for one sequence, after a forward of one row over an empty cache."""
    return tuple(StateSpec(name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in cache.states().items())


def is_of_kind(name: str, kind: str) -> bool:
    """Whether a state's name is of ``CONV`` or ``RECURRENT``."""
    return name.split(".")[1] == kind


def _held(layers: list[Any]) -> Iterator[tuple[str, Tensor]]:
    for place, layer in enumerate(layers):
        for index in range(layer.number_of_states):
            for kind, states in ((CONV, layer.conv_states), (RECURRENT, layer.recurrent_states)):
                if states[index] is not None:
                    yield f"{place}.{kind}.{index}", states[index]


def _fill(layers: list[Any], name: str, tensor: Tensor) -> None:
    place, kind, index = name.split(".")
    layer, number = layers[int(place)], int(index)
    layer.dtype, layer.device = tensor.dtype, tensor.device
    if kind == CONV:
        layer.conv_states[number] = tensor
        layer.is_conv_states_initialized[number] = True
        layer.conv_kernel_size[number] = tensor.shape[-1]
        layer.has_previous_state[number] = True  # as transformers has it: after a convolution has run, and never without one
    else:
        layer.recurrent_states[number] = tensor
        layer.is_recurrent_states_initialized[number] = True
