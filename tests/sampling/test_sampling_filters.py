"""What the filters leave, against transformers' own warpers, and that every path to a token finds the same one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_helpers import arange, make_histories, make_sampler, reference_scores

from pagedkv.sampling import SamplingParams

HISTORY = [1, 2, 3, 7, 7, 9]


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=float(rng.uniform(0.2, 2.0)),
        top_k=int(maybe(int(rng.integers(1, 700)), 0)),
        top_p=maybe(float(rng.uniform(0.05, 0.999)), 1.0),
        min_p=maybe(float(rng.uniform(0.0, 0.5)), 0.0),
        typical_p=maybe(float(rng.uniform(0.1, 0.99)), 1.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
    )


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 63, 257, 1000, 5003])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_scores_random_settings_equal_transformers(vocab_size: int, scale: float) -> None:
    rng = np.random.default_rng(vocab_size)
    params = [random_params(rng) for _ in range(40)]
    history = [token % vocab_size for token in HISTORY]
    logits = torch.from_numpy(rng.normal(size=(40, vocab_size)).astype(np.float32) * scale)
    sampler = make_sampler(params, vocab_size=vocab_size)
    got = sampler.scores(logits, arange(40), make_histories([history] * 40))
    for row, each in enumerate(params):
        expected = reference_scores(logits[row], each, history)
        differing = (got[row] != expected).nonzero().flatten().tolist()
        assert not differing, (vocab_size, row, each, differing[:5])


def test_scores_masked_tokens_stay_masked_with_every_filter() -> None:
    logits = torch.full((4, 300), -torch.inf)
    logits[:, [5, 200]] = torch.tensor([1.0, 2.0])
    params = [SamplingParams(top_k=50), SamplingParams(top_p=0.99), SamplingParams(min_p=0.01), SamplingParams(typical_p=0.99)]
    got = make_sampler(params, vocab_size=300).scores(logits, arange(4), make_histories([HISTORY] * 4))
    assert [row.isfinite().nonzero().flatten().tolist() for row in got] == [[5, 200]] * 4


def test_top_p_among_equal_tokens_keeps_lower_ids_and_top_k_keeps_all() -> None:
    logits = torch.zeros(2, 8)
    got = make_sampler([SamplingParams(top_p=0.5), SamplingParams(top_k=2)], vocab_size=8).scores(
        logits, arange(2), make_histories([[1]] * 2)
    )
    assert got[0].isfinite().tolist() == [True] * 4 + [False] * 4
    assert got[1].isfinite().all()


def test_top_p_flat_distribution_beyond_any_prefilter_equals_transformers() -> None:
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(size=(1, 20_000)).astype(np.float32) * 1e-2)
    params = SamplingParams(top_p=0.97)
    got = make_sampler([params], vocab_size=20_000).scores(logits, arange(1), make_histories([[1]]))
    assert torch.equal(got[0], reference_scores(logits[0], params, [1]))


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1024, 4099])
def test_sample_over_all_tokens_and_over_candidates_picks_the_same(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(rng.normal(size=(1, vocab_size)).astype(np.float32) * 3).repeat(300, 1)
    neutral = [
        SamplingParams(),
        SamplingParams(top_k=vocab_size),
        SamplingParams(top_p=1.0 - 1e-13),
        SamplingParams(min_p=1e-30),
    ]
    drawn = []
    for params in neutral:
        sampler = make_sampler([params] * 300, vocab_size=vocab_size, seed=11)
        drawn.append(sampler.sample(logits, arange(300), make_histories([[1]] * 300)).token_ids)
    for params, tokens in zip(neutral[1:], drawn[1:], strict=True):
        assert np.array_equal(drawn[0], tokens), (vocab_size, params, np.flatnonzero(drawn[0] != tokens))


@pytest.mark.parametrize("vocab_size", [97, 1000, 4099])
def test_sample_of_a_row_does_not_depend_on_other_rows(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    params = [random_params(rng) if row % 3 else SamplingParams(temperature=1.0 + row / 50) for row in range(48)]
    logits = torch.from_numpy(rng.normal(size=(48, vocab_size)).astype(np.float32) * 2)
    logits = logits.bfloat16().float() if vocab_size == 1000 else logits  # equal logits are common in half precision
    sampler, histories = make_sampler(params, vocab_size=vocab_size, seed=5), make_histories([HISTORY] * 48)
    together = sampler.sample(logits, arange(48), histories).token_ids
    alone = [int(sampler.sample(logits[i : i + 1], arange(48)[i : i + 1], histories).token_ids[0]) for i in range(48)]
    assert together.tolist() == alone
    order = rng.permutation(48)
    shuffled = sampler.sample(logits[torch.from_numpy(order)], order, histories).token_ids
    assert np.array_equal(shuffled, together[order])


def test_sample_draws_only_survivors_and_all_of_them() -> None:
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(rng.normal(size=(1, 500)).astype(np.float32) * 2).repeat(600, 1)
    for params in (SamplingParams(top_k=4), SamplingParams(top_p=0.3), SamplingParams(min_p=0.4), SamplingParams(typical_p=0.1)):
        sampler, histories = make_sampler([params] * 600, vocab_size=500, seed=1), make_histories([[1]] * 600)
        survivors = sampler.scores(logits[:1], arange(1), histories)[0].isfinite().nonzero().flatten().tolist()
        assert set(sampler.sample(logits, arange(600), histories).token_ids.tolist()) == set(survivors), params
