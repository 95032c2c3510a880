"""Generated traces look like the published ones; the constants were measured in the published files by ``Trace.statistics``."""

from __future__ import annotations

import pytest
from cache_simulation import lru_hit_rate

from pagedkv.errors import InvalidRequestError
from pagedkv.testing.trace_generator import KINDS, generate_trace
from pagedkv.testing.trace_replay import replay_one_by_one

# Requests a second, mean prompt, mean output; prompt and output at the 10th, 50th, 90th and 99th percentile.
MEASURED = {
    "mooncake": (3.906, 15325, 149.1, (30, 11587, 38611, 66456), (4, 69, 389, 768)),
    "azure-code": (2.566, 2048, 27.9, (147, 1469, 5188, 7436), (7, 13, 55, 251)),
    "azure-conv": (5.530, 1155, 211.1, (207, 1020, 2734, 4142), (54, 129, 424, 601)),
}
MOONCAKE_REUSE = 0.6396
MOONCAKE_HIT_RATES = {2_000: 0.146, 8_000: 0.373, 32_000: 0.628}  # by blocks of 512 tokens in a least-recently-used cache


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_trace_has_the_measured_statistics(kind: str, seed: int) -> None:
    rate, prompt, output, prompt_lens, output_lens = MEASURED[kind]
    found = generate_trace(kind, 2_000, seed).statistics()
    assert found.num_requests == 2_000
    assert found.requests_per_s == pytest.approx(rate, rel=0.01), f"seed {seed}"
    assert found.mean_prompt_len == pytest.approx(prompt, rel=0.1), f"seed {seed}"
    assert found.mean_output_len == pytest.approx(output, rel=0.1), f"seed {seed}"
    # Documents are few, and each brings all its requests: their lengths spread more than Azure's.
    assert found.prompt_lens == pytest.approx(prompt_lens, rel=0.25 if kind == "mooncake" else 0.03, abs=2), f"seed {seed}"
    assert found.output_lens == pytest.approx(output_lens, rel=0.05, abs=1), f"seed {seed}"
    assert found.reuse == (pytest.approx(MOONCAKE_REUSE, abs=0.03) if kind == "mooncake" else 0), f"seed {seed}"


@pytest.mark.parametrize("num_blocks", MOONCAKE_HIT_RATES)
def test_generated_mooncake_is_as_hard_to_cache_as_the_published_trace(num_blocks: int) -> None:
    trace = generate_trace("mooncake", 3_993, seed=0)
    assert lru_hit_rate(trace, num_blocks) == pytest.approx(MOONCAKE_HIT_RATES[num_blocks], abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", MOONCAKE_HIT_RATES)
def test_generated_mooncake_replay_equals_a_cache_simulation(num_blocks: int) -> None:
    trace = generate_trace("mooncake", 3_993, seed=0)
    assert replay_one_by_one(trace.as_whole_blocks(), num_blocks=num_blocks).block_hit_rate == lru_hit_rate(trace, num_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_trace_and_another_does_not(kind: str) -> None:
    assert generate_trace(kind, 50, 7) == generate_trace(kind, 50, 7)
    assert generate_trace(kind, 50, 7) != generate_trace(kind, 50, 8)


@pytest.mark.parametrize("num_requests", [1, 2, 3, 10, 77])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_trace_of_any_length_is_whole(kind: str, num_requests: int) -> None:
    trace = generate_trace(kind, num_requests, seed=3)
    assert len(trace.requests) == num_requests
    assert trace.requests[0].arrival_s == 0
    assert all(one.arrival_s <= other.arrival_s for one, other in zip(trace.requests, trace.requests[1:], strict=False))
    for request in trace.requests:
        assert request.num_prompt_tokens >= 1
        assert request.num_output_tokens >= 1
        assert len(request.hash_ids) == (-(-request.num_prompt_tokens // 512) if kind == "mooncake" else 0)
        assert len(set(request.hash_ids)) == len(request.hash_ids)


def test_unknown_kind_and_no_requests_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'burstgpt': generators exist for mooncake"):
        generate_trace("burstgpt", 10, 0)
    with pytest.raises(InvalidRequestError, match="num_requests is 0"):
        generate_trace("mooncake", 0, 0)
