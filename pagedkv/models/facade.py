"""The cache objects that a model sees during a step: they hand K/V to the step and return what the model is to go on with.

Owns the marks, by which the attention function knows that the tensors it got are the ones that were stored and of which
layer (so layers that read another layer's K/V work), and the answers to what models ask of a cache. It owns no tensor:
the new tokens are written where the step puts them.
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


def indexer_id(layer_idx: int) -> int:
    """The number under which the indexer keys of a layer are stored beside its K/V: a negative one, which is no layer's."""
    return -1 - layer_idx


def cross_id(layer_idx: int) -> int:
    """The number under which cross attention of a layer is stored, where its K and V have another shape than those of self attention."""
    return -(2**20) - layer_idx


class StepCache(Cache):
    """What every cache of ours answers. Made per step; holds nothing after it."""

    def __init__(self, step: StepContext) -> None:
        # Cache.__init__ wants layer objects that hold tensors; there are none here.
        self._step = step
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def __len__(self) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As ``get_seq_length``."""
        return int(self.get_seq_length(layer_idx))

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
        """Refuses: sparse attention chooses its keys through the mask, which a model must have for that."""
        raise UnsupportedModelError("the model chooses its keys with an indexer (sparse attention), for which it needs all of them at hand")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuses: sequences are forked through their block tables."""
        raise UnsupportedModelError("beams are forked through block tables, not by reordering a step's cache")


class CacheFacade(StepCache):
    """The cache of a packed step, a row of tokens of several sequences.

    To the model every step looks like a first call: the length is 0 and only the step's own tokens are there. Positions
    come as ``position_ids`` and masks as functions of positions, so nothing of the past is needed outside attention.
    """

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[1, Hkv, T, D]`` keys and values of a layer and return the same two tensors, marked, or what the step gathered."""
        gathered = self._step.update(key_states, value_states, layer_idx)
        if gathered is not None:
            return gathered
        setattr(key_states, _KEY_MARK, layer_idx)
        setattr(value_states, _VALUE_MARK, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: the past is not the model's business."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover: the step's own tokens."""
        return int(query_length), 0


class DenseCache(StepCache):
    """The cache of rows of equal query length, as if right-aligned sequences with their pads had been stored.

    Args:
        step: where K and V go, and come from.
        past_len: tokens before the new ones in the longest row.
    """

    def __init__(self, step: StepContext, past_len: int) -> None:
        super().__init__(step)
        self._past_len = past_len

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[R, Hkv, Q, D]`` keys and values of a layer; returns those of the whole rows, ``[R, Hkv, K, D]``."""
        return self._step.update(key_states, value_states, layer_idx) or (key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Store the ``[R, Q, D]`` keys by which a layer of sparse attention chooses; returns those of the whole rows, ``[R, K, D]``.

        They are stored as one more layer of one head: the first half of each as its K, the second as its V.
        """
        heads = indexer_key_states[:, None]
        half = heads.shape[-1] // 2
        return torch.cat(self.update(heads[..., :half], heads[..., half:], indexer_id(layer_idx)), dim=-1)[:, 0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens, pads included, before the new ones."""
        return self._past_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers: all, old and new."""
        return self._past_len + int(query_length), 0


def _refuse_recurrent() -> NoReturn:
    raise UnsupportedModelError(
        "the model has recurrent, convolutional or linear-attention layers: their state goes along a row, so each sequence needs its own"
    )
