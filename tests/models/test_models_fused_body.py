"""A model's body as one call: proven or left alone, the bits of its layers on their own, and what is changed meanwhile is used."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models_support import keys_of_a_dropped_storage, mixed_schedule, paged_logits, plain_logits, random_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from pagedkv import LLM, SamplingParams
from pagedkv.attention import Mask
from pagedkv.attention.cpu_backend import CpuBackend
from pagedkv.attention.native.library import load_library
from pagedkv.attention.native.products import PairProduct
from pagedkv.models import CACHE_ARGUMENT, ModelRunner
from pagedkv.models.body_proofs import as_body, reads_wanted_alone
from pagedkv.models.bridge import attention_configs
from pagedkv.models.fused_body import FusedBody
from pagedkv.models.fused_layers import FusedLayer
from pagedkv.models.step import Rows
from pagedkv.storage import BatchBuilder
from pagedkv.testing.models import tiny_model
from pagedkv.testing.plans import make_plan

LENS = (12, 20)
TOKENS = random_tokens(LENS, seed=1)
STEPS = mixed_schedule(LENS, chunk=5, num_decodes=4)
NUM_LAYERS = 3
LIBRARY = load_library().library
HAS_PAIRS = LIBRARY is not None and PairProduct.fits(torch.zeros(1, 32, dtype=torch.bfloat16), LIBRARY)
needs_pairs = pytest.mark.skipif(not HAS_PAIRS, reason="no build that multiplies pairs runs here")


def half_model(name: str = "llama") -> PreTrainedModel:
    return tiny_model(name, num_hidden_layers=NUM_LAYERS).to(torch.bfloat16)


def runner_of(model: PreTrainedModel, **options: Any) -> ModelRunner:
    return ModelRunner(model, **{"pack_linears": True, "fuse": True, **options})


def by_layers(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The same where the body runs as its own code says."""
    with monkeypatch.context() as patch:
        patch.setattr(FusedBody, "looked_at", lambda body: False)
        return run()


