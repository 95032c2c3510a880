from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_helpers import arange, make_histories, make_sampler, reference_scores
from transformers.generation.logits_process import EpsilonLogitsWarper, NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor

from pagedkv.errors import InvalidRequestError, InvariantError, UnknownHandleError
from pagedkv.sampling import Sampler, SamplingParams

GREEDY = SamplingParams(temperature=0)


def normal(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, vocab_size)).astype(np.float32) * 3)


def scores_of(params: SamplingParams, logits: torch.Tensor, history: list[int], prompt: list[int], **kwargs) -> torch.Tensor:
    sampler = Sampler(logits.shape[-1], "cpu")
    sampler.add(0, params, prompt_token_ids=prompt, seed=0, index=0, **kwargs)
    return sampler.scores(logits[None], arange(1), make_histories([history]))[0]


def forbidden(scores: torch.Tensor) -> list[int]:
    return scores.isneginf().nonzero().flatten().tolist()


def test_sample_greedy_rows_equal_argmax_and_leave_logits_alone() -> None:
    logits = normal(6, 1000)
    before = logits.clone()
    got = make_sampler([GREEDY] * 6, vocab_size=1000).sample(logits, arange(6), make_histories([[1]] * 6))
    assert got.token_ids.dtype == np.int64
    assert got.token_ids.tolist() == before.argmax(-1).tolist()
    assert got.logprobs is None
    assert not got.errors
    assert torch.equal(logits, before)


def test_sample_mixed_rows_leave_logits_and_histories_alone() -> None:
    params = [GREEDY, SamplingParams(top_p=0.5), SamplingParams(logit_bias={3: 50.0}, temperature=0), SamplingParams(presence_penalty=1.0)]
    logits, histories = normal(4, 300), make_histories([[1, 2, 3, 4]] * 4)
    before, tokens = logits.clone(), histories.tokens.copy()
    got = make_sampler(params, vocab_size=300).sample(logits, arange(4), histories)
    assert got.token_ids[0] == before[0].argmax()
    assert got.token_ids[2] == 3
    assert torch.equal(logits, before)
    assert np.array_equal(histories.tokens, tokens)


def test_sample_no_rows_gives_nothing() -> None:
    sampler = make_sampler([SamplingParams()], vocab_size=9)
    assert len(sampler.sample(torch.empty(0, 9), arange(0), make_histories([[1]])).token_ids) == 0


def test_presence_and_frequency_count_output_only_as_defined() -> None:
    logits = normal(1, 20)[0]
    got = scores_of(
        SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), logits, [4, 4, 7, 8, 8, 8], prompt=[4, 4, 7]
    )
    expected = logits.clone()
    expected[8] -= 0.5 + 3 * 0.25
    assert torch.equal(got, expected)


def test_repetition_counts_prompt_and_output_and_equals_transformers() -> None:
    logits = normal(1, 20)[0]
    params = SamplingParams(repetition_penalty=1.7)
    got = scores_of(params, logits, [4, 4, 7, 8, 8], prompt=[4, 4, 7])
    assert torch.equal(got, reference_scores(logits, params, [4, 4, 7, 8, 8]))
    assert (got != logits).nonzero().flatten().tolist() == [4, 7, 8]


def test_repetition_history_beyond_logits_width_is_ignored() -> None:
    logits = normal(1, 6)[0]
    got = scores_of(SamplingParams(temperature=0, repetition_penalty=2.0), logits, [1, 99], prompt=[1, 99])
    assert (got != logits).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("history", [[5], [5, 1], [5, 1, 2], [1, 2, 1], [2], [9, 9]])
def test_bad_words_equal_transformers(history: list[int]) -> None:
    words = [[3], [1, 2], [1, 2, 4], [9, 9, 9, 9]]
    logits = normal(1, 12)[0]
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([history]), logits[None])[0]
    got = scores_of(
        SamplingParams(temperature=0, bad_words_token_ids=words[:2]), logits, history, prompt=[5], bad_words_token_ids=words[2:]
    )
    assert forbidden(got) == forbidden(expected)
    assert 3 in forbidden(got)


@pytest.mark.parametrize(("num_output", "expected"), [(0, [2, 6, 9]), (2, [2, 6, 9]), (3, [])])
def test_min_tokens_forbids_ends_until_reached(num_output: int, expected: list[int]) -> None:
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[9])
    got = scores_of(params, normal(1, 12)[0], [1, 1] + [4] * num_output, prompt=[1, 1], eos_token_ids=[2, 6])
    assert forbidden(got) == expected


