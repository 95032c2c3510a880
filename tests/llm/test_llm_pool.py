"""How large the pool is: exactly as asked, or as the work needs; and what happens when the device says no."""

from __future__ import annotations

import pytest
from llm_support import TEXTS, VOCAB_SIZE, assert_all_mentioned, generate, greedy, make_llm, make_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pagedkv import LLM, SamplingParams, plan_memory
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, PoolAllocationError, RequestTooLargeError, StepError
from pagedkv.models import ModelRunner
from pagedkv.models.memory import free_memory
from pagedkv.scheduling import Scheduler
from pagedkv.testing.faults import Fault, failing_calls

NBYTES_PER_BLOCK = 4 * 2 * 2 * 2 * 8 * 4  # tokens, layers, K and V, heads, elements, bytes


def test_pool_has_exactly_the_blocks_asked_for(model: PreTrainedModel) -> None:
    with make_llm(model, None, num_blocks=37) as llm:
        assert llm.engine.num_usable_blocks == 36
        assert llm.statistics().pool_nbytes == 37 * NBYTES_PER_BLOCK
        llm.generate([[5, 6, 7]], greedy(), use_tqdm=False)
        assert llm.statistics().pool_nbytes == 37 * NBYTES_PER_BLOCK
        assert plan_memory(model, block_size=4).nbytes_per_block == NBYTES_PER_BLOCK


@pytest.mark.parametrize("spare", [0, 1, NBYTES_PER_BLOCK - 1])
def test_pool_takes_the_whole_blocks_that_fit_the_bytes_given(model: PreTrainedModel, spare: int) -> None:
    with make_llm(model, None, kv_cache_memory_bytes=20 * NBYTES_PER_BLOCK + spare) as llm:
        assert llm.statistics().pool_nbytes == 20 * NBYTES_PER_BLOCK
        assert llm.engine.num_usable_blocks == 19


def test_pool_without_a_size_is_what_the_work_can_use_and_grows_for_larger_work_only(model: PreTrainedModel) -> None:
    with make_llm(model, None) as llm:
        with pytest.raises(ConfigError, match="num_blocks"):
            _ = llm.engine
        llm.generate([[5, 6, 7]], greedy(5), use_tqdm=False)
        first = llm.statistics()
        assert 2 + 1 <= first.cache.groups[0].num_blocks + 1 <= 2 + 4  # 8 tokens: two blocks, the null block, and rounding
        assert first.num_preemptions == 0
        llm.generate([[5, 6, 7]], greedy(4), use_tqdm=False)
        assert llm.statistics().pool_nbytes == first.pool_nbytes
        assert llm.statistics().num_steps > first.num_steps, "the same engine"
        outputs = llm.generate([[5, 6, index] for index in range(9)], greedy(12), use_tqdm=False)
        second = llm.statistics()
        assert second.num_preemptions == 0
        assert 9 * 4 <= second.cache.groups[0].num_blocks <= 9 * 4 * 1.02 + 4
        for index, output in enumerate(outputs):
            assert output.outputs[0].token_ids == generate(model, [5, 6, index], 12)
        llm.generate([[5, 6, 7]], greedy(5), use_tqdm=False)
        assert llm.statistics().pool_nbytes == second.pool_nbytes, "it does not shrink"


def test_pool_grows_after_a_stream_that_was_left_but_not_while_one_runs(model: PreTrainedModel) -> None:
    with make_llm(model, None) as llm:
        small = llm.stream([[5, 6, 7]], greedy(5))
        next(small)
        before = llm.statistics().pool_nbytes
        with pytest.raises(RequestTooLargeError):
            llm.generate([[5] * 60], greedy(40), use_tqdm=False)
        assert llm.statistics().pool_nbytes == before
        assert [output.finished for output in small][-1] is True
        left = llm.stream([[5, 6, 7]], greedy(5))
        next(left)
        left.close()  # type: ignore[attr-defined]
        (output,) = llm.generate([[5] * 60], greedy(40), use_tqdm=False)
        assert output.outputs[0].token_ids == generate(model, [5] * 60, 40)
        assert llm.statistics().pool_nbytes > before