def assert_same(ours: list[Tensor], theirs: list[Tensor], what: str = "") -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), what


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each native call, whether it was one of a body."""
    seen: list[bool] = []
    former = CpuBackend.run_decoders

    def counting(self: CpuBackend, *args: Any, keeps_all: bool = True, **kwargs: Any) -> Tensor:
        seen.append(not keeps_all)
        return former(self, *args, keeps_all=keeps_all, **kwargs)

    monkeypatch.setattr(CpuBackend, "run_decoders", counting)
    return seen


@needs_pairs
@pytest.mark.parametrize("options", [{}, {"pack_linears": "int8"}])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_body_is_one_native_call_and_gives_the_bits_of_its_layers(
    name: str, options: dict[str, Any], calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half_model(name)
    modules = dict(model.named_modules())
    runner = runner_of(model, **options)
    assert runner.fusion.body == "model"
    calls.clear()
    ours = paged_logits(runner, TOKENS, STEPS)
    assert calls == [True] * len(STEPS)
    calls.clear()
    assert_same(ours, by_layers(monkeypatch, lambda: paged_logits(runner, TOKENS, STEPS)))
    assert not any(calls)
    assert dict(model.named_modules()) == modules
    if not options:
        exact = torch.cat(plain_logits(copy.deepcopy(model).float(), TOKENS))
        our_error, their_error = (float((torch.cat(each) - exact).norm() / exact.norm()) for each in (ours, plain_logits(model, TOKENS)))
        assert our_error <= 1.5 * their_error


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def replaced_weight(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp.gate_proj.weight = nn.Parameter(layer.mlp.gate_proj.weight.detach().flip(0))
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.detach() * 3)
    layer.self_attn.k_proj.bias = nn.Parameter(torch.ones(layer.self_attn.k_proj.out_features).bfloat16())


def all_scales(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5


def swapped_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


CHANGES: dict[str, tuple[bool, Callable[[Any], object]]] = {
    "weights in place": (True, lambda model: model.model.layers[2].self_attn.v_proj.weight.data.mul_(3)),
    "a norm in place": (True, lambda model: model.model.layers[1].post_attention_layernorm.weight.data.mul_(2)),
    "weights, a norm, and a bias in the place of others": (True, replaced_weight),
    "an epsilon": (True, lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 0.3)),
    "every scale": (True, all_scales),
    "one scale": (False, lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1)),
    "the final norm": (True, lambda model: setattr(model.model, "norm", nn.Sequential(model.model.norm, Doubled()))),
    "the embedding": (True, lambda model: setattr(model.model, "embed_tokens", nn.Sequential(model.model.embed_tokens, Doubled()))),
    "a hook on the embedding": (True, lambda model: model.model.embed_tokens.register_forward_hook(lambda _, args, output: output * 2)),
    "a hook on a layer": (False, lambda model: model.model.layers[1].register_forward_hook(lambda _, args, output: output * 2)),
    "a hook on a product": (
        False,
        lambda model: model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _, args, output: output * 2),
    ),
    "a hook on the body": (False, lambda model: model.model.register_forward_pre_hook(lambda _, args: None)),
    "a product of the user's own": (
        False,
        lambda model: setattr(model.model.layers[0].mlp, "down_proj", nn.Sequential(model.model.layers[0].mlp.down_proj, Doubled())),
    ),
    "two layers swapped": (False, swapped_layers),
    "another list of layers": (False, lambda model: setattr(model.model, "layers", nn.ModuleList(model.model.layers))),
    "an attribute of the body": (False, lambda model: setattr(model.model, "steering", 3)),
    "a setting that compares to no truth": (False, lambda model: setattr(model.config, "steering", torch.ones(2))),
    "a setting": (False, lambda model: setattr(model.config, "steering", True)),
    "a layer's own forward": (False, lambda model: setattr(model.model.layers[1].post_attention_layernorm, "forward", lambda x: x)),
}


@needs_pairs
@pytest.mark.parametrize("what", CHANGES)
def test_body_what_was_changed_between_steps_is_used(what: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    runner = runner_of(model)
    before = paged_logits(runner, TOKENS, STEPS)
    stays, change = CHANGES[what]
    change(model)
    calls.clear()
    ours = paged_logits(runner, TOKENS, STEPS)
    assert calls == [True] * len(STEPS) if stays else True not in calls, "the body stood in where it may not, or not where it may"
    assert_same(ours, by_layers(monkeypatch, lambda: paged_logits(runner, TOKENS, STEPS)), what)
    if what != "another list of layers":  # whose linear layers run as the model's own: other roundings
        assert torch.equal(ours[0], before[0]) == what.startswith(("an attribute", "a setting", "a hook on the body"))


class Backwards(nn.ModuleList):
    def __getitem__(self, index: Any) -> Any:
        return list(self._modules.values())[::-1] if isinstance(index, slice) else super().__getitem__(index)


@needs_pairs
def test_body_a_list_of_layers_that_became_another_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = half_model()
    runner = runner_of(model)
    before = paged_logits(runner, TOKENS, STEPS)
    model.model.layers.__class__ = Backwards
    ours = paged_logits(runner, TOKENS, STEPS)
    assert_same(ours, by_layers(monkeypatch, lambda: paged_logits(runner, TOKENS, STEPS)))
    assert not torch.equal(ours[0], before[0])


@needs_pairs
def test_body_another_function_of_its_modeling_file_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    model.config.sliding_window = 4
    runner = runner_of(model)
    before = paged_logits(runner, TOKENS, STEPS)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", create_sliding_window_causal_mask)
    ours = paged_logits(runner, TOKENS, STEPS)
    assert_same(ours, by_layers(monkeypatch, lambda: paged_logits(runner, TOKENS, STEPS)))
    assert not torch.equal(ours[0], before[0])


@needs_pairs
def test_body_whose_embedding_replaces_the_norm_in_the_step_uses_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = half_model()
    runner = runner_of(model)
    norms = [model.model.norm, nn.Sequential(model.model.norm, Doubled())]
    expected = [torch.cat(paged_logits(runner, TOKENS, STEPS)) * factor for factor in (1, 2)]
    for norm, wanted in zip(norms, expected, strict=True):
        handle = model.model.embed_tokens.register_forward_hook(lambda *_, norm=norm: setattr(model.model, "norm", norm))
        assert torch.equal(torch.cat(paged_logits(runner, TOKENS, STEPS)), wanted)
        handle.remove()


@needs_pairs
@pytest.mark.parametrize("what", ["nothing", "a hook", "a scale"])
def test_body_calls_its_embedding_once_a_step_whatever_runs(what: str) -> None:
    model: Any = half_model()
    runner = runner_of(model)
    seen: list[object] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(None))
    for _ in range(2):
        seen.clear()
        paged_logits(runner, TOKENS, STEPS)
        assert len(seen) == len(STEPS)
        if what == "a hook":
            model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output * 2)
        elif what == "a scale":
            model.model.layers[1].self_attn.scaling = 0.1


@needs_pairs
def test_body_a_change_taken_back_lets_it_stand_in_again(calls: list[bool]) -> None:
    model = half_model()
    runner = runner_of(model)
    before = paged_logits(runner, TOKENS, STEPS)
    handle = model.get_decoder().layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    paged_logits(runner, TOKENS, STEPS)
    handle.remove()
    calls.clear()
    assert_same(paged_logits(runner, TOKENS, STEPS), before)
    assert calls == [True] * len(STEPS)


@needs_pairs
def test_body_another_forward_of_its_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    runner = runner_of(model)
    before, former = paged_logits(runner, TOKENS, STEPS), LlamaModel.forward

    def doubling(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        output = former(self, *args, **kwargs)
        output["last_hidden_state"] = output.last_hidden_state * 2
        return output

    monkeypatch.setattr(LlamaModel, "forward", doubling)
    assert_same(paged_logits(runner, TOKENS, STEPS), [2 * row for row in before])


@needs_pairs
def test_body_weights_that_a_hook_changes_within_the_step_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    runner = runner_of(model)
    weight, steps = model.get_decoder().layers[2].mlp.down_proj.weight, [0]
    kept = weight.detach().clone()

    def change(*_: object) -> None:
        steps[0] += 1
        with torch.no_grad():
            weight.copy_(kept * (1 + steps[0] % 3))

    model.get_input_embeddings().register_forward_hook(change)
    ours = paged_logits(runner, TOKENS, STEPS)
    steps[0] = 0
    assert_same(ours, by_layers(monkeypatch, lambda: paged_logits(runner, TOKENS, STEPS)))


@needs_pairs
def test_body_a_model_used_by_others_during_a_step_is_itself() -> None:
    model = half_model()
    runner = runner_of(model)
    expected = plain_logits(model, TOKENS)
    before, seen = paged_logits(runner, TOKENS, STEPS), []
    body_class = type(model.get_decoder())

    def look() -> None:
        seen.append(torch.equal(plain_logits(model, TOKENS)[1], expected[1]))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            body = dict(other.named_modules())["model"]
            seen.append(type(body) is body_class and torch.equal(plain_logits(other, TOKENS)[0], expected[0]))

    def intrude(*_: object) -> None:
        if threading.current_thread() is threading.main_thread() and not seen:
            handle.remove()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()

    handle = model.get_input_embeddings().register_forward_hook(intrude)
    assert_same(paged_logits(runner, TOKENS, STEPS), before)
    assert seen == [True] * 3
    assert type(model.get_decoder()) is body_class


@needs_pairs
def test_body_hidden_states_and_given_embeddings_are_served_beside_it() -> None:
    model = half_model()
    prompt = TOKENS[1].tolist()
    with LLM(model, pack_linears=True, fuse=True, num_blocks=16) as llm:
        assert llm.runner.fusion.body == "model"
        (pooled,) = llm.embed([prompt], use_tqdm=False)
        with torch.no_grad():
            rows = model.get_input_embeddings()(TOKENS[1])
            states = model.get_decoder()(input_ids=TOKENS[1][None]).last_hidden_state[0]
        ours = torch.tensor(pooled.outputs.embedding)
        nearness = torch.nn.functional.cosine_similarity(ours, states[-1].float(), dim=0)
        assert nearness > 0.99
        outputs = [
            llm.generate(given, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0]
            for given in ([prompt], [{"prompt_embeds": rows}])
        ]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


@needs_pairs
def test_body_keeps_no_pool_of_a_storage_that_is_gone() -> None:
    runner = runner_of(half_model())
    for _ in range(2):
        assert not any(key() is not None for key in keys_of_a_dropped_storage(runner, TOKENS[0][:3]))


@needs_pairs
def test_body_runners_of_one_model_do_not_mix_their_pools() -> None:
    model = half_model()
    runners = [runner_of(model, block_size=size) for size in (4, 16)]
    before = [paged_logits(runner, TOKENS, STEPS) for runner in runners]
    for _ in range(2):
        for runner, expected in zip(runners, before, strict=True):
            assert_same(paged_logits(runner, TOKENS, STEPS, seed=3), expected)


@needs_pairs
def test_body_of_other_code_than_transformers_own_is_left_alone(calls: list[bool]) -> None:
    class Own(LlamaModel):
        pass

    model = half_model()
    model.get_decoder().__class__ = Own
    runner = runner_of(model)
    assert runner.fusion.body is None
    assert len(runner.fusion.layers) == NUM_LAYERS
    paged_logits(runner, TOKENS, STEPS)
    assert not any(calls)


def last_logits(runner: ModelRunner, steps: list[list[tuple[int, int]]]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the tokens that end what is given of a prompt, where a step ends it; and K and V of all layers at the end."""
    size, storage = runner.block_size, runner.new_storage(16)
    tables, done, found = [[2, 5, 3], [7, 4, 6]], [0, 0], []
    for step in steps:
        counts = [count for _, count in step]
        ids = torch.cat([TOKENS[row][done[row] : done[row] + count] for row, count in step])
        for row, count in step:
            done[row] += count
        plan = make_plan(
            counts, [done[row] for row, _ in step], block_tables=[tables[row] for row, _ in step], block_size=size, token_ids=ids.numpy()
        )
        ends = [at for at, (row, count) in zip(np.cumsum(counts) - 1, step, strict=True) if count == 1 or done[row] in LENS]
        plan = dataclasses.replace(plan, logits_indices=np.array(ends, dtype=np.int64))
        found.append(runner.forward(BatchBuilder("cpu", size).build(plan), storage).clone())
    return found, [each.clone() for pool in storage.layers for each in (pool.key, pool.value)]


