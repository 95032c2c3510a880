"""Norms, MLPs and rotations as one operation each: proven or left alone, the same tokens, and the model untouched between steps."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_support import assert_close, mixed_schedule, paged_logits, plain_logits, random_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from pagedkv import LLM, SamplingParams
from pagedkv.attention.native.library import load_library
from pagedkv.attention.native.operations import Operations
from pagedkv.errors import ConfigError, UnsupportedModelError
from pagedkv.models import CACHE_ARGUMENT, ModelRunner, fused_layers, fused_modules, fused_rotation
from pagedkv.models.attention_adapters import AttentionAdapters
from pagedkv.models.bridge import attention_configs
from pagedkv.models.call import ModelCall
from pagedkv.models.linear_products import why_not_packable
from pagedkv.models.packed_linears import PackedLinears
from pagedkv.models.probe import probe_packed
from pagedkv.testing.models import TINY_MODELS, tiny_model

LENS = (12, 20)
TOKENS = random_tokens(LENS, seed=1)
STEPS = mixed_schedule(LENS, chunk=5, num_decodes=2)
LIBRARY = load_library().library
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native library was built")

LAYERS = ("llama", "qwen2")
REASON = why_not_packable(torch.float32)
needs_packing = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# Norms and MLPs per layer of two, the final norm, and whether the rotation is the usual one.
EXPECTED = {
    "llama": (7, True),
    "mistral": (7, True),
    "qwen2": (7, True),
    "qwen3": (11, True),
    "gemma2": (11, True),
    "gemma3": (15, True),
    "phi": (0, True),
    "mixtral": (5, True),
    "gpt_oss": (5, False),
}


def operations() -> Operations:
    assert LIBRARY is not None
    return Operations(LIBRARY)


def assert_right(runner: ModelRunner, model: PreTrainedModel, what: str) -> None:
    assert_close(paged_logits(runner, TOKENS, STEPS), plain_logits(model, TOKENS), relative=1e-4, what=what)


def during_a_step(runner: ModelRunner, act: Callable[[], object]) -> None:
    """Run steps, and once, in the midst of the first, ``act``."""
    done = []

    def intrude(module: nn.Module, arguments: object) -> None:
        if not done:
            done.append(True)
            act()

    handle = runner.model.get_decoder().layers[1].self_attn.register_forward_pre_hook(intrude)
    paged_logits(runner, TOKENS, STEPS)
    handle.remove()
    assert done


@pytest.mark.parametrize("name", TINY_MODELS)
def test_fuse_finds_what_there_is_and_logits_are_the_models_own(name: str) -> None:
    model = tiny_model(name)
    modules = dict(model.named_modules())
    runner = ModelRunner(model)
    number, rotates = EXPECTED.get(name, (0, False))
    assert len(runner.fusion.modules) == number
    assert bool(runner.fusion.rotations) == rotates
    assert (runner.fusion.reason is None) == bool(number or rotates)
    assert_right(runner, model, name)
    assert dict(model.named_modules()) == modules


def test_fuse_weights_and_numbers_changed_between_steps_are_used() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, fuse=True)
    layer = model.get_decoder().layers[0]
    before = paged_logits(runner, TOKENS, STEPS)
    layer.input_layernorm.weight.data.mul_(1.5)
    layer.input_layernorm.variance_epsilon = 0.3
    layer.mlp.up_proj.weight.data.mul_(0.5)
    assert_right(runner, model, "after a change in place")
    layer.post_attention_layernorm.weight = nn.Parameter(torch.rand_like(layer.post_attention_layernorm.weight))
    layer.mlp.act_fn = nn.ReLU()
    assert_right(runner, model, "after another parameter and another activation")
    assert not torch.allclose(before[0], paged_logits(runner, TOKENS, STEPS)[0], rtol=1e-3)


def test_fuse_hooks_and_replaced_modules_are_respected() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, fuse=True)
    layer = model.get_decoder().layers[0]
    served: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: served.append(module))
        for module in (layer.input_layernorm, layer.mlp, layer.mlp.up_proj, layer.mlp.act_fn)
    ]
    paged_logits(runner, TOKENS, STEPS)
    assert served == [layer.input_layernorm, layer.mlp.act_fn, layer.mlp.up_proj, layer.mlp] * len(STEPS)
    for handle in handles:
        handle.remove()

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer.input_layernorm = Doubled()
    layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, Doubled())
    assert_right(runner, model, "with a norm and a product of the user's own")


@pytest.mark.parametrize("packed", [False, True])
def test_fuse_a_model_used_by_others_during_a_step_is_itself(packed: bool) -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, fuse=True, pack_linears=packed and REASON is None)
    expected = plain_logits(model, TOKENS)
    seen: dict[str, object] = {}

    def look() -> None:
        norm = model.get_decoder().layers[0].input_layernorm
        layer = model.get_decoder().layers[0]
        seen["isinstance"] = isinstance(norm, modeling_llama.LlamaRMSNorm) and isinstance(layer, modeling_llama.LlamaDecoderLayer)
        seen["layer"] = type(copy.deepcopy(layer))
        seen["copied"] = type(copy.deepcopy(norm))
        seen["pickled"] = type(pickle.loads(pickle.dumps(norm)))
        seen["names"] = list(model.state_dict())
        thread = threading.Thread(target=lambda: seen.update(logits=plain_logits(model, TOKENS[:1])))
        thread.start()
        thread.join()

    during_a_step(runner, look)
    assert seen["isinstance"]
    assert seen["layer"] is modeling_llama.LlamaDecoderLayer
    assert seen["copied"] is seen["pickled"] is modeling_llama.LlamaRMSNorm
    assert seen["names"] == list(model.state_dict())
    logits = seen["logits"]
    assert isinstance(logits, list)
    assert torch.equal(logits[0], expected[0])


def test_fuse_an_error_in_a_step_puts_everything_back() -> None:
    model = tiny_model("llama")
    modules, function = dict(model.named_modules()), modeling_llama.apply_rotary_pos_emb
    runner = ModelRunner(model, fuse=True)

    def fail() -> None:
        assert modeling_llama.apply_rotary_pos_emb is not function
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        during_a_step(runner, fail)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert dict(model.named_modules()) == modules


def test_fuse_a_rotation_that_was_replaced_is_left_and_two_models_share_one() -> None:
    first, second = tiny_model("llama"), tiny_model("llama", seed=1)
    runners = ModelRunner(first, fuse=True), ModelRunner(second, fuse=True)
    during_a_step(runners[0], lambda: assert_right(runners[1], second, "within a step of another"))
    function = modeling_llama.apply_rotary_pos_emb
    calls = []

    def own(*args: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return function(*args)

    try:
        modeling_llama.apply_rotary_pos_emb = own
        assert_right(runners[0], first, "with a rotation of the user's own")
        assert modeling_llama.apply_rotary_pos_emb is own
    finally:
        modeling_llama.apply_rotary_pos_emb = function
    assert calls


class Norm(nn.Module):
    """A root mean square norm with one thing about it changed."""

    def __init__(self, compute: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-5
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.eps)


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


ALMOST_NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "its mean is subtracted": lambda x, w, eps: w * rms(x - x.mean(-1, keepdim=True), eps),
    "its weight is not used": lambda x, w, eps: rms(x, eps),
    "its weight is squared": lambda x, w, eps: w * w * rms(x, eps),
    "its epsilon is not what it says": lambda x, w, eps: w * rms(x, 2 * eps),
    "epsilon outside of the root": lambda x, w, eps: w * x / (x.square().mean(-1, keepdim=True).sqrt() + eps),
    "it returns two tensors": lambda x, w, eps: (w * rms(x, eps), x),  # type: ignore[dict-item,return-value]
    "it fails": lambda x, w, eps: x @ w[:3],
}


@pytest.mark.parametrize("what", ALMOST_NORMS)
def test_find_fusable_a_norm_that_only_looks_like_one_is_left_alone(what: str) -> None:
    right = nn.ModuleDict({"norm": Norm(lambda x, w, eps: w * rms(x, eps))})
    assert [entry.name for entry in fused_modules.find_fusable(right, operations())] == ["norm"]
    almost = nn.ModuleDict({"norm": Norm(ALMOST_NORMS[what])})
    assert fused_modules.find_fusable(almost, operations()) == []


class Mlp(nn.Module):
    """A gated MLP with one thing about it changed."""

    def __init__(self, compute: Callable[[Mlp, Tensor], Tensor], activation: nn.Module, sizes: tuple[int, int] = (16, 24)) -> None:
        super().__init__()
        outer, inner = sizes
        self.up, self.down, self.gate = nn.Linear(outer, inner), nn.Linear(inner, outer), nn.Linear(outer, inner)
        self.function = activation
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def gated(mlp: Mlp, x: Tensor) -> Tensor:
    result: Tensor = mlp.down(mlp.function(mlp.gate(x)) * mlp.up(x))
    return result


ALMOST_MLPS: dict[str, Mlp] = {
    "its activation is another": Mlp(gated, nn.ReLU()),
    "its activation is the exact GELU": Mlp(gated, nn.GELU()),
    "its activation has a weight": Mlp(gated, nn.PReLU()),
    "it adds where others multiply": Mlp(lambda mlp, x: mlp.down(mlp.function(mlp.gate(x)) + mlp.up(x)), nn.SiLU()),
    "it adds its input": Mlp(lambda mlp, x: x + gated(mlp, x), nn.SiLU()),
    "it reads its weights itself": Mlp(lambda mlp, x: torch.nn.functional.linear(x, mlp.gate.weight[:16]), nn.SiLU()),
}


@pytest.mark.parametrize("what", ALMOST_MLPS)
def test_find_fusable_an_mlp_that_only_looks_gated_is_left_alone(what: str) -> None:
    for sizes in ((16, 24), (16, 16)):
        for function in (nn.SiLU(), nn.GELU(approximate="tanh")):
            right = nn.ModuleDict({"mlp": Mlp(gated, function, sizes)})
            assert [entry.name for entry in fused_modules.find_fusable(right, operations())] == ["mlp"]
    assert fused_modules.find_fusable(nn.ModuleDict({"mlp": ALMOST_MLPS[what]}), operations()) == []


def test_find_rotations_another_pairing_of_the_halves_is_left_alone() -> None:
    model = nn.ModuleDict({"attention": modeling_gptj.GPTJMLP(8, modeling_gptj.GPTJConfig(n_embd=8))})
    assert callable(modeling_gptj.apply_rotary_pos_emb)
    assert fused_rotation.find_rotations(model, operations()) == []


def test_fuse_wrong_value_or_nothing_to_fuse_is_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match="fuse is 'yes': it must be True, False or 'auto'"):
        ModelRunner(model, fuse="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fuse is True but cannot be done: no module"):
        ModelRunner(model, fuse=True)
    assert ModelRunner(tiny_model("llama"), fuse=False).fusion.modules == ()


def test_fuse_without_a_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.attention.native.library.BUILDS", ())
    reason = ModelRunner(tiny_model("llama"), backend="torch").fusion.reason
    assert reason is not None
    assert reason.startswith("the native library is missing")


@pytest.mark.parametrize("packed", [False, "auto"])
def test_fuse_an_operation_that_is_wrong_is_given_up_at_load(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    model = tiny_model("llama")
    right = Operations.norm
    # Right for the few rows of the proof, wrong after: what only the self-check can see.
    monkeypatch.setattr(Operations, "norm", lambda ops, x, w, e, f: right(ops, x, w, e, f) * (1 if x.numel() <= 3 * x.shape[-1] else 1.5))
    runner = ModelRunner(model, fuse="auto", pack_linears=packed)
    assert runner.fusion.modules == ()
    assert str(runner.fusion.reason).startswith("the self-check failed with it")
    assert_right(runner, model, "without what was given up")
    with pytest.raises(Exception, match="differ"):
        ModelRunner(model, fuse=True, pack_linears=packed)


def test_fuse_autocast_or_hooks_on_every_module_leave_the_model_alone() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, fuse=True)
    served: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: served.append(module))
    paged_logits(runner, TOKENS, STEPS)
    handle.remove()
    assert model.get_decoder().norm in served


def test_fuse_half_precision_rounds_where_the_model_does() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    runners = [ModelRunner(model, fuse=fuse, pack_linears=False) for fuse in (True, False)]
    ours, theirs = (paged_logits(runner, TOKENS, STEPS) for runner in runners)
    for a, b in zip(ours, theirs, strict=True):
        assert (a != b).float().mean() < 0.2
        assert_close([a], [b], relative=1e-2, what="bfloat16")


@needs_packing
@pytest.mark.parametrize("name", TINY_MODELS)
def test_fuse_layers_of_packed_products_give_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    modules = dict(model.named_modules())
    runner = ModelRunner(model, pack_linears=True)
    assert bool(runner.fusion.layers) == (name in LAYERS)
    assert_right(runner, model, name)
    assert dict(model.named_modules()) == modules


@needs_packing
@pytest.mark.parametrize("name", LAYERS)
def test_generate_fused_layers_under_pressure_give_the_tokens_of_transformers(name: str) -> None:
    model = tiny_model(name)
    prompts = [row.tolist() for row in random_tokens((5, 17, 30, 9), seed=4)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        expected.append(alone[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for size, budget, num_blocks in ((1, 7, 60), (4, 64, 16), (16, 17, 6)):
        with LLM(
            model, fuse=True, pack_linears=True, block_size=size, num_blocks=num_blocks, max_num_batched_tokens=budget, max_num_seqs=4
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm.statistics().num_preemptions > 0
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected, f"block size {size}, budget {budget}"


@needs_packing
@pytest.mark.parametrize(
    "path", ["", "self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.down_proj", "mlp.act_fn", "post_attention_layernorm"]
)
def test_fuse_layers_a_hook_anywhere_in_a_layer_is_served(path: str) -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, fuse=True, pack_linears=True)
    assert len(runner.fusion.layers) == 2
    module = model.get_decoder().layers[1].get_submodule(path)
    served: list[nn.Module] = []
    handle = module.register_forward_hook(lambda module, inputs, output: served.append(module))
    assert_right(runner, model, path)
    assert served == [module] * (len(STEPS) + len(TOKENS))
    handle.remove()
    assert_right(runner, model, path)
    assert len(served) == len(STEPS) + len(TOKENS)


@needs_packing
def test_fuse_layers_what_was_changed_between_steps_is_used() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, fuse=True, pack_linears=True)
    layer = model.get_decoder().layers[0]
    layer.self_attn.scaling *= 0.5
    layer.input_layernorm.variance_epsilon = 0.3
    layer.post_attention_layernorm.weight.data.mul_(2)
    layer.self_attn.v_proj.weight.data.mul_(3)
    assert_right(runner, model, "numbers and weights in place")
    layer.self_attn.k_proj.bias = nn.Parameter(torch.ones(layer.self_attn.k_proj.out_features))
    layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Tanh())
    assert_right(runner, model, "a bias that was not there, and a module of the user's own")
    layer.self_attn.attention_dropout = 0.5
    layer.self_attn.train()
    with pytest.raises(UnsupportedModelError, match="drops attention weights"):
        paged_logits(runner, TOKENS, STEPS)
    layer.self_attn.eval()
    layer.post_attention_layernorm.forward = lambda x: x
    assert_right(runner, model, "a forward of the user's own")
    layer.input_layernorm = nn.Identity()
    model.get_decoder().layers[1].post_attention_layernorm.weight = nn.Parameter(torch.ones(1))
    assert_right(runner, model, "no norm, and a weight of another shape")


class Layer(nn.Module):
    """A decoder layer with one thing about it changed."""

    def __init__(self, layer: nn.Module, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.before, self.after = (
            layer.self_attn,
            layer.mlp,
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )
        self.compute = compute

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        return self.compute(self, hidden_states, kwargs)


def usual(layer: Layer, x: Tensor, kwargs: dict[str, object]) -> Tensor:
    x = x + layer.self_attn(hidden_states=layer.before(x), **kwargs)[0]
    result: Tensor = x + layer.mlp(layer.after(x))
    return result


def parallel(layer: Layer, x: Tensor, kwargs: dict[str, object]) -> Tensor:
    result: Tensor = x + layer.self_attn(hidden_states=layer.before(x), **kwargs)[0] + layer.mlp(layer.after(x))
    return result


ALMOST_LAYERS: dict[str, Callable[..., Tensor]] = {
    "its branches are parallel": parallel,
    "it scales a branch": lambda layer, x, kwargs: x + 0.9 * (usual(layer, x, kwargs) - x),
    "it has no second norm": lambda layer, x, kwargs: usual(layer, x, kwargs) + 0 * layer.mlp(x).sum() + layer.mlp(x),
    "it passes another mask": lambda layer, x, kwargs: usual(layer, x, {**kwargs, "attention_mask": None}),
    "it norms its input": lambda layer, x, kwargs: usual(layer, layer.before(x), kwargs),
}


@needs_packing
@pytest.mark.parametrize("what", ALMOST_LAYERS)
def test_fuse_layers_a_layer_that_only_looks_like_one_is_left_alone(what: str) -> None:
    for compute, number in ((usual, 1), (ALMOST_LAYERS[what], 0)):
        model = tiny_model("llama")
        layers = model.get_decoder().layers
        layers[1] = Layer(layers[1], compute).eval()
        runner = ModelRunner(model, fuse=True, pack_linears=True)
        assert len(runner.fusion.layers) == 1 + number
        assert_right(runner, model, what)


ALMOST_ATTENTIONS: dict[str, Callable[[Tensor, tuple[Tensor, None]], object]] = {
    "it doubles its result": lambda positions, output: (output[0] * 2, None),
    "it doubles its result far out": lambda positions, output: (output[0] * (1 + (positions > 16_384)[..., None]), None),
    "it returns weights": lambda positions, output: (output[0], output[0]),
}


@needs_packing
@pytest.mark.parametrize("what", [*ALMOST_ATTENTIONS, "its keys are doubled"])
def test_fuse_layers_an_attention_that_only_looks_like_one_is_left_alone(what: str) -> None:
    model = tiny_model("llama")
    attention = model.get_decoder().layers[1].self_attn

    class Changed(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            if what == "its keys are doubled":
                kwargs[CACHE_ARGUMENT] = Doubling(kwargs[CACHE_ARGUMENT])
                return super().forward(hidden_states, *args, **kwargs)
            positions = kwargs["position_ids"]
            assert isinstance(positions, Tensor)
            return ALMOST_ATTENTIONS[what](positions, super().forward(hidden_states, *args, **kwargs))

    attention.__class__ = Changed
    assert {layer.name for layer in layers_of(model)} == {"model.layers.0"}


@needs_packing
def test_fuse_layers_names_and_order_of_the_children_do_not_matter() -> None:
    model = tiny_model("llama")
    attention = model.get_decoder().layers[1].self_attn
    attention._modules = dict(reversed(attention._modules.items()))
    runner = ModelRunner(model, pack_linears=True)
    assert len(runner.fusion.layers) == 2
    assert_right(runner, model, "children in another order")


class Doubling:
    """A cache that stores twice what it is given."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **others: Any) -> tuple[Tensor, Tensor]:
        stored: tuple[Tensor, Tensor] = self.cache.update(2 * key, value, layer_idx, **others)
        return stored


def layers_of(model: PreTrainedModel) -> list[fused_layers.FusedLayer]:
    linears = PackedLinears(model, True)
    with linears.recording():
        probe_packed(ModelCall(model), AttentionAdapters(model))
    linears.pack()
    parts = fused_modules.find_fusable(model, operations())
    return fused_layers.find_layers(model, parts, linears, attention_configs(model), (8,), operations())
