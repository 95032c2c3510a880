from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Cache

from pagedkv.errors import UnsupportedModelError
from pagedkv.models.context import AttentionCall, activate, active_step
from pagedkv.models.facade import CacheFacade, marked_layer


class Notebook:
    """A step that notes what it is told."""

    def __init__(self) -> None:
        self.stored: list[int] = []

    def mask(self, mask_function: object, num_queries: int, device: object) -> Tensor:
        raise NotImplementedError

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> None:
        self.stored.append(layer_idx)

    def attend(self, call: AttentionCall) -> Tensor:
        raise NotImplementedError


def test_update_stores_and_returns_the_same_tensors_marked() -> None:
    step = Notebook()
    facade = CacheFacade(step)  # type: ignore[arg-type]
    key, value = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    assert marked_layer(key, value) is None
    got = facade.update(key, value, 5)
    assert got[0] is key
    assert got[1] is value
    assert step.stored == [5]
    assert marked_layer(key, value) == 5


def test_marks_do_not_survive_a_change_a_swap_or_another_layer() -> None:
    facade = CacheFacade(Notebook())  # type: ignore[arg-type]
    key, value = facade.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    other_key, _ = facade.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    assert marked_layer(key * 1, value) is None
    assert marked_layer(key, value.clone()) is None
    assert marked_layer(value, key) is None
    assert marked_layer(other_key, value) is None


def test_facade_answers_as_an_empty_cache() -> None:
    facade = CacheFacade(Notebook())  # type: ignore[arg-type]
    assert isinstance(facade, Cache)
    assert facade.get_seq_length() == facade.get_query_offset() == len(facade) == 0
    assert facade.get_mask_sizes(7, 0) == (7, 0)
    assert facade.get_max_length() == facade.get_max_cache_shape() == -1
    assert facade.is_initialized
    assert not facade.is_compileable
    assert not facade.is_croppable
    assert facade.is_sliding == facade.is_linear == facade.is_dummy == []


def test_facade_refuses_recurrent_state_and_indexers_with_the_reason() -> None:
    facade = CacheFacade(Notebook())  # type: ignore[arg-type]
    state = torch.zeros(1)
    for ask in (
        lambda: facade.has_previous_state(),
        lambda: facade.get_conv_state(0),
        lambda: facade.update_conv_state(state, 0),
        lambda: facade.get_recurrent_state(0),
        lambda: facade.update_recurrent_state(state, 0),
    ):
        with pytest.raises(UnsupportedModelError, match="recurrent"):
            ask()
    with pytest.raises(UnsupportedModelError, match="indexer"):
        facade.update_indexer(state, 0)
    with pytest.raises(UnsupportedModelError, match="beams"):
        facade.reorder_cache(state)  # type: ignore[arg-type]


def test_active_step_is_set_only_inside_the_block_even_when_it_raises() -> None:
    step = Notebook()
    seen: list[object] = []

    def fail_inside() -> None:
        with activate(step):  # type: ignore[arg-type]
            seen.append(active_step())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert seen == [step]
    assert active_step() is None
