"""What layers keep beside K and V: recurrent and convolutional states, and the keys of indexers, as transformers keeps them.

Owns these tensors, one row each for the rows of a batch: they are of a size that does not grow, or small beside K and V.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int64Array


def keeps_states(cache: DynamicCache) -> bool:
    """Whether a layer of transformers' own cache keeps more than K and V."""
    return any(hasattr(layer, "conv_states") or hasattr(layer, "indexer_keys") for layer in cache.layers)


class LayerStates:
    """The states of one batch, in layers of transformers' own, whose K and V stay empty.

    Args:
        model: whose config says which layers there are.

    Attributes:
        cache: what the model asks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._records = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.cache: Cache = DynamicCache(config=self._config)
        if self._records:
            self.record()

    def record(self) -> None:
        """Keep what ``crop`` needs."""
        self._records = True
        cache: Any = self.cache
        cache.activate_past_recording()

    def select(self, indices: Int64Array) -> None:
        """Make row ``i`` what row ``indices[i]`` was; copies the states."""
        self.cache.reorder_cache(torch.from_numpy(indices))  # type: ignore[arg-type]  # int64, as a LongTensor is

    def crop(self, num_columns: int) -> None:
        """Forget the last columns.

        Raises:
            InvalidRequestError: a state has taken them in, and cannot be taken back.
        """
        layers: list[Any] = self.cache.layers
        recurrent = [layer for layer in layers if hasattr(layer, "conv_states") and any(layer.is_recurrent_states_initialized.values())]
        if num_columns and recurrent:
            raise InvalidRequestError("the model has recurrent layers, whose state cannot be taken back: the cache cannot be cropped")
        for layer in layers:
            if hasattr(layer, "indexer_keys") or (hasattr(layer, "conv_states") and any(layer.is_conv_states_initialized.values())):
                layer.crop(-num_columns)

    @property
    def is_croppable(self) -> bool:
        """Whether every state can be taken back."""
        return all(layer.is_croppable for layer in self.cache.layers if hasattr(layer, "conv_states"))

    def fork(self) -> LayerStates:
        """The same states once more, copied."""
        return copy.deepcopy(self)
