"""Models with recurrent, convolutional or linear-attention layers: run as transformers runs them, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from state_models import STATEFUL, state_model
from torch import Tensor

from pagedkv import LLM, SamplingParams
from pagedkv.errors import ConfigError, InvariantError, UnsupportedModelError
from pagedkv.models import ModelRunner, plan_memory
from pagedkv.models.call import ModelCall
from pagedkv.models.recurrence import reads_state_in_chunks
from pagedkv.storage import StateStorage
from pagedkv.testing.alone import GenerateAlone
from pagedkv.testing.models import randomised
from pagedkv.testing.simulated_load import SimulationReport
from pagedkv.testing.simulation import simulate_engine

WHOLE = ("mamba", "falcon_mamba", "jamba")
BRIEF = ("mamba2", "jamba", "lfm2")
PROMPTS = [[5, 9, 31, 60, 7], [8, 44, 3, 90, 12, 71, 15, 6, 33, 2, 19, 28, 54, 29], [77], [40, 41, 42, 43, 44, 45, 46, 47, 48]]


def alone(llm: LLM, prompt: list[int], max_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        model: Any = llm.runner.model
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, eos_token_id=None)
    return tuple(found[0, len(prompt) :].tolist())


def greedy(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, n=n)


def make_llm(name: str, **options: Any) -> LLM:
    return LLM(state_model(name), **{"block_size": 4, "max_model_len": 64, "max_num_seqs": 8, "check": "audit", **options})


@pytest.mark.parametrize("name", [name if name in BRIEF else pytest.param(name, marks=pytest.mark.slow) for name in STATEFUL])
def test_tokens_ragged_chunked_forked_and_preempted_are_those_of_generate(name: str) -> None:
    # 16 tokens a step split the longest prompts, 14 blocks are too few for all, and freed state is NaN at level "audit".
    with make_llm(name, num_blocks=15, max_num_batched_tokens=16) as llm:
        assert llm.runner.recurrent_state == ("whole" if name in WHOLE else "chunked")
        assert llm.runner.report.max_relative_error < 1e-4
        params = [greedy(9), greedy(6, n=2), greedy(12), greedy(7)]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for prompt, wanted, output in zip(PROMPTS, params, outputs, strict=True):
            expected = alone(llm, prompt, wanted.max_tokens or 0)
            assert [each.token_ids for each in output.outputs] == [expected] * wanted.n, f"{name}, prompt {prompt}"
        assert llm.statistics().num_preemptions > 0
        assert llm.statistics().cache.num_copies > 0


def _live(name: str, seeds: range) -> SimulationReport:
    model = state_model(name)
    runner, oracle, total = ModelRunner(model, block_size=4), GenerateAlone(model), SimulationReport()
    for seed in seeds:
        report = simulate_engine(seed, runner, oracle)
        for count in ("num_steps", "num_ended", "num_preemptions", "num_failed_steps", "num_aborted", "num_copies"):
            setattr(total, count, getattr(total, count) + getattr(report, count))
    return total


def test_lives_with_failed_steps_and_aborts_end_with_the_tokens_of_generate() -> None:
    report = _live("mamba", range(4))
    assert report.num_failed_steps
    assert report.num_copies


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_many_lives_end_with_the_tokens_of_generate(name: str) -> None:
    report = _live(name, range(100, 112))
    assert min(report.num_preemptions, report.num_failed_steps, report.num_aborted, report.num_copies) > 0


def test_state_that_only_single_tokens_read_is_found_out_whatever_its_weight() -> None:
    model = state_model("jamba")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)  # then what a lost state changes is far below any bound
    runner = ModelRunner(model, block_size=4)
    assert runner.recurrent_state == "whole"
    assert not reads_state_in_chunks(ModelCall(model), runner.states)
    other = ModelRunner(state_model("lfm2"), block_size=4)
    assert reads_state_in_chunks(ModelCall(other.model), other.states)
    assert "prompts in one piece" in str(runner.tier)
    assert "prompts in chunks" in str(other.tier)


def test_numbers_alone_put_prompts_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.models.tiers.reads_state_in_chunks", lambda *_: True)
    assert ModelRunner(state_model("jamba"), block_size=4).recurrent_state == "whole"


def test_state_kept_on_modules_is_refused_and_named() -> None:
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "lru_width": 32}
    model = randomised(_config("recurrent_gemma", vocab_size=97, block_types=["recurrent", "attention"], **config))
    # Before 5.23, transformers' code of it asks for parts of a cache that ours does not have, and comes no further.
    with pytest.raises(UnsupportedModelError, match=r"state on its modules.*conv1d_state|failed over a paged cache"):
        ModelRunner(model, block_size=4)


@pytest.mark.slow
def test_model_whose_single_steps_are_not_what_its_prompts_are_is_refused() -> None:
    # transformers clamps time steps of zamba2 in prompts, and not token by token.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    mamba = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8}
    types = {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 8}
    model = randomised(_config("zamba2", vocab_size=97, **sizes, **mamba, **types))
    with pytest.raises(UnsupportedModelError, match="self-check failed"):
        ModelRunner(model, block_size=4)


def _config(model_type: str, **arguments: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **arguments)


def test_prefixes_are_not_cached_and_requests_say_why() -> None:
    with make_llm("lfm2", num_blocks=40, enable_prefix_caching=True) as llm:
        for number in range(2):
            llm.generate([PROMPTS[1]], greedy(2), use_tqdm=False)
            assert "recurrent layers" in llm.engine.explain(str(number))
        assert llm.statistics().cache.num_hit_tokens == 0


def test_prompt_over_a_step_goes_on_token_by_token_where_it_must_be_whole() -> None:
    with make_llm("mamba", num_blocks=40, max_num_batched_tokens=8) as llm:
        for number, prompt in enumerate(PROMPTS):
            output = llm.generate([prompt], greedy(5), use_tqdm=False)[0]
            assert output.outputs[0].token_ids == alone(llm, prompt, 5)
            assert ("computed_one_by_one" in llm.engine.explain(str(number))) == (len(prompt) > 8)


def test_state_has_its_own_bytes_in_plans_and_pools() -> None:
    model = state_model("mamba")
    runner = ModelRunner(model, block_size=4)
    each = sum(spec.nbytes for spec in runner.states)
    plan = plan_memory(model.config, block_size=4, memory_bytes=10 * each, max_model_len=64)
    assert (plan.state_nbytes, plan.nbytes_per_token, plan.num_blocks, plan.num_sequences) == (each, 0, None, 10)
    assert "recurrent state of a sequence" in str(plan)
    mixed = plan_memory(state_model("lfm2").config, block_size=4, memory_bytes=10**6, max_model_len=64)
    assert mixed.num_sequences == (10**6 - mixed.nbytes_per_block) // (16 * mixed.nbytes_per_block + mixed.state_nbytes)
    with LLM(model, block_size=4, max_model_len=64, max_num_seqs=3, kv_cache_memory_bytes=3 * each) as llm:
        assert llm.statistics().state_nbytes == 3 * each
        assert llm.engine.num_usable_blocks >= 3 * 16
    with LLM(model, block_size=4, max_model_len=64) as llm:
        for prompts, num_rows in (([[5, 9]], 1), ([[5, 9]] * 3, 3), ([[5, 9]] * 2, 3)):
            outputs = llm.generate(prompts, greedy(3), use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == [alone(llm, [5, 9], 3)] * len(prompts)
            assert llm.statistics().state_nbytes == num_rows * each, "as many slots as the work can use at once"
    with pytest.raises(ConfigError, match=r"recurrent state.*max_num_seqs"):
        LLM(model, block_size=4, max_model_len=64, max_num_seqs=3, kv_cache_memory_bytes=3 * each - 1)


def test_storage_of_another_model_is_refused() -> None:
    runner = ModelRunner(state_model("lfm2"), block_size=4)
    with pytest.raises(ConfigError, match="num_rows is missing"):
        runner.new_storage(8)
    assert runner.new_storage(8, num_rows=2).state is not None


def test_state_that_was_not_followed_is_an_error_and_not_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateStorage, "follow", lambda *_: None)
    with make_llm("lfm2", num_blocks=40) as llm, pytest.raises(InvariantError, match="recurrent state"):
        llm.generate([PROMPTS[0]], greedy(4, n=2), use_tqdm=False)


def test_logits_of_all_prompt_tokens_come_from_several_calls_of_the_model() -> None:
    with make_llm("lfm2", num_blocks=40, max_num_batched_tokens=6) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=1)
        outputs = llm.generate(PROMPTS[:2], params, use_tqdm=False)
        for prompt, output in zip(PROMPTS, outputs, strict=False):
            model: Any = llm.runner.model
            with torch.no_grad():
                own: Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
            entries = output.prompt_logprobs
            assert entries is not None
            for place, (token, entry) in enumerate(zip(prompt[1:], entries[1:], strict=True)):
                assert entry is not None
                assert abs(entry[token].logprob - float(own[place, token])) < 1e-3
