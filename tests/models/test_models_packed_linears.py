"""Packed linear layers in a model: the same tokens, the model untouched between steps, and every layer left plain with its reason."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from models_support import assert_close, mixed_schedule, paged_logits, plain_logits, random_tokens
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from pagedkv import LLM, SamplingParams
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.models.linear_products import why_not_packable
from pagedkv.models.packed_linears import PackedLinear
from pagedkv.testing.models import TINY_MODELS, tiny_model

LENS = (12, 20)
TOKENS = random_tokens(LENS, seed=1)
STEPS = mixed_schedule(LENS, chunk=5, num_decodes=2)
WIDE = {"hidden_size": 512, "intermediate_size": 256}  # large enough for "auto"
REASON = why_not_packable(torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" finds worth packing depends on the number of threads, which is one in tests."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def run(runner: ModelRunner) -> list[Tensor]:
    return paged_logits(runner, TOKENS, STEPS)


def assert_right(runner: ModelRunner, model: PreTrainedModel, what: str) -> None:
    assert_close(run(runner), plain_logits(model, TOKENS), relative=1e-4, what=what)


def attention(model: PreTrainedModel, layer: int = 0) -> nn.Module:
    module = model.get_decoder().layers[layer].self_attn
    assert isinstance(module, nn.Module)
    return module


def during_a_step(runner: ModelRunner, act: Callable[[], object]) -> None:
    """Run steps, and once, in the midst of the first, ``act``."""
    done = []

    def intrude(module: nn.Module, arguments: object) -> None:
        if not done:
            done.append(True)
            act()

    handle = runner.model.get_decoder().layers[1].register_forward_pre_hook(intrude)
    run(runner)
    handle.remove()
    assert done


@pytest.mark.parametrize("name", TINY_MODELS)
def test_packed_layers_give_the_logits_of_the_model(name: str) -> None:
    model = tiny_model(name)
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    assert runner.packing.packed
    assert runner.packing.reason is None
    assert_right(runner, model, name)


def test_layers_that_read_one_input_are_merged_and_no_others() -> None:
    packing = ModelRunner(tiny_model("llama", num_hidden_layers=1), block_size=4, pack_linears=True).packing
    layer = "model.layers.0"
    assert packing.merged == (
        tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
    )
    assert set(packing.packed) == {name for group in packing.merged for name in group} | {
        f"{layer}.self_attn.o_proj",
        f"{layer}.mlp.down_proj",
        "lm_head",
    }
    assert not packing.plain


def test_copies_of_all_layers_and_of_a_tied_head_once_are_counted() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    assert runner.packing.packed.count("lm_head") == 1
    assert runner.packing.nbytes == sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    assert_right(runner, model, "tied")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    assert_right(runner, model, "tied and changed through the embedding")


def test_linear_that_parents_share_is_packed_once_and_right() -> None:
    model = tiny_model("llama")
    for name in ("q_proj", "k_proj", "o_proj"):
        setattr(attention(model, 1), name, getattr(attention(model, 0), name))
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    assert runner.packing.packed.count("model.layers.0.self_attn.q_proj") == 1
    assert "model.layers.1.self_attn.q_proj" not in runner.packing.packed
    assert_right(runner, model, "shared")


def test_auto_packs_what_is_large_and_says_why_not_the_rest() -> None:
    model = tiny_model("llama", **WIDE)
    runner = ModelRunner(model, block_size=4)
    packing = runner.packing
    assert {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"} <= set(packing.packed)
    assert "packing pays from" in packing.plain["lm_head"]
    assert_right(runner, model, "auto")
    tiny = ModelRunner(tiny_model("llama"), block_size=4).packing
    assert not tiny.packed
    assert "packing pays from" in str(tiny.reason)


def test_auto_with_one_thread_packs_only_what_gains_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for capability, packs in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        assert bool(ModelRunner(tiny_model("llama", **WIDE), block_size=4).packing.packed) is packs


def test_false_packs_nothing() -> None:
    packing = ModelRunner(tiny_model("llama", **WIDE), block_size=4, pack_linears=False).packing
    assert (packing.packed, packing.merged, packing.nbytes, packing.reason) == ((), (), 0, "pack_linears is False")


@pytest.mark.parametrize("wanted", ["yes", None, 2, 1])
def test_other_values_of_the_option_are_refused(wanted: object) -> None:
    with pytest.raises(ConfigError, match="must be True, False, 'auto' or 'int8'"):
        ModelRunner(tiny_model("llama"), block_size=4, pack_linears=wanted)  # type: ignore[arg-type]


def test_true_where_it_is_impossible_is_refused_and_auto_runs_plain() -> None:
    model = tiny_model("llama").to(torch.float64)
    with pytest.raises(ConfigError, match=r"pack_linears is True but cannot be done: .*float64"):
        ModelRunner(model, block_size=4, pack_linears=True)
    packing = ModelRunner(model, block_size=4).packing
    assert not packing.packed
    assert "float64" in str(packing.reason)


def test_torch_without_the_operators_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.linear_products._OPERATORS", ("_nonesuch",))
    model = tiny_model("llama", **WIDE)
    runner = ModelRunner(model, block_size=4)
    assert "no operator mkldnn::_nonesuch" in str(runner.packing.reason)
    assert_right(runner, model, "without operators")


def test_copies_that_free_memory_does_not_hold_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.packed_linears.free_memory", lambda device: 1_000_000)
    packing = ModelRunner(tiny_model("llama", **WIDE), block_size=4).packing
    assert not packing.packed
    assert "more than 50% of the 1,000,000 that are free" in str(packing.reason)


def test_wrong_product_falls_back_under_auto_and_refuses_under_true(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: PackedLinear, input: Tensor) -> Tensor:
        return nn.Linear.forward(self, input) * 1.1

    monkeypatch.setattr(PackedLinear, "forward", wrong)
    model = tiny_model("llama", **WIDE)
    runner = ModelRunner(model, block_size=4, fuse=False)
    assert not runner.packing.packed
    assert "self-check failed" in str(runner.packing.reason)
    assert_right(runner, model, "fallen back")
    with pytest.raises(UnsupportedModelError, match="self-check failed"):
        ModelRunner(model, block_size=4, pack_linears=True, fuse=False)


def hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, inputs, output: output * 2)


def forward_replaced(linear: nn.Linear) -> None:
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 2  # type: ignore[method-assign]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrised(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "weight", Doubled())


@pytest.mark.parametrize(
    ("make_special", "reason"), [(hooked, "hooks"), (forward_replaced, "replaced"), (parametrised, "not a plain Linear")]
)
def test_layer_that_is_more_than_a_product_stays_plain(make_special: Callable[[nn.Linear], None], reason: str) -> None:
    model = tiny_model("llama")
    make_special(attention(model).k_proj)
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    assert reason in runner.packing.plain["model.layers.0.self_attn.k_proj"]
    assert ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj") in runner.packing.merged
    assert_right(runner, model, reason)


@pytest.mark.parametrize("make_special", [hooked, forward_replaced, parametrised])
def test_layer_made_special_after_packing_is_respected(make_special: Callable[[nn.Linear], None]) -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    make_special(attention(model).k_proj)
    assert_right(runner, model, "special")


def test_hook_of_a_layer_is_told_the_layer_itself() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    told: list[nn.Module] = []
    attention(model).q_proj.register_forward_hook(lambda module, inputs, output: told.append(module))
    run(runner)
    assert told
    assert all(module is attention(model).q_proj for module in told)


def test_hook_on_all_modules_is_told_the_models_own() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    told: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: told.append(module))
    try:
        run(runner)
    finally:
        handle.remove()
    own = {id(module) for module in model.modules()}
    assert told
    assert all(id(module) in own for module in told)


def test_layer_replaced_after_packing_is_the_one_that_runs() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    attention(model).v_proj = copy.deepcopy(attention(model, 1).v_proj)
    assert_right(runner, model, "replaced")
    assert type(attention(model).v_proj) is nn.Linear


def test_code_that_reads_weights_and_calls_layers_twice_is_right() -> None:
    model = tiny_model("llama")

    def read(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = output[0].clone()
        x = x + module.q_proj(x) + nn.functional.linear(x, module.q_proj.weight)
        return (x + module.q_proj(x.mul_(0.5)), *output[1:])

    for layer in range(2):
        attention(model, layer).register_forward_hook(read)
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    assert_right(runner, model, "read")


@pytest.mark.parametrize("pack_linears", [True, False])
def test_model_is_its_own_between_steps_and_after_close(pack_linears: bool) -> None:
    model = tiny_model("llama").requires_grad_(True)
    modules, state = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    runner = ModelRunner(model, block_size=4, pack_linears=pack_linears)
    run(runner)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(module) for name, module in model.named_modules()} == {name: id(module) for name, module in modules.items()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    copied = copy.deepcopy(model)
    assert torch.equal(plain_logits(copied, TOKENS)[0], plain_logits(model, TOKENS)[0])
    model(input_ids=TOKENS[0][None], labels=TOKENS[0][None]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    runner.close()
    assert runner.packing.nbytes == 0
    assert {name: id(module) for name, module in model.named_modules()} == {name: id(module) for name, module in modules.items()}
    with pytest.raises(ClosedError):
        run(runner)


def test_model_moved_to_another_dtype_between_steps_is_not_answered_by_old_weights() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    model.to(torch.float64)
    with pytest.raises(InvalidRequestError, match="float64"):  # of K, for the pool
        run(runner)
    model.to(torch.float32)
    assert_right(runner, model, "moved and back")


def test_weights_trained_between_steps_are_used() -> None:
    model = tiny_model("llama").requires_grad_(True)
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    before = run(runner)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=TOKENS[0][None], labels=TOKENS[0][None]).loss.backward()
    optimiser.step()
    assert not torch.allclose(run(runner)[0], before[0], atol=1e-3)
    assert_right(runner, model, "trained")
    assert len(runner.packing.packed) == 15


def test_layer_whose_weights_turn_bad_is_reported_plain() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    with torch.no_grad():
        attention(model).o_proj.weight[0, 0] = float("nan")
    run(runner)
    assert "differs from F.linear" in runner.packing.plain["model.layers.0.self_attn.o_proj"]
    assert "model.layers.0.self_attn.o_proj" not in runner.packing.packed


def test_another_thread_sees_the_model_as_it_is_during_a_step() -> None:
    model = tiny_model("llama").requires_grad_(True)
    runner = ModelRunner(model, block_size=4, pack_linears=True, fuse=False)
    want, state = plain_logits(model, TOKENS)[0], model.state_dict()
    seen: list[object] = []

    def use() -> None:
        assert isinstance(attention(model).q_proj, PackedLinear)
        assert attention(model).q_proj.weight is state_weight
        seen.append(plain_logits(model, TOKENS)[0])
        seen.append(model.state_dict())
        seen.append(copy.deepcopy(model))
        seen.append(pickle.loads(pickle.dumps(attention(model).q_proj)))
        model(input_ids=TOKENS[0][None], labels=TOKENS[0][None]).loss.backward()
        seen.append(attention(model).q_proj.weight.grad)

    def in_a_thread() -> None:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    state_weight = attention(model).q_proj.weight
    during_a_step(runner, in_a_thread)
    logits, other_state, copied, pickled, gradient = seen
    assert isinstance(logits, Tensor)
    assert torch.equal(logits, want)
    assert isinstance(other_state, dict)
    assert list(other_state) == list(state)
    assert isinstance(copied, PreTrainedModel)
    assert {type(module) for module in copied.modules()} == {type(module) for module in model.modules()}
    assert torch.equal(plain_logits(copied, TOKENS)[0], want)
    assert type(pickled) is nn.Linear
    assert isinstance(gradient, Tensor)
    assert gradient.any()


def test_gradients_within_a_step_are_recorded_by_the_layer_itself() -> None:
    model = tiny_model("llama").requires_grad_(True)
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    results: list[Tensor] = []

    def act() -> None:
        with torch.enable_grad():
            results.append(attention(model).q_proj(torch.ones(1, 1, 32)))

    during_a_step(runner, act)
    assert results[0].requires_grad


def test_step_that_fails_puts_the_layers_back() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        during_a_step(runner, fail)
    assert type(attention(model).q_proj) is nn.Linear


def test_layer_replaced_during_a_step_is_left_in_place() -> None:
    model = tiny_model("llama")
    runner = ModelRunner(model, block_size=4, pack_linears=True)
    other = copy.deepcopy(attention(model).q_proj)
    during_a_step(runner, lambda: setattr(attention(model), "q_proj", other))
    assert attention(model).q_proj is other


def test_several_runners_of_one_model_take_turns_and_close_apart() -> None:
    model = tiny_model("llama")
    first, plain, second = (ModelRunner(model, block_size=4, pack_linears=wanted) for wanted in (True, False, True))
    for runner in (first, plain, second, first):
        assert_right(runner, model, "in turns")
    first.close()
    assert_right(second, model, "after the other was closed")
    with torch.no_grad():
        attention(model).q_proj.weight.mul_(2)
    for runner in (plain, second):
        assert_right(runner, model, "changed")


def test_autocast_around_a_step_leaves_the_layers_to_themselves() -> None:
    model = tiny_model("llama")
    packed, plain = (ModelRunner(model, block_size=4, pack_linears=wanted) for wanted in (True, False))
    batch = [row[:4] for row in TOKENS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = []
        for runner in (packed, plain):
            try:
                results.append(str(paged_logits(runner, batch, [[(0, 4), (1, 4)]])))
            except InvalidRequestError as error:  # K/V would be of another dtype than the pool
                results.append(str(error))
    assert results[0] == results[1]


def test_compiled_model_is_left_alone() -> None:
    model = tiny_model("llama")
    model.compile(backend="eager")
    torch.compiler.set_stance("force_eager")  # what is made of it is not the matter here, and takes half a minute
    try:
        packing = ModelRunner(model, block_size=4).packing
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
    assert "compiled" in str(packing.reason)


def test_greedy_tokens_are_those_of_generate() -> None:
    model = tiny_model("llama", **WIDE)
    want = [model.generate(row[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(row) :].tolist() for row in TOKENS]
    with LLM(model, block_size=4, pack_linears=True) as llm:
        assert llm.runner.packing.packed
        prompts = [{"prompt_token_ids": row.tolist()} for row in TOKENS]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    for number, (output, tokens) in enumerate(zip(outputs, want, strict=True)):
        got = list(output.outputs[0].token_ids)
        assert got == tokens, f"prompt {number}: {got} instead of {tokens}"
