"""Hidden states at batched speed: those that the model's own body gives for each prompt alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pagedkv import LLM, Engine, EngineConfig, ModelRunner, PoolingParams, SamplingParams
from pagedkv.errors import ClosedError, InvalidRequestError, StepError, UnsupportedModelError
from pagedkv.testing.models import TINY_MODELS, randomised, tiny_model

OTHERS = tuple(name for name in TINY_MODELS if name not in ("llama", "gemma3", "opt"))
LENGTHS = (1, 5, 23, 40, 17, 33)
BLOOM = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}


def prompts_of(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    trunk = torch.randint(3, 97, (max(LENGTHS),), generator=generator).tolist()
    return [
        trunk[:length] if index % 2 else torch.randint(3, 97, (length,), generator=generator).tolist()
        for index, length in enumerate(LENGTHS)
    ]


def states_of(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    with torch.no_grad():
        output = model.base_model(input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
    states: Tensor = output.last_hidden_state[0]
    if model.config.model_type != "opt":  # of whose hidden states transformers gives the last as it is before the final norm
        assert torch.equal(states, output.hidden_states[-1][0])
    return states


def pooled(states: Tensor, params: PoolingParams) -> np.ndarray[Any, Any]:
    result = {"last": states[-1], "mean": states.mean(dim=0), "all": states}[params.pooling]
    return (torch.nn.functional.normalize(result, dim=-1) if params.normalize else result).numpy()


def assert_near(ours: Any, theirs: np.ndarray[Any, Any], what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == np.float32
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference < 1e-4, f"{what}: off by {difference:.1e}"


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bloom", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_embeddings_equal_the_model_s_own_hidden_states_in_chunks_with_prefix_hits_and_preemptions(name: str) -> None:
    model = randomised(AutoConfig.for_model("bloom", **BLOOM)) if name == "bloom" else tiny_model(name)
    prompts = prompts_of(seed=1)
    with LLM(model, block_size=4, num_blocks=24, max_num_batched_tokens=16, max_model_len=64, check="audit") as llm:
        for params in (PoolingParams(), PoolingParams("mean"), PoolingParams("all", normalize=True), PoolingParams("last", normalize=True)):
            outputs = llm.embed(prompts, params, use_tqdm=False)
            for prompt, output in zip(prompts, outputs, strict=True):
                assert output.prompt_token_ids == tuple(prompt)
                assert output.outputs is not None
                assert_near(output.outputs.embedding, pooled(states_of(model, prompt), params), f"{name}, {params}, {len(prompt)} tokens")
                if params.whole_prompt:
                    assert output.num_cached_tokens == 0
        assert any(output.num_cached_tokens for output in outputs), "the last token's state is there with a cached prefix, too"
        assert llm.engine.num_blocks_in_use == 0


def test_embeddings_and_texts_share_steps_and_do_not_change_each_other() -> None:
    model = tiny_model("llama")
    prompts = prompts_of(seed=2)
    engine = Engine(
        ModelRunner(model, block_size=4), EngineConfig(num_blocks=40, max_num_batched_tokens=20, max_model_len=64, check="audit")
    )
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    alone = []
    for prompt in prompts:
        engine.add_request("one", prompt, greedy, stream=False)
        while engine.has_unfinished:
            alone += engine.step()
    engine.reset_prefix_cache()
    kinds = [PoolingParams(), PoolingParams("mean"), PoolingParams("all")]
    for index, prompt in enumerate(prompts):
        engine.add_request(f"text {index}", prompt, greedy, stream=False)
        engine.add_request(f"embedding {index}", prompt, kinds[index % 3], stream=bool(index % 2))
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    for index, prompt in enumerate(prompts):
        text, embedding = outputs[f"text {index}"], outputs[f"embedding {index}"]
        assert text.outputs[0].token_ids == alone[index].outputs[0].token_ids
        assert text.embedding is None
        ours, theirs = (
            [next(iter(entry.values())).logprob for entry in output.prompt_logprobs or () if entry] for output in (text, alone[index])
        )
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert embedding.outputs == ()
        assert embedding.finished
        assert_near(embedding.embedding, pooled(states_of(model, prompt), kinds[index % 3]), f"{kinds[index % 3]}")
    assert not outputs["embedding 0"].embedding.flags.writeable
    engine.close()


def test_of_a_prompt_that_is_pooled_the_head_reads_one_row() -> None:
    model = tiny_model("llama")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: rows.append(arguments[0].shape[1]))
    with LLM(model, block_size=4) as llm:
        rows.clear()
        llm.embed([[5] * 30, [6] * 20], PoolingParams("all"), use_tqdm=False)
    assert sum(rows) == 2 + 3, "one for each prompt, and three of the proof"


def test_embedding_of_a_request_that_is_aborted_or_ends_in_an_error_is_none() -> None:
    model = tiny_model("llama")
    with LLM(model, block_size=4, num_blocks=16) as llm:
        llm.engine.add_request("gone", [5, 6, 7], PoolingParams())
        llm.engine.abort("gone")
        (output,) = llm.engine.step()
        assert (output.finished, output.embedding, output.outputs) == (True, None, ())
        with torch.no_grad():
            model.model.embed_tokens.weight[9] = float("nan")
        good, bad = llm.embed([[5, 6], [9, 9]], use_tqdm=False)
        assert good.outputs is not None
        assert good.error is None
        assert bad.outputs is None
        assert "finite" in str(bad.error)


def test_wrong_pooling_is_refused_and_nothing_started() -> None:
    with LLM(tiny_model("llama"), block_size=4, num_blocks=16) as llm:
        for pooling in ("first", 3, None):
            with pytest.raises(InvalidRequestError, match="pooling is"):
                PoolingParams(pooling)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="normalize is 1"):
            PoolingParams(normalize=1)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="pooling_params is"):
            llm.embed([[5]], SamplingParams())  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="empty"):
            llm.embed([[5], []])
        assert not llm.engine.has_unfinished
    with pytest.raises(ClosedError):
        llm.embed([[5]])


def test_model_whose_body_is_called_more_than_once_is_refused_for_embeddings_alone() -> None:
    model = tiny_model("llama")
    with LLM(model, block_size=4) as llm:
        twice = model.register_forward_pre_hook(
            lambda module, arguments, named: module.model(input_ids=torch.tensor([[5]])) and None, with_kwargs=True
        )
        with pytest.raises(UnsupportedModelError, match="no part of LlamaForCausalLM gives one hidden state for each token"):
            llm.embed([[5, 6]], use_tqdm=False)
        twice.remove()
        assert llm.embed([[5, 6]], use_tqdm=False)[0].outputs is not None


def test_failed_step_takes_no_state_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = Engine(ModelRunner(model, block_size=4), EngineConfig(num_blocks=40, max_num_batched_tokens=8, max_model_len=64))
    prompt = prompts_of(seed=3)[3]
    engine.add_request("mean", prompt, PoolingParams("mean"))
    engine.step()
    failing = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(StepError, match="no room"):
        engine.step()
    failing.remove()
    assert engine.preempt("mean")
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert_near(outputs[-1].embedding, pooled(states_of(model, prompt), PoolingParams("mean")), "after a failure and a preemption")
    engine.close()
