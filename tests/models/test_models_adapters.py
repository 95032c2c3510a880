"""Adapters: models without transformers' attention interface read blocks in place, or not at all where an adapter does not fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models_support import assert_close, mixed_schedule, paged_logits, plain_logits, random_tokens
from tier_models import ADAPTED, VARIANTS, tier_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import GPTNeoXJapaneseAttention

from pagedkv.attention import Mask
from pagedkv.errors import InvalidRequestError, UnsupportedModelError
from pagedkv.models import CACHE_ARGUMENT, ModelRunner, attention_adapters
from pagedkv.models.adapted_attention import ADAPTERS, Adapted
from pagedkv.models.alibi import BiasColumns, linear_slopes
from pagedkv.models.attention_adapters import AttentionAdapters
from pagedkv.models.call import ModelCall
from pagedkv.models.context import AttentionCall
from pagedkv.models.probe import probe_packed
from pagedkv.storage import BatchBuilder
from pagedkv.testing.models import randomised
from pagedkv.testing.plans import make_plan

LENS = (17, 33, 6, 25)
EARLY = ("bloom, 6 heads", "falcon, alibi, new", "mpt, clipped")
RUNNING = "by an adapter for {}: self-check failed"


def _check(runner: ModelRunner, *, what: str, chunk: int = 5, seed: int = 2) -> None:
    tokens = random_tokens(LENS, seed=seed)
    got = paged_logits(runner, tokens, mixed_schedule(LENS, chunk=chunk, num_decodes=4), seed=seed)
    assert_close(got, plain_logits(runner.model, tokens), relative=1e-4, what=f"{what}, chunk {chunk}, seed {seed}")


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a later token changes what comes before: some releases have no causal mask for some decoders, which no tier runs."""
    (tokens,) = random_tokens((9,), seed=1)
    (before,), (after,) = (plain_logits(model, [torch.cat([tokens, torch.tensor([last])])]) for last in (5, 6))
    return not torch.allclose(before[:-1], after[:-1], atol=1e-4)


