"""Decoder layers computed before they are asked for: the bits of one layer at a time, whatever the model does between two of them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from models_support import keys_of_a_dropped_storage, mixed_schedule, paged_logits, plain_logits, random_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from pagedkv.attention.cpu_backend import CpuBackend
from pagedkv.attention.native.decoder import DecoderRun
from pagedkv.attention.native.library import load_library
from pagedkv.attention.native.products import PairProduct
from pagedkv.errors import InvalidRequestError
from pagedkv.models import ModelRunner
from pagedkv.models.native_layer import NativeLayer
from pagedkv.testing.models import tiny_model

LENS = (12, 20)
TOKENS = random_tokens(LENS, seed=1)
STEPS = mixed_schedule(LENS, chunk=5, num_decodes=4)
LIBRARY = load_library().library
HAS_PAIRS = LIBRARY is not None and PairProduct.fits(torch.zeros(1, 32, dtype=torch.bfloat16), LIBRARY)
pytestmark = pytest.mark.skipif(not HAS_PAIRS, reason="no build that multiplies pairs runs here")


def half_model(name: str = "llama", *, num_layers: int = 4) -> PreTrainedModel:
    return tiny_model(name, num_hidden_layers=num_layers).to(torch.bfloat16)


@pytest.fixture(autouse=True)
def no_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies run as their own code says: where one stands in for all its layers, none is called."""
    monkeypatch.setattr("pagedkv.models.fused_body.find_body", lambda *args: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of each native call."""
    counted: list[int] = []
    former = CpuBackend.run_decoders

    def counting(self: CpuBackend, run: DecoderRun, *args: Any, **kwargs: Any) -> Tensor:
        counted.append(len(run.layers))
        return former(self, run, *args, **kwargs)

    monkeypatch.setattr(CpuBackend, "run_decoders", counting)
    return counted


def one_at_a_time(monkeypatch: pytest.MonkeyPatch, runner: ModelRunner) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr("pagedkv.models.step._MOST_AHEAD_NBYTES", 1)
        return paged_logits(runner, TOKENS, STEPS)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_as_near_as_the_model(ours: list[Tensor], model: PreTrainedModel, what: str) -> None:
    """Judged by the same weights in float32: our logits are as far from their logits as the model's own in bfloat16 are."""
    exact, theirs = (torch.cat(plain_logits(each, TOKENS)) for each in (copy.deepcopy(model).float(), model))
    our_error, their_error = (float((each - exact).norm() / exact.norm()) for each in (torch.cat(ours).float(), theirs))
    assert our_error <= 1.5 * their_error, f"{what}: {our_error:.2e} of the logits, the model's own {their_error:.2e}"


class Between(nn.Module):
    """Something that a model does between two layers, and may do otherwise in another step."""

    def __init__(self, later: nn.Module) -> None:
        super().__init__()
        self.do, self.calls = "nothing", 0
        self.later = [later]  # a layer that is called after it, not a child of this module
        self.weight = later.mlp.down_proj.weight.detach().clone()
        self.norm = later.input_layernorm.weight.detach().clone()
        self.scaling = later.self_attn.scaling

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        self.calls += 1
        factor, (later,) = 1.0 + self.calls % 2, self.later
        if self.do == "add in place":
            hidden_states.add_(0.5)
        elif self.do == "other memory":
            hidden_states.data = hidden_states.data + 0.5
        elif self.do == "angles in place":
            others["position_embeddings"][0].mul_(factor)
        elif self.do == "weights":
            later.mlp.down_proj.weight.copy_(self.weight * factor)
        elif self.do == "norm":
            later.input_layernorm.weight.copy_(self.norm * factor)
        elif self.do == "bias":
            bias = torch.full((later.mlp.down_proj.out_features,), factor).bfloat16()
            later.mlp.down_proj.bias = nn.Parameter(bias) if factor > 1 else None
        elif self.do == "epsilon":
            later.input_layernorm.variance_epsilon = 0.1 * factor
        elif self.do == "scale":
            later.self_attn.scaling = self.scaling * factor
        return hidden_states.clone() if self.do == "copy" else hidden_states


class Layers(nn.ModuleList):
    """Layers whose order a model may change."""

    order: ClassVar[list[int]] = []

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            layers = list(self._modules.values())[index]
            return [layers[place] for place in self.order] or layers
        return super().__getitem__(index)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_run_ahead_is_one_native_call_for_all_layers_and_the_bits_of_one_for_each(
    name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half_model(name)
    runner = ModelRunner(model, pack_linears=True, fuse=True)
    calls.clear()
    ours = paged_logits(runner, TOKENS, STEPS)
    assert calls == [4] * len(STEPS)
    calls.clear()
    theirs = one_at_a_time(monkeypatch, runner)
    assert calls == [1] * 4 * len(STEPS)
    assert_same(ours, theirs)
    assert_as_near_as_the_model(ours, model, name)


def test_run_ahead_results_that_would_take_too_much_memory_wait_in_parts(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(half_model(num_layers=5), pack_linears=True, fuse=True)
    theirs = one_at_a_time(monkeypatch, runner)
    monkeypatch.setattr("pagedkv.models.step._MOST_AHEAD_NBYTES", 2 * 32 * 2)  # two layers of one token, or one of more
    calls.clear()
    assert_same(paged_logits(runner, TOKENS, STEPS), theirs)
    assert set(calls) == {1, 2}
    assert sum(calls) == 5 * len(STEPS)


@pytest.mark.parametrize("do", ["add in place", "copy", "other memory", "angles in place", "weights", "norm", "bias", "epsilon", "scale"])
def test_run_ahead_what_the_model_does_between_two_layers_is_seen(do: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    decoder = model.get_decoder()
    between = Between(decoder.layers[3])
    decoder.layers.insert(2, between)
    model.config.num_hidden_layers = 5  # as many as the model calls
    runner = ModelRunner(model, pack_linears=True, fuse=True)
    assert len(runner.fusion.layers) == 4
    before = paged_logits(runner, TOKENS, STEPS)
    between.do, between.calls = do, 0
    ours = paged_logits(runner, TOKENS, STEPS)
    between.calls = 0
    assert_same(ours, one_at_a_time(monkeypatch, runner))
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True)) == (do == "copy")


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [0, 2, 1, 3]])
def test_run_ahead_another_order_of_the_layers_is_seen(order: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    model.get_decoder().layers = Layers(model.get_decoder().layers)
    runner = ModelRunner(model, pack_linears=True, fuse=True)
    before = paged_logits(runner, TOKENS, STEPS)
    Layers.order[:] = order
    try:
        ours, theirs = paged_logits(runner, TOKENS, STEPS), one_at_a_time(monkeypatch, runner)
    finally:
        Layers.order.clear()
    assert_same(ours, theirs)
    assert not torch.equal(ours[0], before[0])
    assert_same(paged_logits(runner, TOKENS, STEPS), before)


def test_run_ahead_what_was_changed_between_steps_is_used(calls: list[int]) -> None:
    model = half_model()
    runner = ModelRunner(model, pack_linears=True, fuse=True)
    layers = model.get_decoder().layers

    def assert_right(what: str, expected: set[int]) -> None:
        calls.clear()
        ours = paged_logits(runner, TOKENS, STEPS)
        assert set(calls) == expected, what
        assert_same(ours, paged_logits(ModelRunner(copy.deepcopy(model), pack_linears=True, fuse=True), TOKENS, STEPS))
        assert_as_near_as_the_model(ours, model, what)

    layers[2].self_attn.v_proj.weight.data.mul_(3)
    layers[1].post_attention_layernorm.weight.data.mul_(2)
    layers[3].input_layernorm.variance_epsilon = 0.3
    assert_right("weights in place, and a number", {4})
    layers[2].input_layernorm.weight = nn.Parameter(layers[2].input_layernorm.weight.detach() * 3)
    layers[1].mlp.gate_proj.weight = nn.Parameter(layers[1].mlp.gate_proj.weight.detach().flip(0))
    layers[1].self_attn.k_proj.bias = nn.Parameter(torch.ones(layers[1].self_attn.k_proj.out_features).bfloat16())
    assert_right("weights in the place of others, and a bias that was not there", {4})
    layers[2].self_attn.scaling *= 0.5
    assert_right("a scale of one layer's own", {1, 2})
    handle = layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    assert_right("a hook", {1})
    handle.remove()
    layers[3].mlp.down_proj = nn.Sequential(layers[3].mlp.down_proj, nn.Tanh())
    assert_right("a module of the user's own", {1, 2})
    layers[0].input_layernorm.weight = nn.Parameter(torch.ones(1).bfloat16())
    assert_right("a norm's weight of another shape", {1})


def test_run_ahead_runners_of_one_model_do_not_mix_their_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    runners = [ModelRunner(model, pack_linears=True, fuse=True, block_size=size) for size in (4, 16)]
    before = [paged_logits(runner, TOKENS, STEPS) for runner in runners]
    for _ in range(2):
        for runner, expected in zip(runners, before, strict=True):
            assert_same(paged_logits(runner, TOKENS, STEPS, seed=3), expected)


def test_run_ahead_in_inference_mode_is_one_layer_at_a_time(calls: list[int]) -> None:
    runner = ModelRunner(half_model(), pack_linears=True, fuse=True)
    expected = paged_logits(runner, TOKENS, STEPS)
    calls.clear()
    with torch.inference_mode():
        assert_same(paged_logits(runner, TOKENS, STEPS), expected)
    assert set(calls) == {1}


def test_run_ahead_weights_of_eight_bits_give_the_bits_of_layers_that_run_apart(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    exact, runner = (ModelRunner(model, pack_linears=wanted, fuse=True) for wanted in (True, "int8"))
    calls.clear()
    ours = paged_logits(runner, TOKENS, STEPS)
    assert calls == [4] * len(STEPS)
    assert not torch.equal(ours[0], paged_logits(exact, TOKENS, STEPS)[0])
    monkeypatch.setattr(NativeLayer, "weights", lambda layer: None)
    calls.clear()
    assert_same(ours, paged_logits(runner, TOKENS, STEPS))
    assert calls == []


def test_run_ahead_in_inference_mode_with_a_tensor_from_outside() -> None:
    model = half_model()
    runner = ModelRunner(model, pack_linears=True, fuse=True)
    tokens, steps = [TOKENS[0]], [[(0, len(TOKENS[0]))]]
    expected = paged_logits(runner, tokens, steps)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(TOKENS[0][None])
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded)
    with torch.inference_mode():
        assert_same(paged_logits(runner, tokens, steps), expected)
    handle.remove()


def test_run_ahead_keeps_no_pool_of_a_storage_that_is_gone() -> None:
    runner = ModelRunner(half_model(), pack_linears=True, fuse=True)
    paged_logits(runner, TOKENS, STEPS)
    assert not any(key() is not None for key in keys_of_a_dropped_storage(runner, TOKENS[0][:3]))


def test_run_ahead_products_of_other_shapes_are_refused_as_the_model_does() -> None:
    for fuse in (True, False):
        model = half_model()
        runner = ModelRunner(model, pack_linears=True, fuse=fuse)
        for name, shape in (("mlp.down_proj", (64, 64)), ("self_attn.o_proj", (32, 96)), ("self_attn.o_proj", (32, 0))):
            layer = model.get_decoder().layers[1].get_submodule(name)
            former, layer.weight = layer.weight, nn.Parameter(torch.ones(shape).bfloat16())
            with pytest.raises((InvalidRequestError, RuntimeError)):
                paged_logits(runner, TOKENS, STEPS)
            layer.weight = former
