"""The cache object that a model sees during a step: it hands K/V to the step and returns them marked.

Owns the marks, by which the attention function knows that the tensors it got are the ones that were stored and of which
layer (so layers that read another layer's K/V work), and the answers to what models ask of a cache. It owns no tensor:
the new tokens are written where the step puts them, and the past is never returned.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.context import StepContext

_KEY_MARK = "_pagedkv_key_of_layer"
_VALUE_MARK = "_pagedkv_value_of_layer"


def marked_layer(key: Tensor, value: Tensor) -> int | None:
    """The layer whose stored K/V these two tensors are, or None if they were changed after the cache update."""
    layer: int | None = getattr(key, _KEY_MARK, None)
    return layer if layer is not None and getattr(value, _VALUE_MARK, None) == layer else None


class CacheFacade(Cache):
    """A transformers ``Cache`` over one step. Made per step; holds nothing after it.

    To the model every step looks like a first call: the length is 0 and only the step's own tokens are there. Positions
    come as ``position_ids`` and masks as functions of positions, so nothing of the past is needed outside attention.
    """

    def __init__(self, step: StepContext) -> None:
        # Cache.__init__ wants layer objects that hold tensors; there are none here.
        self._step = step
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[1, Hkv, T, D]`` keys and values of a layer and return the same two tensors, marked."""
        self._step.update(key_states, value_states, layer_idx)
        setattr(key_states, _KEY_MARK, layer_idx)
        setattr(value_states, _VALUE_MARK, layer_idx)
        return key_states, value_states

    def __len__(self) -> int:
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: the past is not the model's business."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Always 0, as ``get_seq_length``."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover: the step's own tokens."""
        return int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, transformers' word for no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1, transformers' word for no limit (older spelling)."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: models must not prepare static masks for us."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True: nothing is created lazily."""
        return True

    @property
    def is_croppable(self) -> bool:
        """False: lengths belong to the block tables."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """Empty: no layer objects."""
        return []

    @property
    def is_linear(self) -> list[bool]:
        """Empty: no layer objects."""
        return []

    @property
    def is_dummy(self) -> list[bool]:
        """Empty: no layer objects."""
        return []

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Refuses: only recurrent layers ask."""
        _refuse_recurrent()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Refuses: recurrent state is not K/V."""
        _refuse_recurrent()

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Refuses: recurrent state is not K/V."""
        _refuse_recurrent()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Refuses: recurrent state is not K/V."""
        _refuse_recurrent()

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Refuses: recurrent state is not K/V."""
        _refuse_recurrent()

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Refuses: sparse attention chooses its keys through the mask."""
        raise UnsupportedModelError("the model chooses its keys with an indexer (sparse attention), which is not supported in this release")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuses: sequences are forked through their block tables."""
        raise UnsupportedModelError("beams are forked through block tables, not by reordering a step's cache")


def _refuse_recurrent() -> NoReturn:
    raise UnsupportedModelError(
        "the model has recurrent, convolutional or linear-attention layers, whose state is not paged in this release"
    )
