"""The loop seen from outside: streams, aborts, accounts, salts, seeds."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from engine_support import PROMPTS, Prompt, greedy, new_engine, run_all, step, tokens_of

from pagedkv.engine import Engine
from pagedkv.models import ModelRunner
from pagedkv.outputs import RequestOutput
from pagedkv.sampling import SamplingParams
from pagedkv.scheduling import Priority


def test_statistics_obey_their_conservation_laws_after_every_step(runner: ModelRunner) -> None:
    engine = new_engine(runner, 10, max_num_batched_tokens=9)
    for index, prompt in enumerate((*PROMPTS, PROMPTS[2])):
        engine.add_request(str(index), prompt, greedy(6, n=2 if index == 1 else 1), stream=index % 2 == 0)
    before = engine.statistics()
    generated: dict[tuple[str, int], int] = {}
    while engine.has_unfinished:
        for output in step(engine):
            generated.update(((output.request_id, one.index), len(one.token_ids)) for one in output.outputs)
        now = engine.statistics()
        group, cache = now.cache.groups[0], now.cache
        assert group.num_free + group.num_evictable + group.num_in_use == group.num_blocks == engine.num_usable_blocks == 9
        assert group.num_in_use == engine.num_blocks_in_use <= now.peak_blocks_in_use <= 9
        assert group.num_evictable <= group.num_cached
        assert cache.num_hit_tokens <= cache.num_query_tokens
        assert cache.num_reserved_tokens <= cache.num_reserved_slots
        assert 0 <= now.mean_waste < 1
        assert cache.num_seqs == now.num_running <= 9
        assert now.num_steps == before.num_steps + 1
        assert before.num_computed_tokens < now.num_computed_tokens <= before.num_computed_tokens + 9
        for name in ("num_preemptions", "num_generated_tokens", "peak_blocks_in_use"):
            assert getattr(now, name) >= getattr(before, name), name
        before = now
    assert before.num_running == before.num_waiting == before.cache.groups[0].num_in_use == 0
    assert before.num_generated_tokens == sum(generated.values()) == 7 * 6
    assert before.num_preemptions > 0
    assert before.pool_nbytes == 10 * 4 * sum(spec.nbytes_per_token(runner.dtype) for spec in runner.layers)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.num_steps = 0  # type: ignore[misc]


def test_request_streams_an_output_for_every_token_or_only_its_end(runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    engine = new_engine(runner)
    engine.add_request("stream", PROMPTS[0], greedy(5))
    engine.add_request("end", PROMPTS[1], greedy(5), stream=False)
    seen: dict[str, list[RequestOutput]] = {"stream": [], "end": []}
    while engine.has_unfinished:
        for output in step(engine):
            seen[output.request_id].append(output)
    assert [output.outputs[0].token_ids for output in seen["stream"]] == [references[PROMPTS[0]][: count + 1] for count in range(5)]
    assert [output.finished for output in seen["stream"]] == [False] * 4 + [True]
    assert [output.outputs[0].token_ids for output in seen["end"]] == [references[PROMPTS[1]][:5]]


def test_aborted_request_delivers_what_it_has_and_its_blocks_come_back(
    runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]
) -> None:
    for after in range(7):
        engine = new_engine(runner, max_num_batched_tokens=8)
        engine.add_request("other", PROMPTS[1], greedy(7))
        engine.add_request("it", PROMPTS[2], greedy(7, n=2), stream=False)
        engine.add_request("waiting", PROMPTS[2], greedy(7))
        early = [step(engine) for _ in range(after)]
        assert engine.abort("it") is True
        assert engine.abort("it") is False
        ended = run_all(engine) | {output.request_id: output for outputs in early for output in outputs if output.finished}
        for completion in ended["it"].outputs:
            assert completion.finish_reason == "abort"
            assert completion.token_ids == references[PROMPTS[2]][: len(completion.token_ids)], f"aborted after {after} steps"
        assert ended["other"].outputs[0].token_ids == references[PROMPTS[1]][:7], f"aborted after {after} steps"
        assert ended["waiting"].outputs[0].token_ids == references[PROMPTS[2]][:7], f"aborted after {after} steps"
        assert engine.num_blocks_in_use == 0
        assert "abort" in engine.explain("it")


def test_explain_and_events_say_why_for_live_and_ended_requests(runner: ModelRunner) -> None:
    engine = new_engine(runner, 8)
    engine.add_request("first", PROMPTS[2], greedy(8))
    engine.add_request("second", PROMPTS[0], greedy(8))
    engine.add_request("again", PROMPTS[2], greedy(8))
    step(engine)
    assert "waiting" in engine.explain("second")
    assert "num_blocks" in engine.explain("second")
    assert "no full block of the prompt is cached" in engine.explain("first")
    ended = run_all(engine)
    assert engine.explain("first").startswith("request 'first' (0: length)")
    kinds = [str(event.kind) for event in ended["again"].events]
    assert kinds[0] == "submitted"
    assert kinds[-1] == "finished"
    assert ended["again"].num_cached_tokens > 0
    assert engine.explain("again").count("\n") == len(ended["again"].events)


def _sampled(engine: Engine, params: SamplingParams, *, crowd: bool, preempt_after: int = -1) -> list[tuple[int, ...]]:
    if crowd:
        engine.add_request("greedy", PROMPTS[0], greedy(12))
        engine.add_request("random", PROMPTS[4], SamplingParams(temperature=2.0, max_tokens=12, top_k=5))
    engine.add_request("it", PROMPTS[2], params)
    if crowd:
        engine.add_request("same", PROMPTS[2], SamplingParams(temperature=1.0, max_tokens=9, seed=8))
    ended: dict[str, RequestOutput] = {}
    steps = 0
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in step(engine) if output.finished)
        if steps == preempt_after:
            engine.preempt("it")
        steps += 1
    return tokens_of(ended["it"])


def test_seeded_samples_are_the_same_alone_in_a_crowd_and_after_preemption_at_any_step(runner: ModelRunner) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, n=3, seed=7, max_tokens=8, ignore_eos=True, presence_penalty=0.5)
    alone = _sampled(new_engine(runner), params, crowd=False)
    assert len(set(alone)) == 3, "three samples of one seed are three different draws"
    assert _sampled(new_engine(runner), params, crowd=True) == alone
    assert _sampled(new_engine(runner, max_num_batched_tokens=7, seed=5), params, crowd=True) == alone
    for after in range(12):
        assert _sampled(new_engine(runner, seed=after), params, crowd=True, preempt_after=after) == alone, f"preempted after step {after}"
    other = dataclasses.replace(params, seed=8)
    assert _sampled(new_engine(runner), other, crowd=False) != alone


def test_unseeded_samples_follow_the_engines_seed(runner: ModelRunner) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    runs = [_sampled(new_engine(runner, seed=seed), params, crowd=False) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_cache_salt_shares_within_and_never_across(runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]) -> None:
    engine = new_engine(runner)
    hits = {}
    for index, salt in enumerate(("", "a", "b", "", "a", "b", "c")):
        engine.add_request(str(index), {"prompt_token_ids": PROMPTS[2], "cache_salt": salt}, greedy(4))
        output = run_all(engine)[str(index)]
        assert output.outputs[0].token_ids == references[PROMPTS[2]][:4]
        hits[index] = output.num_cached_tokens
    assert hits == {0: 0, 1: 0, 2: 0, 3: 16, 4: 16, 5: 16, 6: 0}
    assert engine.purge_cache("a") > 0
    for salt, cached in (("a", 0), ("b", 16)):
        engine.add_request(salt, {"prompt_token_ids": PROMPTS[2], "cache_salt": salt}, greedy(4))
        assert run_all(engine)[salt].num_cached_tokens == cached


def test_prompt_logprobs_of_a_single_token_prompt_are_just_nothing(runner: ModelRunner) -> None:
    engine = new_engine(runner)
    engine.add_request("it", PROMPTS[3], greedy(2, prompt_logprobs=3, n=2))
    output = run_all(engine)["it"]
    assert output.prompt_logprobs == (None,)
    engine.add_request("without", PROMPTS[3], greedy(2))
    assert run_all(engine)["without"].prompt_logprobs is None


def test_priority_decides_who_is_admitted_first(runner: ModelRunner) -> None:
    engine = Engine(runner, dataclasses.replace(new_engine(runner).config, max_num_seqs=1), policy=Priority())
    engine.add_request("later", PROMPTS[0], greedy(2), priority=5)
    engine.add_request("soon", {"prompt_token_ids": PROMPTS[1], "priority": -1}, greedy(2))
    engine.add_request("overridden", {"prompt_token_ids": PROMPTS[2], "priority": 9}, greedy(2), priority=0)
    assert list(run_all(engine)) == ["soon", "overridden", "later"]


def test_preempt_puts_a_running_request_back_and_says_whether_it_ran(
    runner: ModelRunner, references: dict[Prompt, tuple[int, ...]]
) -> None:
    engine = new_engine(runner)
    engine.add_request("it", PROMPTS[0], greedy())
    assert engine.preempt("it") is False  # it waits
    step(engine)
    assert engine.num_blocks_in_use > 0
    assert engine.preempt("it") is True
    assert engine.num_blocks_in_use == 0
    assert engine.preempt("it") is False
    output = run_all(engine)["it"]
    assert output.outputs[0].token_ids == references[PROMPTS[0]][:8]
    assert output.metrics.num_preemptions == engine.statistics().num_preemptions == 1


def test_outputs_of_a_step_come_in_a_fixed_order(runner: ModelRunner) -> None:
    def order() -> list[list[str]]:
        engine = new_engine(runner, max_num_batched_tokens=32)
        for index in range(8):
            engine.add_request(f"request {index}", PROMPTS[index % 5], greedy(3 + index % 2), stream=index % 3 > 0)
        steps = []
        while engine.has_unfinished:
            steps.append([output.request_id for output in step(engine)])
        return steps

    first = order()
    assert order() == first
    assert all(len(set(ids)) == len(ids) for ids in first), "one output for a request and step"


def test_request_that_does_not_stream_delivers_its_end_alone_though_each_token_is_looked_at(runner: ModelRunner) -> None:
    engine = new_engine(runner)
    engine.add_request("silent", PROMPTS[0], greedy(5, logprobs=1), stream=False)
    delivered = []
    while engine.has_unfinished:
        delivered += step(engine)
    assert [(output.finished, len(output.outputs[0].token_ids)) for output in delivered] == [(True, 5)]


def test_embeddings_are_let_go_of_when_their_request_has_ended_and_its_row_is_another_s(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, as_prompt_embeds = [], runner.as_prompt_embeds

    def noted(values: object) -> torch.Tensor:
        embeds = as_prompt_embeds(values)
        held.append(weakref.ref(embeds))
        return embeds

    monkeypatch.setattr(runner, "as_prompt_embeds", noted)
    engine = new_engine(runner, max_num_seqs=1)
    width = runner.model.get_input_embeddings().weight.shape[1]
    for name, prompt in (("embeddings", {"prompt_embeds": torch.ones(3, width)}), ("tokens", PROMPTS[0])):
        engine.add_request(name, prompt, greedy(2))  # type: ignore[arg-type]
        run_all(engine)
    gc.collect()
    assert [each() for each in held] == [None]