def test_allowed_token_ids_and_bias_apply_together() -> None:
    logits = normal(1, 12)[0]
    got = scores_of(SamplingParams(temperature=0, allowed_token_ids=[8, 3], logit_bias={3: 2.5, 4: 100.0}), logits, [1], prompt=[1])
    assert forbidden(got) == [i for i in range(12) if i not in (3, 8)]
    assert got[3] == logits[3] + 2.5
    assert got[8] == logits[8]


def test_processors_and_warpers_equal_transformers_on_their_row_only() -> None:
    logits, history = normal(2, 50), [4, 5, 6, 4, 5]
    ngram, epsilon = NoRepeatNGramLogitsProcessor(3), EpsilonLogitsWarper(0.05)
    params = SamplingParams(temperature=1.3, top_k=20)
    sampler = Sampler(50, "cpu")
    sampler.add(0, params, prompt_token_ids=history, seed=0, index=0, processors=[ngram], warpers=[epsilon])
    sampler.add(1, params, prompt_token_ids=history, seed=0, index=0)
    got = sampler.scores(logits, arange(2), make_histories([history] * 2))
    ids = torch.tensor([history])
    expected = epsilon(ids, reference_scores(ngram(ids, logits[:1])[0], params, history)[None])[0]
    assert torch.equal(got[0], expected)
    assert torch.equal(got[1], reference_scores(logits[1], params, history))
    drawn = sampler.sample(logits, arange(2), make_histories([history] * 2))
    assert expected[drawn.token_ids[0]].isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0, logprobs=1)])
