"""Rotary embeddings that look at the longest sequence of a forward, and configs that state more positions than there are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from pagedkv import LLM, PoolingParams, SamplingParams
from pagedkv.errors import ConfigError, InvalidRequestError, RequestTooLargeError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.testing.models import randomised, tiny_config, tiny_model

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SWITCH = 24
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 7.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
HAZARDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "phi3 longrope": ("phi3", {"original_max_position_embeddings": SWITCH, "rope_parameters": LONG}, SWITCH),
    "llama longrope": ("llama", {"rope_parameters": {**LONG, "original_max_position_embeddings": SWITCH}}, SWITCH),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC}, 64),
}


def hazard(name: str) -> tuple[PreTrainedModel, int]:
    model_type, arguments, reach = HAZARDS[name]
    return randomised(AutoConfig.for_model(model_type, **BASE, **arguments)), reach


def prompts_up_to(longest: int, *, seed: int) -> list[list[int]]:
    """Some share a beginning, one leaves room for a single token."""
    generator = torch.Generator().manual_seed(seed)
    trunk = torch.randint(3, 97, (longest,), generator=generator).tolist()
    others = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (1, 5, longest // 2)]
    return [*others, trunk[: longest - 1], trunk[: longest // 2], trunk[: longest // 2 + 3], trunk[: longest - 7]]


def alone(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What a model that has seen no long forward generates."""
    ordinary_forward(model, 1)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


def ordinary_forward(model: PreTrainedModel, num_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.full((1, num_tokens), 5), use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", HAZARDS)
def test_tokens_equal_generate_alone_beside_others_with_prefix_hits_and_after_preemption(name: str) -> None:
    model, reach = hazard(name)
    prompts = prompts_up_to(reach, seed=1)
    wanted = [alone(model, prompt, min(20, reach - len(prompt))) for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True) for tokens in wanted]
    with LLM(model, block_size=4, num_blocks=reach // 4 + 6, max_num_batched_tokens=16, check="audit") as llm:
        for _ in range(2):  # the second time over blocks that the first has cached
            # A forward longer than what is served, outside of the engine, leaves other frequencies on the model's modules.
            ordinary_forward(model, 100)
            found = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
            assert found == wanted, name
        assert llm.statistics().num_preemptions > 0
        assert llm.statistics().cache.num_hit_tokens > 0


@pytest.mark.parametrize(("name", "tier"), [("phi3 longrope", "packed"), ("llama longrope", "packed"), ("llama longrope", "dense")])
def test_long_prompts_and_short_ones_share_steps_each_at_its_own_frequencies(name: str, tier: Any) -> None:
    model, switch = hazard(name)
    generator = torch.Generator().manual_seed(2)
    trunk = torch.randint(3, 97, (60,), generator=generator).tolist()
    prompts = [trunk[:length] for length in (switch + 1, 50, 12, switch, 40, 5, 23, 58)]
    params = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    room = [(64 if len(prompt) > switch else switch + 1) - len(prompt) for prompt in prompts]
    wanted = [alone(model, prompt, min(14, most)) for prompt, most in zip(prompts, room, strict=True)]
    with LLM(model, block_size=4, num_blocks=30, max_num_batched_tokens=16, tier=tier, check="audit") as llm:
        assert (llm.runner.max_positions, llm.runner.far_positions) == (switch, 64)
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for prompt, output, tokens in zip(prompts, outputs, wanted, strict=True):
                assert list(output.outputs[0].token_ids) == tokens, f"{name}, prompt of {len(prompt)}"
                assert output.outputs[0].finish_reason == "length"
        assert llm.statistics().num_preemptions > 0
        hits = {len(output.prompt_token_ids): output.num_cached_tokens for output in outputs}
        assert hits[58] > 0, "long prompts share with long ones"
        assert hits[23] > 0, "and short ones with short ones"
        assert llm.engine.purge_cache() > 0
        (output,) = llm.generate([trunk[:40]], params, use_tqdm=False)
        assert output.num_cached_tokens == 0


def test_hidden_states_and_embeddings_of_long_prompts_are_those_alone() -> None:
    model, switch = hazard("llama longrope")
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 97, (switch + 9,), generator=generator)
    embeds = model.get_input_embeddings()(prompt).detach()
    given: Any = [prompt.tolist(), {"prompt_embeds": embeds}, prompt[:switch].tolist()]
    with LLM(model, block_size=4, num_blocks=64, max_num_batched_tokens=11) as llm:
        found = llm.embed(given, PoolingParams("all"), use_tqdm=False)
    for output, length in zip(found, (switch + 9, switch + 9, switch), strict=True):
        with torch.no_grad():
            states = model.model(input_ids=prompt[None, :length]).last_hidden_state[0]
        assert output.outputs is not None
        assert torch.allclose(torch.from_numpy(output.outputs.embedding.copy()), states, atol=1e-4)


def test_short_prompt_that_would_grow_past_the_switch_ends_there_and_says_why() -> None:
    model, switch = hazard("phi3 longrope")
    with LLM(model, block_size=4, num_blocks=64) as llm:
        llm.engine.add_request("short", [5] * 20, SamplingParams(ignore_eos=True, max_tokens=30))
        assert f"ends at {switch + 1} tokens: the config states 64 positions" in llm.engine.explain("short")
        llm.engine.add_request("long", [5] * 30, SamplingParams(ignore_eos=True, max_tokens=30))
        assert "ends at" not in llm.engine.explain("long")


