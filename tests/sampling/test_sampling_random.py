from __future__ import annotations

import numpy as np

from pagedkv.sampling import Sampler, SamplingParams, TokenHistories, stream, uniforms


def test_uniforms_first_outputs_match_published_splitmix64() -> None:
    # the generator's well-known outputs for the start state 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = uniforms(np.full(5, 1234567, dtype=np.uint64), np.arange(5))
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in expected]


def test_uniforms_of_a_row_do_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(5)
    streams, positions = rng.integers(0, 2**64, 100, dtype=np.uint64), rng.integers(0, 10_000, 100)
    together = uniforms(streams, positions)
    alone = [uniforms(streams[i : i + 1], positions[i : i + 1])[0] for i in range(100)]
    assert together.tolist() == alone


def test_uniforms_are_even_over_positions_seeds_and_indices() -> None:
    num, cells = 64_000, 64
    over = {
        "positions": uniforms(np.full(num, stream(7, 0), dtype=np.uint64), np.arange(num)),
        "seeds": uniforms(np.asarray([stream(seed, 0) for seed in range(num)], dtype=np.uint64), np.full(num, 17)),
        "indices": uniforms(np.asarray([stream(7, index) for index in range(num)], dtype=np.uint64), np.full(num, 17)),
    }
    for name, values in over.items():
        assert values.min() >= 0.0, name
        assert values.max() < 1.0, name
        counts = np.bincount((values * cells).astype(int), minlength=cells)
        chi_square = ((counts - num / cells) ** 2 / (num / cells)).sum()
        assert chi_square < 63 + 5 * np.sqrt(2 * 63), (name, chi_square)
        correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(num), (name, correlation)


def test_stream_of_every_sample_of_nearby_seeds_is_distinct() -> None:
    assert len({stream(seed, index) for seed in range(300) for index in range(50)}) == 15_000
    assert stream(-1, 0) == stream(2**64 - 1, 0)


def test_sampler_draws_follow_the_distribution() -> None:
    import torch

    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    num, sampler = 8000, Sampler(5, "cpu")
    for row in range(40):
        sampler.add(row, SamplingParams(), prompt_token_ids=[0], seed=99, index=row)
    counts = np.zeros(5)
    for position in range(1, num // 40 + 1):
        histories = TokenHistories(np.zeros((40, 300), dtype=np.int32), np.full(40, position, dtype=np.int32))
        drawn = sampler.sample(torch.tensor(np.log(p), dtype=torch.float32).repeat(40, 1), np.arange(40), histories)
        counts += np.bincount(drawn.token_ids, minlength=5)
    chi_square = ((counts - num * p) ** 2 / (num * p)).sum()
    assert chi_square < 18.5, (chi_square, counts)  # 0.1 % point for 4 degrees of freedom, seed 99