@pytest.mark.parametrize("name", [*ADAPTED, *(name if name in EARLY else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def test_adapted_model_is_read_in_place_and_equals_the_plain_forward(name: str) -> None:
    model = tier_model(name)
    if _looks_ahead(model):
        pytest.skip("this release of transformers lets the model look ahead")
    runner = ModelRunner(model, block_size=4)
    assert runner.tier.name == "packed"
    assert set(runner.tier.layers) == {"in place"}
    assert len(runner.tier.adapters) == (0 if type(model)._can_set_attn_implementation() else 1)  # releases give it to one by one
    assert runner.tier.rejected == {}
    _check(runner, what=name)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.slow
def test_every_backend_and_block_size_equals_the_plain_forward(name: str, backend: str, block_size: int) -> None:
    runner = ModelRunner(tier_model(name, seed=3), block_size=block_size, backend=backend)
    _check(runner, what=f"{name}, {backend}, block size {block_size}", chunk=7, seed=4)


def test_report_names_the_class_that_the_adapter_is_for() -> None:
    tier = ModelRunner(tier_model("gpt_neo"), block_size=4).tier
    assert str(tier) == "packed (2 layers in place, by an adapter for GPTNeoSelfAttention)"
    assert tier.adapters == ("GPTNeoSelfAttention",)
    assert tier.masks == ((Mask.causal(),), (Mask.sliding(8),))


def test_backends_are_asked_for_alibi() -> None:
    for name, alibi in (("bloom", True), ("mpt", True), ("gptj", False)):
        model = tier_model(name)
        assert {request.alibi for request in probe_packed(ModelCall(model), AttentionAdapters(model)).requests} == {alibi}


def test_heads_that_share_keys_store_them_once() -> None:
    runners = [ModelRunner(tier_model("falcon_new"), block_size=4, tier=tier) for tier in ("packed", "dense")]
    assert [runner.layers[0].num_kv_heads for runner in runners] == [2, 4]


# ALiBi beyond the first few hundred positions.


@pytest.mark.parametrize(
    "name",
    [
        "falcon, alibi, 6 heads",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_alibi", "falcon, alibi, multi-query")),
        "bloom, 6 heads",
        "mpt, 6 heads",
    ],
)
def test_biases_of_far_positions_are_those_of_the_model(name: str) -> None:
    model_type, arguments = {**ADAPTED, **VARIANTS}[name]
    model = randomised(AutoConfig.for_model(model_type, **{**arguments, **({"max_seq_len": 700} if model_type == "mpt" else {})}))
    runner = ModelRunner(model, block_size=16)
    assert runner.tier.name == "packed"
    tokens = random_tokens((660,), seed=5)
    got = paged_logits(runner, tokens, mixed_schedule((660,), chunk=650, num_decodes=10))
    assert_close(got, plain_logits(model, tokens), relative=1e-4, what=name)


def test_slopes_are_taken_only_from_biases_on_a_line() -> None:
    slopes = torch.tensor([0.25, 0.707])
    places = torch.arange(300.0)
    assert torch.allclose(linear_slopes(slopes[:, None] * places), slopes)
    assert torch.allclose(linear_slopes(slopes[:, None] * (places - 299)), slopes)
    assert torch.equal(linear_slopes(slopes[:, None] * places[:1]), torch.zeros(2))
    for bent in ((slopes[:, None] * places).bfloat16().float(), slopes[:, None] * places.clamp(max=290)):
        with pytest.raises(UnsupportedModelError, match="linearly"):
            linear_slopes(bent)


def test_bias_columns_add_the_bias_of_head_and_key_to_every_product() -> None:
    generator = torch.Generator().manual_seed(1)
    biases = torch.randn(6, 9, generator=generator)
    query, key = torch.randn(1, 6, 4, 5, generator=generator), torch.randn(1, 2, 4, 5, generator=generator)
    positions = torch.tensor([[3, 4, 0, 8]])
    wide_query, wide_key = BiasColumns(biases, group=3).extended(query, key, positions)
    got = wide_query @ wide_key.repeat_interleave(3, dim=1).transpose(2, 3)
    want = query @ key.repeat_interleave(3, dim=1).transpose(2, 3) + biases[None, :, None, positions[0]]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["bloom, 6 heads", *(pytest.param(name, marks=pytest.mark.slow) for name in ADAPTED)])
def test_half_precision_is_no_further_from_float32_than_the_model_itself(name: str) -> None:
    exact, model = tier_model(name), tier_model(name).to(torch.bfloat16)
    runner = ModelRunner(model, block_size=4)
    assert runner.tier.name == "packed"
    assert runner.report.copy is not None
    tokens = random_tokens(LENS, seed=6)
    want = plain_logits(exact, tokens)
    errors = [
        max(float((ours - theirs).abs().max()) for ours, theirs in zip(got, want, strict=True))
        for got in (paged_logits(runner, tokens, mixed_schedule(LENS, chunk=5, num_decodes=4)), plain_logits(model, tokens))
    ]
    assert errors[0] < 1.5 * errors[1]


# What does not fit.


def _refused(name: str, class_name: str, reason: str, model: nn.Module | None = None) -> None:
    runner = ModelRunner(tier_model(name) if model is None else model, block_size=4)  # type: ignore[arg-type]
    assert runner.tier.name == "dense"
    assert runner.tier.adapters == ()
    assert reason in runner.tier.rejected["packed"], runner.tier.rejected
    assert class_name in runner.tier.rejected["packed"]
    _check(runner, what=f"{name}, dense")


def _other(change: Callable[[AttentionCall], AttentionCall], name: str) -> Callable[[nn.Module, Any], Adapted]:
    """An adapter that asks for something else than the one of that class."""

    def adapter(module: nn.Module, shared: Any) -> Adapted:
        adapted = ADAPTERS[name](module, shared)

        class Changed:
            def __init__(self, step: Any) -> None:
                self._step = step

            def attend(self, call: AttentionCall) -> Tensor:
                return self._step.attend(change(call))

        return Adapted(adapted.method, lambda step, *args, **kwargs: adapted.compute(Changed(step), *args, **kwargs))

    return adapter


MISTAKES: dict[str, tuple[str, Callable[[AttentionCall], AttentionCall]]] = {
    "slopes in the wrong order": ("bloom", lambda call: replace(call, alibi_slopes=call.alibi_slopes.flip(0))),
    "slopes of the wrong sign": ("mpt", lambda call: replace(call, alibi_slopes=-call.alibi_slopes)),
    "no slopes": ("bloom", lambda call: replace(call, alibi_slopes=None)),
    "slopes scaled like products": ("mpt", lambda call: replace(call, alibi_slopes=call.alibi_slopes * call.scale)),
    "another scale": ("gpt_neo", lambda call: replace(call, scale=8**-0.5)),
    "no scale": ("gpt_neox_japanese", lambda call: replace(call, scale=1.0)),
    "a window of one less": ("gpt_neo", lambda call: replace(call, window=call.window and call.window - 1)),
    "no window": ("gpt_neo", lambda call: replace(call, window=None)),
    "a window": ("gpt_neox_japanese", lambda call: replace(call, mask=None, window=9)),
    "heads in the wrong order": ("falcon_new", lambda call: replace(call, query=call.query.flip(1))),
    "queries that are not turned": ("falcon_rotary", lambda call: replace(call, query=call.query.roll(1, dims=3))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_an_adapter_is_caught_by_the_self_check(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = MISTAKES[mistake]
    monkeypatch.setattr(attention_adapters, "ADAPTERS", {known: _other(change, known) for known in ADAPTERS})
    runner = ModelRunner(tier_model(name), block_size=4)
    assert runner.tier.name == "dense"
    assert runner.tier.rejected["packed"].startswith("by an adapter for ")
    assert "self-check failed" in runner.tier.rejected["packed"]


def test_forward_of_another_release_that_computes_something_else_is_caught_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    own = BloomAttention.forward

    def louder(self: Any, hidden_states: Tensor, residual: Tensor, **others: Any) -> Any:
        output, weights = own(self, hidden_states, residual, **others)
        return output * 1.25, weights

    monkeypatch.setattr(BloomAttention, "forward", louder)
    _refused("bloom", "BloomAttention", RUNNING.format("BloomAttention"))


def test_forward_of_another_release_with_other_names_is_not_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BloomAttention, "_reshape")
    with pytest.raises(UnsupportedModelError, match="_reshape"):
        ModelRunner(tier_model("bloom"), block_size=4, tier="packed")


class _LouderBloom(BloomAttention):
    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, residual, *args, **kwargs)
        return output * 1.25, weights


class _LouderJapanese(GPTNeoXJapaneseAttention):
    def _attn(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super()._attn(*args, **kwargs)
        return output * 1.25, weights


@pytest.mark.parametrize(
    ("name", "path", "cls", "method"),
    [
        ("bloom", "transformer.h.1.self_attention", _LouderBloom, "forward"),
        ("gpt_neox_japanese", "gpt_neox_japanese.layers.1.attention", _LouderJapanese, "_attn"),
    ],
)
def test_subclass_that_computes_something_else_is_not_adapted(name: str, path: str, cls: type[nn.Module], method: str) -> None:
    model = tier_model(name)
    model.get_submodule(path).__class__ = cls
    _refused(name, cls.__mro__[1].__name__, f"{cls.__name__} has a {method} of its own", model)


def test_module_whose_forward_somebody_wrapped_is_not_adapted() -> None:
    model = tier_model("mpt")
    attention = model.transformer.blocks[0].attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    _refused("mpt", "MptAttention", "MptAttention has a forward of its own", model)


class _FlatBloom(BloomModel):
    """Its biases stop growing at a distance that no short check reaches."""

    def build_alibi_tensor(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        return super().build_alibi_tensor(attention_mask, num_heads, dtype).clamp(max=100.0)


def test_part_of_another_body_is_not_adapted() -> None:
    model = tier_model("bloom")
    model.transformer.__class__ = _FlatBloom
    _refused("bloom", "BloomAttention", "it is part of a _FlatBloom", model)


def test_option_that_an_adapter_does_not_know_keeps_it_away() -> None:
    model_type, arguments = ADAPTED["bloom"]
    model = randomised(AutoConfig.for_model(model_type, **arguments, pretraining_tp=2, slow_but_exact=True))
    _refused("bloom", "BloomAttention", "slow_but_exact", model)
    model = tier_model("bloom")
    model.transformer.h[0].self_attention.beta = 0.5
    _refused("bloom", "BloomAttention", "beta is 0.5", model)


def test_mask_that_is_another_than_the_config_says_is_not_adapted() -> None:
    model = tier_model("gpt_neo")
    (local,) = [module for module in model.modules() if isinstance(module, GPTNeoSelfAttention) and module.attention_type == "local"]
    local.bias[0, 0, 200, 195] = False  # beyond what a self-check sees
    _refused("gpt_neo", "GPTNeoSelfAttention", "another mask than", model)


# While a step runs.


def test_forward_that_records_gradients_within_a_step_is_refused() -> None:
    model = tier_model("bloom")
    runner = ModelRunner(model, block_size=4)
    storage = runner.new_storage(3)
    batch = BatchBuilder("cpu", 4).build(make_plan([5], [5], block_tables=[[1, 2]], block_size=4))
    with pytest.raises(InvalidRequestError, match="gradient"), runner.step(batch, storage) as cache:
        model(input_ids=batch.token_ids[None], **{CACHE_ARGUMENT: cache})


def test_ordinary_forward_in_another_thread_during_a_step_is_the_models_own() -> None:
    for name in ("falcon_rotary", "falcon_alibi", "bloom", "gptj"):
        model = tier_model(name)
        runner = ModelRunner(model, block_size=4)
        tokens = random_tokens((12,), seed=3)
        (want,) = plain_logits(model, tokens)
        seen: list[Tensor] = []

        def intrude(*call: object, tokens: Any = tokens, model: Any = model, seen: list[Tensor] = seen) -> None:
            if not seen and threading.current_thread() is threading.main_thread():
                seen.append(torch.empty(0))
                thread = threading.Thread(target=lambda: seen.extend(plain_logits(model, tokens)))
                thread.start()
                thread.join()

        handle = list(model.modules())[-1].register_forward_pre_hook(intrude)
        inner = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[1].register_forward_pre_hook(intrude)
        paged_logits(runner, tokens, [[(0, 12)]])
        handle.remove()
        inner.remove()
        assert torch.equal(seen[1], want), name


def test_step_leaves_the_model_as_it_was_and_calls_its_hooks() -> None:
    model = tier_model("bloom")
    attention = model.transformer.h[1].self_attention
    runner = ModelRunner(model, block_size=4)
    seen: list[tuple[int, ...]] = []
    handle = attention.register_forward_hook(lambda module, args, output: seen.append(tuple(output[0].shape)))
    before = dict(vars(attention)), list(model.named_modules())
    tokens = random_tokens((5,), seed=3)
    paged_logits(runner, tokens, [[(0, 5)]])
    handle.remove()
    assert seen == [(1, 5, 32)]
    assert (dict(vars(attention)), list(model.named_modules())) == before
    assert type(attention) is BloomAttention