def test_frequencies_that_keep_changing_have_no_second_kind() -> None:
    arguments = {**BASE, "max_position_embeddings": SWITCH}
    model = randomised(AutoConfig.for_model("llama", **arguments, rope_parameters=DYNAMIC))
    model.model.rotary_emb.config = copy.deepcopy(model.config)  # which goes on at 24, and scales with every further token
    model.config.max_position_embeddings = 64
    runner = ModelRunner(model, block_size=4)
    assert (runner.max_positions, runner.far_positions) == (SWITCH, None)
    with LLM(model, block_size=4) as llm, pytest.raises(InvalidRequestError, match=r"24 tokens.*dynamic.*neighbours"):
        llm.generate([[5] * 24], use_tqdm=False)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama longrope"])
def test_limits_are_said_with_their_reason(name: str) -> None:
    model, reach = hazard(name)
    runner = ModelRunner(model, block_size=4)
    assert runner.max_positions == reach == SWITCH
    assert runner.max_positions_reason is not None
    assert "64 positions" in runner.max_positions_reason
    assert "'longrope'" in runner.max_positions_reason
    with pytest.raises(ConfigError, match=r"max_model_len is 65, the model has 64 positions"):
        LLM(model, block_size=4, max_model_len=65)
    with LLM(model, block_size=4, max_model_len=16) as llm, pytest.raises(InvalidRequestError) as caught:
        llm.generate([[5] * 24], use_tqdm=False)
    assert "longrope" not in str(caught.value)
    with (
        LLM(model, block_size=4, max_model_len=SWITCH) as llm,
        pytest.raises(InvalidRequestError, match=r"24 tokens.*longrope.*neighbours"),
    ):
        llm.generate([[5] * 24], use_tqdm=False)


def test_a_step_leaves_the_frequencies_of_a_longer_ordinary_forward_as_they_were() -> None:
    model, _ = hazard("llama dynamic")
    ordinary_forward(model, 100)
    before = ordinary_forward(model, 64)  # of so many, dynamic scaling keeps what a longer one left
    with LLM(model, block_size=4) as llm:
        assert llm.runner.max_positions == 64
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert torch.equal(ordinary_forward(model, 64), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_other_models_are_served_as_far_as_they_state(name: str) -> None:
    runner = ModelRunner(tiny_model(name), block_size=4)
    assert (runner.max_positions, runner.max_positions_reason) == (256, None)


def test_same_factors_for_short_and_long_are_no_hazard() -> None:
    same = {**LONG, "long_factor": LONG["short_factor"], "original_max_position_embeddings": SWITCH}
    runner = ModelRunner(randomised(AutoConfig.for_model("llama", **BASE, rope_parameters=same)), block_size=4)
    assert (runner.max_positions, runner.max_positions_reason) == (64, None)


def test_rope_that_depends_on_the_batch_and_cannot_be_tried_is_refused() -> None:
    model, _ = hazard("llama dynamic")
    for module in model.modules():
        vars(module).pop("rope_type", None)
    with pytest.raises(UnsupportedModelError, match=r"'dynamic'.*neighbours"):
        ModelRunner(model, block_size=4)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_config_with_more_positions_than_the_learned_table_is_refused(name: str) -> None:
    model = tiny_model(name)
    setattr(model.config, "n_positions" if name == "gpt2" else "max_position_embeddings", 300)
    with pytest.raises(UnsupportedModelError, match=r"states 300 positions.*rows for 256"):
        ModelRunner(model, block_size=4)


@pytest.mark.parametrize(("part", "what"), [("lm_head", "output head scores 97"), ("embedding", "embedding reads 97")])
def test_config_with_a_larger_vocabulary_than_head_or_embedding_is_refused(part: str, what: str) -> None:
    model = tiny_model("llama", vocab_size=101)
    if part == "lm_head":
        model.lm_head = torch.nn.Linear(32, 97, bias=False)
    else:
        model.set_input_embeddings(torch.nn.Embedding(97, 32))
    with pytest.raises(UnsupportedModelError, match=f"vocabulary of 101 tokens, its {what}"):
        ModelRunner(model, block_size=4)


def test_shapes_that_the_config_states_wrongly_are_taken_from_what_the_model_writes() -> None:
    model = tiny_model("llama")
    wanted = alone(model, [5, 6, 7, 8], 6)
    for setting, lie in (("num_key_value_heads", 1), ("head_dim", 5), ("hidden_size", 48)):
        setattr(model.config, setting, lie)
    assert tiny_config("llama").num_key_value_heads == 2
    with LLM(model, block_size=4) as llm:
        assert [(layer.num_kv_heads, layer.key_dim) for layer in llm.runner.layers] == [(2, 8), (2, 8)]
        (output,) = llm.generate([[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == wanted


def test_prompt_that_fits_the_pool_never_is_still_told_apart_from_one_that_is_too_long() -> None:
    model, _ = hazard("phi3 longrope")
    with LLM(model, block_size=4, num_blocks=4) as llm, pytest.raises(RequestTooLargeError):
        llm.generate([[5] * 20], use_tqdm=False)
