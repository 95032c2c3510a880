"""Linear layers with weights of eight bits: the model of the rounded weights and no other, and the user's own as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from models_support import assert_close, mixed_schedule, paged_logits, plain_logits, random_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from pagedkv import LLM, SamplingParams
from pagedkv.attention.native.library import Loaded, load_library
from pagedkv.attention.native.products import Int8Product
from pagedkv.errors import ConfigError
from pagedkv.generation import CachePool
from pagedkv.models import ModelRunner, why_not_packable
from pagedkv.models.int8_weights import quantised
from pagedkv.testing.models import tiny_model

LENS = (12, 40)
TOKENS = random_tokens(LENS, seed=1)
# Steps of one to 45 tokens: few rows go another way than many.
STEPS = [*mixed_schedule((12,), chunk=5, num_decodes=2), [(1, 3)], [(1, 36)], [(1, 1)]]
REASON = why_not_packable(torch.float32) or (None if load_library().library else "no native library was built")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def rounded(weight: Tensor) -> Tensor:
    """The same weights as whole multiples, at most 127, of one number for each output."""
    step = weight.double().abs().amax(1, keepdim=True) / 127
    return ((weight.double() / step).round() * step).to(weight.dtype)


def with_rounded_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers, a tied head among them, have rounded weights; its embedding is as it was."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(rounded(module.weight.detach()), requires_grad=False)
    return twin


def run(runner: ModelRunner) -> list[Tensor]:
    return paged_logits(runner, TOKENS, STEPS)


def assert_rounded(runner: ModelRunner, model: PreTrainedModel, what: str, *, relative: float = 1e-4) -> None:
    assert_close(run(runner), plain_logits(with_rounded_weights(model), TOKENS), relative=relative, what=what)


@pytest.mark.parametrize("options", [{"fuse": True}, {"fuse": False}, {"tier": "dense"}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_int8_gives_the_logits_of_the_rounded_weights_and_not_the_models(options: dict[str, object], tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    runner = ModelRunner(model, block_size=4, pack_linears="int8", **options)  # type: ignore[arg-type]
    assert len(runner.packing.packed) == sum(isinstance(module, nn.Linear) for module in model.modules())
    assert bool(runner.fusion.layers) == ("fuse" in options and options["fuse"] is True)
    assert_rounded(runner, model, str(options))
    with pytest.raises(AssertionError):
        assert_close(run(runner), plain_logits(model, TOKENS), relative=1e-4, what="the model itself")


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])  # with biases; with none but a head, the other layers being no Linear
def test_int8_leaves_biases_and_other_modules_as_they_are(name: str) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in (each for key, each in model.named_parameters() if key.endswith("bias")):
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    assert_rounded(ModelRunner(model, block_size=4, pack_linears="int8"), model, name)


def test_int8_in_bfloat16_is_as_near_as_bfloat16_is() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    assert_rounded(ModelRunner(model, block_size=4, pack_linears="int8"), model, "bfloat16", relative=3e-2)


def test_what_rounding_loses_is_reported() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    runner = ModelRunner(model, block_size=4, pack_linears="int8")
    packing, check = runner.packing, runner.report.int8
    groups = [*packing.merged, *((name,) for name in packing.packed if not any(name in group for group in packing.merged))]
    weights = [torch.cat([model.get_submodule(name).weight.detach() for name in group]) for group in groups]
    worst = max(float((weight - rounded(weight)).norm() / weight.norm()) for weight in weights)
    assert packing.weight_error == pytest.approx(worst, rel=1e-4)
    assert check is not None
    assert 1e-4 < check.max_relative_error < 0.1
    assert 0.5 < check.argmax_agreement <= 1
    assert runner.report.max_relative_error < 1e-5  # seen with exact copies
    exact = ModelRunner(model, block_size=4, pack_linears=True)
    assert (exact.packing.weight_error, exact.report.int8) == (None, None)
    num_weights = sum(weight.numel() for weight in weights)
    assert packing.nbytes >= exact.packing.nbytes + num_weights


def test_int8_model_is_its_own_between_steps_and_after_close() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    modules, state = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    want = plain_logits(model, TOKENS)
    runner = ModelRunner(model, block_size=4, pack_linears="int8")
    run(runner)
    for _ in range(2):
        assert all(torch.equal(ours, own) for ours, own in zip(plain_logits(model, TOKENS), want, strict=True))
        assert {name: id(module) for name, module in model.named_modules()} == {name: id(module) for name, module in modules.items()}
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        runner.close()
    assert runner.packing.nbytes == 0
    assert_close(run(ModelRunner(model, block_size=4)), want, relative=1e-4, what="run again without")


def test_weights_changed_between_steps_are_rounded_again() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears="int8")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.add_(torch.linspace(-0.1, 0.1, module.weight.shape[1]))
    assert_rounded(runner, model, "changed")


def test_layer_whose_weights_are_not_finite_any_more_is_reported_plain() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears="int8")
    layer = "model.layers.0.self_attn.o_proj"
    with torch.no_grad():
        model.get_submodule(layer).weight[0, 0] = float("inf")
    run(runner)
    assert "not finite" in runner.packing.plain[layer]
    assert layer not in runner.packing.packed


def test_output_whose_weights_are_all_but_zero_is_rounded_to_zero() -> None:
    result = quantised(torch.tensor([[0.0, 0.0], [1e-43, -1e-44], [3.0, -1.5]]))
    assert result.weight.tolist() == [[0, 0], [0, 0], [127, -64]]
    assert (result.scale > 0).all()


def test_int8_without_the_native_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.packed_linears.load_library", lambda: Loaded(None, ("avx2: was not built",)))
    with pytest.raises(ConfigError, match=r"pack_linears is 'int8' but cannot be done: the native library is missing: avx2: was not built"):
        ModelRunner(tiny_model("llama"), block_size=4, pack_linears="int8")


def test_int8_without_the_operators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.linear_products._OPERATORS", ("_nonesuch",))
    with pytest.raises(ConfigError, match=r"'int8' but cannot be done: .*no operator mkldnn::_nonesuch"):
        ModelRunner(tiny_model("llama"), block_size=4, pack_linears="int8")


def test_int8_of_another_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int8' but cannot be done: .*float64"):
        ModelRunner(tiny_model("llama").to(torch.float64), block_size=4, pack_linears="int8")


class QuantisedLinear(nn.Linear):
    """As libraries for quantisation make them: a subclass that computes something else than the weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, rounded(self.weight))


