from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pagedkv.models.alterations import Alterations
from pagedkv.testing.models import tiny_model


def replace_parameter(model: PreTrainedModel) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def replace_module(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp = tiny_model("llama").model.layers[0].mlp


def write_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = 3.0


def write_through_data(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight.data *= 1.5


def take_storage(model: PreTrainedModel) -> None:
    weight = model.lm_head.weight
    weight.data = weight.data.clone()


def set_attribute(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def set_mapping(model: PreTrainedModel) -> None:
    model.model.layers[0].adapters = {"default": 0.5}


def change_buffer(model: PreTrainedModel) -> None:
    model.model.layers[0].register_buffer("scale", torch.ones(3))


ALTERATIONS = [
    replace_parameter,
    replace_module,
    write_in_place,
    write_through_data,
    take_storage,
    set_attribute,
    set_mapping,
    change_buffer,
    lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    lambda model: model.model.norm.register_forward_pre_hook(lambda *_: None),
    lambda model: setattr(model.model.norm, "forward", model.model.norm.forward),
]


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_alteration_is_seen_once(alter: Callable[[PreTrainedModel], object]) -> None:
    model = tiny_model("llama")
    alterations = Alterations(model)
    assert not alterations.seen()
    alter(model)
    assert alterations.seen()
    assert not alterations.seen()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_forwards_gradients_and_a_change_of_mode_are_no_alteration(name: str) -> None:
    model = tiny_model(name)
    alterations = Alterations(model)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    model.train()
    model.eval()
    assert not alterations.seen()


def test_weights_that_are_let_go_are_not_kept_alive() -> None:
    model = tiny_model("llama")
    alterations = Alterations(model)
    former = weakref.ref(model.lm_head.weight)
    replace_parameter(model)
    assert former() is None
    assert alterations.seen()


def test_tensors_of_inference_mode_other_layouts_and_no_layout_at_all_are_looked_at() -> None:
    holder = torch.nn.Module()
    with torch.inference_mode():
        holder.register_buffer("made", torch.ones(4))
    holder.register_buffer("sparse", torch.eye(3).to_sparse())
    holder.register_buffer("turned", torch.ones(3, 4).t())
    holder.register_buffer("nothing", None)
    alterations = Alterations(holder)
    assert not alterations.seen()
    holder.turned.add_(1)
    assert alterations.seen()
