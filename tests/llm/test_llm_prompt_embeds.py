"""Prompts given as embeddings: what ``generate(inputs_embeds=...)`` makes of each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pagedkv import LLM, PoolingParams, SamplingParams
from pagedkv.errors import InvalidRequestError, UnsupportedModelError
from pagedkv.testing.models import randomised, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BLOOM = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
LENGTHS = (1, 9, 26, 14)


def embeds_of(model: PreTrainedModel, *, seed: int) -> list[Tensor]:
    """Embeddings of no tokens, as large as those of tokens."""
    generator = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings().weight
    return [torch.randn((length, table.shape[1]), generator=generator) * table.detach().std() for length in LENGTHS]


def alone(model: Any, embeds: Tensor) -> list[int]:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)), **options)[0].tolist()


@pytest.mark.parametrize("name", ["llama", "bloom", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "gpt2"))])
def test_prompts_as_embeddings_equal_generate_alone_beside_tokens_in_chunks_and_after_preemption(name: str) -> None:
    model = randomised(AutoConfig.for_model("bloom", **BLOOM)) if name == "bloom" else tiny_model(name)
    embeds = embeds_of(model, seed=1)
    tokens = [[5, 6, 7, 8, 9, 10, 11, 12], [0] * 26]  # zeros stand in the place of tokens that nobody knows
    with LLM(model, block_size=4, num_blocks=18, max_num_batched_tokens=12, max_model_len=64, check="audit") as llm:
        wanted = [alone(model, each) for each in embeds]
        plain = [list(output.outputs[0].token_ids) for output in llm.generate(tokens, GREEDY, use_tqdm=False)]
        for _ in range(2):
            prompts: list[Any] = [{"prompt_embeds": each} for each in embeds]
            outputs = llm.generate([*prompts, *tokens], GREEDY, use_tqdm=False)
            assert [list(output.outputs[0].token_ids) for output in outputs] == [*wanted, *plain], name
            assert [output.num_cached_tokens for output in outputs[: len(embeds)]] == [0] * len(embeds)
            assert outputs[0].prompt_token_ids == ()
        assert llm.statistics().num_preemptions > 0


def test_several_samples_of_embeddings_and_their_hidden_states() -> None:
    model = tiny_model("llama")
    (_, embeds, *_) = embeds_of(model, seed=2)
    with LLM(model, block_size=4, num_blocks=32) as llm:
        (output,) = llm.generate(
            [{"prompt_embeds": embeds}], SamplingParams(n=2, temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False
        )
        assert [list(sample.token_ids) for sample in output.outputs] == [alone(model, embeds)] * 2
        (pooled,) = llm.embed([{"prompt_embeds": embeds}], PoolingParams("mean"), use_tqdm=False)
        with torch.no_grad():
            states = model.model(inputs_embeds=embeds[None]).last_hidden_state[0]
        assert pooled.outputs is not None
        assert torch.allclose(torch.from_numpy(pooled.outputs.embedding.copy()), states.mean(dim=0), atol=1e-4)


def test_tokens_found_under_a_salt_are_never_those_that_stand_for_embeddings() -> None:
    model = tiny_model("llama")
    embeds = embeds_of(model, seed=3)[2]
    with LLM(model, block_size=4, num_blocks=32) as llm:
        llm.generate([{"prompt_embeds": embeds}], GREEDY, use_tqdm=False)
        for salt in ("", "\0", "\x000", "\x001", "\0\x000"):
            (output,) = llm.generate([{"prompt_token_ids": [0] * 26, "cache_salt": salt}], GREEDY, use_tqdm=False)
            assert output.num_cached_tokens == 0, repr(salt)
            assert llm.engine.purge_cache(salt) > 0, repr(salt)


@pytest.mark.parametrize(
    ("embeds", "reason"),
    [
        (torch.zeros(3, 31), r"torch.float32 \[3, 31\].*floats, \[P, 32\]"),
        (torch.zeros(3, 32, dtype=torch.int64), r"torch.int64 \[3, 32\]"),
        (torch.full((3, 32), float("nan")), "not finite"),
        (torch.zeros(0, 32), "prompt is empty"),
        (torch.zeros(64, 32), "64 tokens and max_model_len is 64"),
        (torch.zeros(32), "two dimensions"),
        ([[0.5] * 32], "two dimensions"),
        (None, "two dimensions"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embeds: Any, reason: str) -> None:
    prompts: list[Any] = [{"prompt_embeds": embeds}]
    with LLM(tiny_model("llama"), block_size=4, num_blocks=32, max_model_len=64) as llm:
        with pytest.raises(InvalidRequestError, match=reason):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.5}, {"prompt_logprobs": 1}, {"generation_kwargs": {"no_repeat_ngram_size": 2}}],
    ids=lambda each: next(iter(each)),
)
def test_parameters_that_look_at_the_prompt_s_tokens_are_refused(options: dict[str, Any]) -> None:
    prompts: list[Any] = [{"prompt_embeds": torch.zeros(3, 32)}]
    with (
        LLM(tiny_model("llama"), block_size=4, num_blocks=32) as llm,
        pytest.raises(InvalidRequestError, match="need the tokens of the prompt"),
    ):
        llm.generate(prompts, SamplingParams(**options), use_tqdm=False)


def test_model_that_makes_something_else_of_embeddings_is_refused_for_them_alone() -> None:
    model = tiny_model("llama")

    def positional(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
        if named.get("inputs_embeds") is not None:
            return arguments, {**named, "inputs_embeds": named["inputs_embeds"] * 2}
        return None

    model.register_forward_pre_hook(positional, with_kwargs=True)
    prompts: list[Any] = [{"prompt_embeds": torch.zeros(3, 32)}]
    with LLM(model, block_size=4, num_blocks=32) as llm:
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM makes something else of inputs_embeds"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0].finished
