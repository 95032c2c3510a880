"""Architectures of transformers' own registry, shrunk, in every mix of requests: the tokens of each prompt are those it gets alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from pagedkv import LLM, SamplingParams
from pagedkv.errors import InvalidRequestError, UnsupportedModelError
from pagedkv.models import ModelRunner
from pagedkv.storage import KVStorage, StepBatch
from pagedkv.testing.architectures import decoder_architectures, encoder_decoder_architectures, shrunk_config, shrunk_model
from pagedkv.testing.models import WINDOW, tiny_model
from pagedkv.testing.parity import References, generate_alone, parity_runner, run_mixes

SMOKE = ("bloom", "cohere2", "deepseek_v3", "gpt_neox_japanese", "lfm2")
NUM_TOKEN_IDS = 90  # the last of the 97 are left to what an architecture takes for special


def assert_parity(model: PreTrainedModel, what: str) -> None:
    references = References(model, num_token_ids=NUM_TOKEN_IDS)
    runner = parity_runner(model)
    if runner.max_positions_reason is not None and runner.max_positions is not None and runner.max_positions < references.longest:
        raise UnsupportedModelError(runner.max_positions_reason)
    mixes = run_mixes(runner, references)
    assert [mix.name for mix in mixes] == ["ragged", "prefix", "fork", "preempted"]
    wrong = [f"{mix.name}: {mix.difference or mix.error}" for mix in mixes if mix.difference or mix.error]
    if wrong:
        own = references.inconsistency()
        if own is not None:
            pytest.skip(f"{what}: transformers contradicts itself, {own}")
    assert not wrong, f"{what}: {wrong}"
    assert sum(mix.num_outputs for mix in mixes) == 17
    assert sum(mix.num_preemptions for mix in mixes) > 0, f"{what}: the small pool took nobody's blocks"


@pytest.mark.parametrize("model_type", SMOKE)  # ALiBi, windows, latents, views of keys, convolutions
def test_mixes_of_one_architecture_of_each_kind_give_the_tokens_of_each_prompt_alone(model_type: str) -> None:
    assert_parity(shrunk_model(model_type), model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, while it builds what hardly anybody builds today
@pytest.mark.parametrize("model_type", decoder_architectures())
def test_mixes_of_every_architecture_give_the_tokens_of_each_prompt_alone_or_are_refused(model_type: str) -> None:
    try:
        model = shrunk_model(model_type)
        References(model, num_token_ids=NUM_TOKEN_IDS)
    except Exception as error:
        pytest.skip(f"{model_type} cannot be built or run by transformers: {type(error).__name__}: {error}")
    try:
        assert_parity(model, model_type)
    except UnsupportedModelError as error:
        pytest.skip(f"refused: {error}")


class Off(ModelRunner):
    """A runner that is wrong in one logit of some steps, by a little."""

    def forward(self, batch: StepBatch, storage: KVStorage) -> torch.Tensor:
        logits = super().forward(batch, storage)
        if batch.plan.num_tokens == 4:
            logits[0, logits[0].argmax()] -= 0.1
        return logits


def test_parity_sees_logits_that_are_off_in_steps_of_four_tokens_only() -> None:
    model = tiny_model("llama")
    mixes = run_mixes(Off(model, block_size=4), References(model, num_token_ids=NUM_TOKEN_IDS))
    assert [mix.name for mix in mixes if mix.difference is not None] != []
    assert all("logprob" in mix.difference or "goes on with" in mix.difference for mix in mixes if mix.difference is not None)


def test_parity_names_a_model_whose_own_cache_contradicts_it() -> None:
    references = References(shrunk_model("moshi"), num_token_ids=NUM_TOKEN_IDS)  # its cache drops keys that its mask shows
    found = references.inconsistency()
    assert found is not None
    assert found.startswith("without a cache a prompt of")
    assert References(tiny_model("llama"), num_token_ids=NUM_TOKEN_IDS).inconsistency() is None


def test_model_whose_own_cache_contradicts_it_is_served_as_far_as_both_agree() -> None:
    model = shrunk_model("moshi")
    runner = parity_runner(model)
    assert runner.max_positions == WINDOW
    assert "keeps 8 tokens in layers whose mask shows more" in str(runner.max_positions_reason)
    prompt = (5, 17, 60)
    with_cache, without = (generate_alone(model, prompt, num_new=WINDOW - 3, use_cache=use) for use in (True, False))
    assert with_cache.token_ids == without.token_ids
    with LLM(model, block_size=4) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=WINDOW - 3, ignore_eos=True)
        (output,) = llm.generate([list(prompt)], greedy, use_tqdm=False)
        assert output.outputs[0].token_ids == with_cache.token_ids
        with pytest.raises(InvalidRequestError, match="contradicts its own forward"):
            llm.generate([list(range(3, 3 + WINDOW))], greedy, use_tqdm=False)


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama4_text"])
def test_model_whose_own_cache_keeps_what_its_masks_show_is_served_to_its_end(model_type: str) -> None:
    runner = parity_runner(shrunk_model(model_type))
    assert (runner.max_positions, runner.max_positions_reason) == (256, None)


def test_parity_refuses_to_judge_by_tokens_that_nearly_tie() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="close to a tie"):
        References(model, num_token_ids=NUM_TOKEN_IDS)


def test_refusal_names_cache_layers_that_a_model_brings_itself() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Its layers keep more than K/V, in cache layers of their own: DeepseekV4\w+"):
        parity_runner(shrunk_model("deepseek_v4"))


def test_registry_names_many_architectures_once_and_in_order() -> None:
    for names in (decoder_architectures(), encoder_decoder_architectures()):
        assert list(names) == sorted(set(names))
    assert len(decoder_architectures()) > 120
    assert {"llama", "bloom", "mamba"} <= set(decoder_architectures())


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "cohere2"])
def test_shrunk_config_keeps_every_kind_of_layer_and_windows_below_a_prompt(model_type: str) -> None:
    config = shrunk_config(model_type)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert (config.sliding_window, config.num_hidden_layers, config.vocab_size) == (WINDOW, 4, 97)


def test_shrunk_config_takes_overrides_and_refuses_unknown_names() -> None:
    assert shrunk_config("llama", num_hidden_layers=2).num_hidden_layers == 2
    assert (shrunk_config("llama").num_key_value_heads, shrunk_config("mistral").num_key_value_heads) == (4, 2)
    with pytest.raises(KeyError):
        shrunk_config("nonsense")