def test_sample_row_with_bad_logits_fails_alone(params: SamplingParams, value: float) -> None:
    logits, histories = normal(5, 64), make_histories([[1]] * 5)
    sampler = make_sampler([params] * 5, vocab_size=64)
    healthy = sampler.sample(logits, arange(5), histories)
    logits[2, 17] = value
    got = sampler.sample(logits, arange(5), histories)
    assert list(got.errors) == [2]
    assert isinstance(got.errors[2], InvariantError)
    assert got.token_ids[2] == -1
    others = [0, 1, 3, 4]
    assert got.token_ids[others].tolist() == healthy.token_ids[others].tolist()
    if got.logprobs is not None:
        assert [entry is None for entry in got.logprobs] == [False, False, True, False, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_no_token_left_fails_that_row_with_what_to_change(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_token_ids=[3], bad_words_token_ids=[[3]])
    sampler = make_sampler([params, GREEDY], vocab_size=8)
    got = sampler.sample(normal(2, 8), arange(2), make_histories([[1]] * 2))
    assert list(got.errors) == [0]
    assert isinstance(got.errors[0], InvalidRequestError)
    assert "allowed_token_ids" in str(got.errors[0])
    assert got.token_ids[1] >= 0


def _raises(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("boom")


def _narrow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores[:, :3]


def _all_masked(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, -torch.inf)


@pytest.mark.parametrize("place", ["processors", "warpers"])
@pytest.mark.parametrize("bad", [_raises, _narrow, _all_masked])
def test_sample_processor_that_fails_ends_its_row_only(place: str, bad) -> None:
    sampler = Sampler(30, "cpu")
    sampler.add(0, SamplingParams(), prompt_token_ids=[1], seed=0, index=0)
    sampler.add(1, SamplingParams(), prompt_token_ids=[1], seed=0, index=0, **{place: [bad]})
    got = sampler.sample(normal(2, 30), arange(2), make_histories([[1]] * 2))
    assert list(got.errors) == [1]
    assert got.token_ids[1] == -1
    assert got.token_ids[0] >= 0
    if bad is _raises:
        assert "boom" in str(got.errors[1])
        assert isinstance(got.errors[1].__cause__, RuntimeError)


def test_sample_same_seed_draws_same_tokens_at_other_rows_and_later() -> None:
    logits, params = normal(1, 400).repeat(2, 1), SamplingParams(temperature=1.5)
    sampler = Sampler(400, "cpu", max_rows=1)
    for row in (0, 300):  # far beyond the rows reserved
        sampler.add(row, params, prompt_token_ids=[1], seed=77, index=0)
    histories = make_histories([[1] * 5] * 301)
    first = sampler.sample(logits, np.array([0, 300]), histories).token_ids
    assert first[0] == first[1]
    sampler.remove(0)
    sampler.add(0, params, prompt_token_ids=[1], seed=77, index=0)  # as after a preemption
    assert sampler.sample(logits[:1], arange(1), histories).token_ids[0] == first[0]


def test_sample_other_index_or_position_draws_other_numbers() -> None:
    logits, params = torch.zeros(64, 10_000), SamplingParams()
    sampler = Sampler(10_000, "cpu")
    for row in range(64):
        sampler.add(row, params, prompt_token_ids=[1], seed=1, index=row)
    tokens = [sampler.sample(logits, arange(64), make_histories([[1] * length] * 64)).token_ids for length in (1, 2)]
    assert len(set(np.concatenate(tokens).tolist())) > 120


def test_add_taken_row_or_id_beyond_vocabulary_raises_and_changes_nothing() -> None:
    sampler = make_sampler([GREEDY], vocab_size=10)
    with pytest.raises(InvalidRequestError, match="row 0"):
        sampler.add(0, SamplingParams(), prompt_token_ids=[1], seed=0, index=0)
    for options, extra in (({"stop_token_ids": [10]}, {}), ({}, {"bad_words_token_ids": [[10]]}), ({"bad_words": ["x"]}, {})):
        with pytest.raises(InvalidRequestError):
            sampler.add(1, SamplingParams(**options), prompt_token_ids=[1], seed=0, index=0, **extra)
    with pytest.raises(InvalidRequestError):
        sampler.add(-1, SamplingParams(), prompt_token_ids=[1], seed=0, index=0)
    assert sampler.num_rows == 1
    with pytest.raises(InvalidRequestError, match="vocab_size"):
        Sampler(0, "cpu")


def test_remove_unknown_row_raises_and_sample_of_removed_row_raises() -> None:
    sampler = make_sampler([GREEDY, GREEDY], vocab_size=10)
    sampler.remove(1)
    for row in (1, 5, -1, 1000):
        with pytest.raises(UnknownHandleError, match=str(row)):
            sampler.remove(row)
    with pytest.raises(UnknownHandleError, match="row 1"):
        sampler.sample(normal(2, 10), arange(2), make_histories([[1]] * 2))
    assert sampler.num_rows == 1


@pytest.mark.parametrize("logits", [torch.zeros(2, 10), torch.zeros(1, 9), torch.zeros(10), torch.zeros(1, 10, dtype=torch.float64)])
def test_sample_wrong_shape_or_dtype_raises(logits: torch.Tensor) -> None:
    with pytest.raises(InvalidRequestError, match="logits"):
        make_sampler([GREEDY], vocab_size=10).sample(logits, arange(1), make_histories([[1]]))


def test_scores_of_a_failing_row_raises() -> None:
    sampler = Sampler(10, "cpu")
    sampler.add(0, GREEDY, prompt_token_ids=[1], seed=0, index=0, processors=[_raises])
    with pytest.raises(InvalidRequestError, match="boom"):
        sampler.scores(normal(1, 10), arange(1), make_histories([[1]]))


def test_sample_many_rows_over_several_chunks_equals_argmax_and_single_calls() -> None:
    vocab_size, num = 200_003, 25
    params = [GREEDY if row % 2 else SamplingParams(top_k=5, logprobs=0) for row in range(num)]
    logits, histories = normal(num, vocab_size), make_histories([[1]] * num)
    logits[13, 5] = float("nan")
    sampler = make_sampler(params, vocab_size=vocab_size)
    got = sampler.sample(logits, arange(num), histories)
    assert list(got.errors) == [13]
    for row in set(range(num)) - {13}:
        single = sampler.sample(logits[row : row + 1], arange(num)[row : row + 1], histories)
        assert got.token_ids[row] == single.token_ids[0], row
        assert row % 2 == 0 or got.token_ids[row] == logits[row].argmax()


def test_sample_inside_and_outside_inference_mode_agree() -> None:
    params = [SamplingParams(top_p=0.8, repetition_penalty=1.2), SamplingParams(temperature=2.0, logprobs=2)]
    sampler, histories = make_sampler(params, vocab_size=100), make_histories([[1, 2]] * 2)
    with torch.inference_mode():
        logits = normal(2, 100)
        inside = sampler.sample(logits, arange(2), histories).token_ids
    assert sampler.sample(logits, arange(2), histories).token_ids.tolist() == inside.tolist()
    assert sampler.sample(normal(2, 100).requires_grad_(), arange(2), histories).token_ids.tolist() == inside.tolist()