class QuantisedParameter(nn.Parameter):
    """As torchao makes them: the layer is a plain Linear, its weight is not."""


@pytest.mark.parametrize("kind", ["modules", "parameters"])
def test_int8_of_layers_that_are_quantised_already_is_refused(kind: str) -> None:
    model = tiny_model("llama")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if kind == "modules":
                module.__class__ = QuantisedLinear
            else:
                module.weight = QuantisedParameter(module.weight.detach(), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'int8' but cannot be done: the model has no linear layer that can be packed"):
        ModelRunner(model, block_size=4, pack_linears="int8")


def test_product_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = Int8Product.__call__
    monkeypatch.setattr(Int8Product, "__call__", lambda self, x, added=None: multiply(self, x, added) * 1.01)
    with pytest.raises(ConfigError, match=r"no layer's weights could be rounded: .* differs from F.linear"):
        ModelRunner(tiny_model("llama"), block_size=4, pack_linears="int8")


def test_int8_inside_generate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pack_linears is 'int8': inside generate\(\) it must be True, False or 'auto'"):
        CachePool(tiny_model("llama"), pack_linears="int8")  # type: ignore[arg-type]


def test_greedy_tokens_are_those_of_generate_with_rounded_weights() -> None:
    model = tiny_model("llama", tie_word_embeddings=True, hidden_size=64, num_hidden_layers=3)
    prompts = random_tokens((3, 9, 21, 34), seed=5)
    twin = with_rounded_weights(model)

    def generated(one: PreTrainedModel) -> list[list[int]]:
        return [one.generate(row[None], max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(row) :].tolist() for row in prompts]

    want = generated(twin)
    assert want != generated(model)  # else this would show nothing
    with LLM(model, block_size=4, num_blocks=40, max_num_batched_tokens=13, pack_linears="int8", check="audit") as llm:
        work = [{"prompt_token_ids": row.tolist()} for row in prompts]
        outputs = llm.generate(work, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    for number, (output, tokens) in enumerate(zip(outputs, want, strict=True)):
        got = list(output.outputs[0].token_ids)
        assert got == tokens, f"prompt {number}: {got} instead of {tokens}"