@needs_pairs
@pytest.mark.parametrize("options", [{}, {"pack_linears": "int8"}])
def test_body_computes_the_last_layer_of_wanted_tokens_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    former = FusedLayer.of_wanted

    def counting(self: FusedLayer, rows: Rows, wanted: Tensor, attend: Any) -> Tensor:
        computed.append(len(wanted))
        return former(self, rows, wanted, attend)

    monkeypatch.setattr(FusedLayer, "of_wanted", counting)
    runner = runner_of(half_model(), **options)
    steps = [[(0, 8)], [(1, 17), (0, 4)], [(1, 1)], [(1, 2)]]  # nothing, the second alone, all that there is, the last one
    every, stored = last_logits(runner, steps)
    assert computed == []
    monkeypatch.setattr("pagedkv.models.step._LEAST_LEFT_OUT", 1)
    ours, ours_stored = last_logits(runner, steps)
    assert computed == [0, 1, 1]
    assert [each.shape for each in ours] == [each.shape for each in every] == [(0, 97), (1, 97), (1, 97), (1, 97)]
    for mine, theirs in zip(ours[1:], every[1:], strict=True):
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()
    assert_same(ours_stored, stored)


@needs_pairs
@pytest.mark.parametrize("what", ["the norm", "the model", "the model's own forward"])
def test_body_who_looks_sees_every_token(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.step._LEAST_LEFT_OUT", 1)
    model: Any = half_model()
    runner = runner_of(model)
    seen: list[Any] = []
    if what == "the model's own forward":
        former = model.forward
        model.forward = lambda *args, **kwargs: former(*args, **kwargs)
    else:
        module = {"the norm": model.model.norm, "the model": model}[what]
        module.register_forward_hook(lambda _, args, output: seen.append(args[0] if args else None))
    monkeypatch.setattr(FusedLayer, "of_wanted", lambda *_: pytest.fail("what it may look at was left out"))
    (logits,), _ = last_logits(runner, [[(0, 12)]])
    assert logits.isfinite().all()
    if what == "the norm":
        assert seen[0].shape[:2] == (1, 12)


@needs_pairs
def test_body_of_a_model_that_reads_all_hidden_states_gives_all() -> None:
    class Mean(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            wanted = kwargs.pop("logits_to_keep")
            states = self.model(*args, **kwargs).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(states[:, wanted] + states.mean(1, keepdim=True)))

    model = half_model()
    configs = attention_configs(model)
    body = as_body(model.get_decoder(), "layers", configs)
    assert body is not None
    assert reads_wanted_alone(model, "model", body, configs)
    model.__class__ = Mean
    assert not reads_wanted_alone(model, "model", body, configs)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_body_is_proven_whatever_its_weights(name: str) -> None:
    model = tiny_model(name)
    body = as_body(model.get_decoder(), "layers", attention_configs(model))
    assert body is not None
    assert (body.embedding, body.rotary, body.norm) == ("embed_tokens", "rotary_emb", "norm")
    assert (body.mask, body.states, body.cache) == (Mask.causal(), "last_hidden_state", CACHE_ARGUMENT)


def scaled(x: Tensor) -> Tensor:
    return x * 1.0


def in_place(x: Tensor) -> Tensor:
    return x.mul_(1.0)


class Almost(LlamaModel):
    """The body of a llama written out, with one thing about it changed."""

    change = "nothing"

    def forward(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        does = self.change
        x = self.embed_tokens(input_ids)
        start, angles = x, self.rotary_emb(x, position_ids=position_ids)
        kwargs.pop("inputs_embeds")
        if does in ("scales embeddings", "scales embeddings in place"):
            x = scaled(x) if does == "scales embeddings" else in_place(x)
        if does == "changes angles":
            angles = (angles[0] * 1.0, angles[1])
        layers = list(self.layers)
        if does == "runs them backwards":
            layers.reverse()
        for place, layer in enumerate(layers[1:] if does == "leaves one out" else layers):
            if does == "adds in between" and place == 1:
                x = x + start
            if does == "writes in between" and place == 1:
                in_place(x)
            given = {**kwargs, "extra": place} if does == "tells layers apart" else kwargs
            x = layer(start if does == "feeds all the same" else x, position_ids=position_ids, position_embeddings=angles, **given)
        if does == "runs one twice":
            x = layers[-1](x, position_ids=position_ids, position_embeddings=angles, **kwargs)
        states = x if does == "has no norm" else self.norm(x)
        if does == "norms twice":
            states = self.norm(states)
        if does == "scales states":
            states = scaled(states)
        if does == "raises":
            raise ValueError(does)
        output = BaseModelOutputWithPast(last_hidden_state=states, **{CACHE_ARGUMENT: kwargs[CACHE_ARGUMENT]})
        if does == "gives hidden states":
            output["hidden_states"] = (x,)
        return output


ALMOST = (
    "scales embeddings",
    "scales embeddings in place",
    "changes angles",
    "runs them backwards",
    "leaves one out",
    "adds in between",
    "writes in between",
    "tells layers apart",
    "feeds all the same",
    "runs one twice",
    "has no norm",
    "norms twice",
    "scales states",
    "gives hidden states",
    "raises",
)


@pytest.mark.parametrize("change", ["nothing", *ALMOST])
def test_body_that_only_looks_like_one_is_not_taken_for_one(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    body = model.get_decoder()
    monkeypatch.setattr(Almost, "change", change)
    body.__class__ = Almost
    assert (as_body(body, "layers", attention_configs(model)) is not None) == (change == "nothing")


def test_body_with_layers_of_several_masks_is_left_alone() -> None:
    model = tiny_model("gemma2")
    assert as_body(model.get_decoder(), "layers", attention_configs(model)) is None