def test_pool_never_takes_more_than_its_share_of_free_memory(model: PreTrainedModel) -> None:
    block = NBYTES_PER_BLOCK / free_memory(model.device)
    with make_llm(model, None, memory_share=30 * block) as llm:
        outputs = llm.generate([[5, 6, index] for index in range(200)], greedy(4), use_tqdm=False)
        assert 15 < llm.statistics().cache.groups[0].num_blocks < 60  # others take and give memory meanwhile
        assert outputs[77].outputs[0].token_ids == generate(model, [5, 6, 77], 4)
    with make_llm(model, None, memory_share=block) as llm:
        with pytest.raises(ConfigError) as caught:
            llm.generate([[5, 6, 7]], greedy(), use_tqdm=False)
        assert_all_mentioned(str(caught.value), [f"memory_share={block}", "bytes", "blocks", "at least 2"])


def test_pool_that_the_device_refuses_is_named_in_bytes_and_leaves_nothing(model: PreTrainedModel) -> None:
    with pytest.raises(PoolAllocationError) as caught:
        make_llm(model, None, num_blocks=2**31 - 1)
    assert_all_mentioned(str(caught.value), ["bytes", str(2**31 - 1), "num_blocks"])
    with make_llm(model, None, num_blocks=9) as llm:
        assert llm.generate([[5, 6]], greedy(), use_tqdm=False)[0].outputs[0].token_ids == generate(model, [5, 6])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_blocks": 0}, ["num_blocks", "0", "at least 2"]),
        ({"num_blocks": -3}, ["num_blocks", "-3"]),
        ({"kv_cache_memory_bytes": 0}, ["kv_cache_memory_bytes", "0", "at least 1"]),
        ({"kv_cache_memory_bytes": -1}, ["kv_cache_memory_bytes", "-1", "at least 1"]),
        ({"kv_cache_memory_bytes": NBYTES_PER_BLOCK}, ["kv_cache_memory_bytes", str(NBYTES_PER_BLOCK), "1 blocks", "at least 2"]),
        ({"num_blocks": 9, "kv_cache_memory_bytes": 9999}, ["num_blocks", "kv_cache_memory_bytes", "one"]),
        ({"memory_share": 0.0}, ["memory_share", "0.0"]),
        ({"memory_share": 1.1}, ["memory_share", "1.1"]),
        ({"memory_share": float("nan")}, ["memory_share", "nan"]),
        ({"block_size": 0}, ["block_size", "0", "at least 1"]),
        ({"block_size": -1}, ["block_size", "-1"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "0"]),
        ({"max_num_batched_tokens": -1}, ["max_num_batched_tokens", "-1"]),
        ({"max_model_len": 1}, ["max_model_len", "1"]),
        ({"max_model_len": 300}, ["max_model_len", "300", "256"]),
        ({"scheduling_policy": "lifo"}, ["scheduling_policy", "lifo", "fcfs", "priority", "longest_prefix"]),
        ({"attention_backend": "no-such"}, ["no-such", "torch", "reference"]),
        ({"attention_backend": 7}, ["7", "AttentionBackend"]),
        ({"seed": "x"}, ["seed", "'x'"]),
    ],
    ids=str,
)
def test_setting_that_cannot_work_is_refused_and_named(model: PreTrainedModel, settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_llm(model, None, **settings)
    assert_all_mentioned(str(caught.value), words)


def test_unknown_setting_is_a_type_error(model: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="gpu_memory_utilization"):
        LLM(model, gpu_memory_utilization=0.9)  # type: ignore[call-arg]


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training mode.*inference.*model\.eval\(\)"):
        make_llm(make_model().train(), None)


def test_closed_llm_refuses_work_and_leaves_the_model_as_it_was(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    want = generate(model, [5, 6, 7])
    with make_llm(model, tokenizer) as llm:
        llm.generate(TEXTS, greedy(3), use_tqdm=False)
    llm.close()
    for use in (llm.generate, llm.stream, lambda prompt: llm.chat([{"role": "user", "content": prompt}])):
        with pytest.raises(ClosedError):
            use("one")
    assert generate(model, [5, 6, 7]) == want
    assert len(model.get_input_embeddings().weight) == VOCAB_SIZE


def test_bad_request_among_good_ones_starts_nothing(llm: LLM) -> None:
    before = llm.statistics()
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate([[5, 6], [7, 999], [8]], greedy(), use_tqdm=False)
    assert_all_mentioned(str(caught.value), ["999", "0 to 319"])
    with pytest.raises(RequestTooLargeError) as too_large:
        llm.generate([[5, 6], [7]], [greedy(), SamplingParams(n=300)], use_tqdm=False)
    assert_all_mentioned(str(too_large.value), ["300", "256", "max_num_seqs"])
    assert llm.statistics() == before


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([], None, ["prompts", "empty"]),
        ([[]], None, ["empty", "at least one token"]),
        ("", None, ["empty"]),
        (7, None, ["prompts", "int"]),
        ([[5], None], None, ["None"]),
        ([[5], [6]], [SamplingParams()], ["1 sampling_params", "2 prompts"]),
        ([[5]], [], ["0 sampling_params", "1 prompts"]),
        ([[5]], {"temperature": 0}, ["dict", "SamplingParams"]),
        ([[5]], [{"temperature": 0}], ["dict", "SamplingParams"]),
        ([[5]], "greedy", ["str", "SamplingParams"]),
        ([[5] * 256], None, ["256", "max_model_len"]),
        ([{"prompt": 5}], None, ["prompt", "int", "text"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_prompts_or_params_are_refused_and_start_nothing(llm: LLM, prompts: object, params: object, words: list[str]) -> None:
    before = llm.statistics()
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    assert_all_mentioned(str(caught.value), words)
    assert llm.statistics() == before


def test_bad_conversations_are_refused(llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for messages, words in (([], ["empty"]), ([[]], ["conversation is empty"]), ([[{"role": "user", "content": "x"}], []], ["empty"])):
        with pytest.raises(InvalidRequestError) as caught:
            llm.chat(messages, greedy(), use_tqdm=False)  # type: ignore[arg-type]
        assert_all_mentioned(str(caught.value), words)
    with make_llm(model, None) as without, pytest.raises(InvalidRequestError, match="tokenizer"):
        without.chat([{"role": "user", "content": "x"}])


def test_failed_step_of_generate_ends_its_requests_and_the_next_call_works(
    model: PreTrainedModel, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", broken)
        with pytest.raises(StepError, match="no more"):
            llm.generate(TEXTS, greedy(), use_tqdm=False)
    statistics = llm.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.cache.groups[0].num_in_use) == (0, 0, 0)
    assert llm.generate([[5, 6]], greedy(), use_tqdm=False)[0].outputs[0].token_ids == generate(model, [5, 6])


def test_reset_of_the_prefix_cache_makes_the_prefixes_of_all_salts_unfindable(model: PreTrainedModel) -> None:
    prompts = [{"prompt_token_ids": list(range(5, 30)), "cache_salt": salt} for salt in ("", "a")]
    with make_llm(model, None) as llm:
        assert llm.reset_prefix_cache() == 0, "nothing was computed yet"
        for hits in (0, 24, 24):
            outputs = llm.generate(prompts, greedy(1), use_tqdm=False)
            assert [output.num_cached_tokens for output in outputs] == [hits, hits]
        assert llm.reset_prefix_cache() == 2 * 6
        assert [output.num_cached_tokens for output in llm.generate(prompts, greedy(1), use_tqdm=False)] == [0, 0]


@pytest.mark.parametrize("num_blocks", [None, 30])
def test_engine_that_an_interrupt_has_broken_is_replaced_for_the_next_work(model: PreTrainedModel, num_blocks: int | None) -> None:
    with make_llm(model, None, num_blocks=num_blocks) as llm:
        (before,) = llm.generate([[5, 6, 7]], greedy(), use_tqdm=False)
        engine = llm.engine
        with pytest.raises(KeyboardInterrupt), failing_calls(Scheduler, "take_ended", Fault(0, error=KeyboardInterrupt)):
            llm.generate([[5, 6, 8]], greedy(), use_tqdm=False)
        assert engine.is_broken
        (after,) = llm.generate([[5, 6, 7]], greedy(), use_tqdm=False)
        assert after.outputs == before.outputs
        assert llm.engine is not engine
        assert llm.engine.num_usable_blocks == engine.num_usable_blocks
        assert llm.engine.num_blocks_in_use == 0


def test_work_after_a_larger_pool_was_refused_starts_afresh(model: PreTrainedModel) -> None:
    refusal = Fault(0, error=lambda: PoolAllocationError("no memory for the larger one"))
    with make_llm(model, None) as llm:
        llm.generate([[5, 6, 7]], greedy(5), use_tqdm=False)
        with failing_calls(ModelRunner, "new_storage", refusal), pytest.raises(PoolAllocationError, match="larger one"):
            llm.generate([[5, 6, index] for index in range(9)], greedy(12), use_tqdm=False)
        (output,) = llm.generate([[5, 6, 7]], greedy(5), use_tqdm=False)
        assert output.outputs[0].token_ids == generate(model, [5, 6, 7], 5)
