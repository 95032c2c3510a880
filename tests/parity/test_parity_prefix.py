"""Prefix hits of every length, and forks after every prompt length, over blocks that are NaN until they are written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from parity_cases import BLOCK_SIZES
from parity_support import Oracle, assert_tokens, blocks_to_fit, expected, greedy, new_engine, run_all

from pagedkv.testing.models import TINY_MODELS

GRID = list(product(TINY_MODELS, BLOCK_SIZES))


@pytest.mark.parametrize(("name", "block_size"), GRID)
def test_prefix_hit_of_every_length_gives_the_same_tokens(name: str, block_size: int, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    prompt = oracle.prompt_of(40) if block_size < 64 else oracle.family[0]
    lengths = range(len(prompt) + 1) if block_size < 64 else (0, 1, 62, 63, 64, 65, 71, 72)
    params = greedy(max_tokens=4)
    engine = new_engine(oracle, block_size, len(lengths) * blocks_to_fit(block_size, len(prompt) + 8) + 99, max_num_batched_tokens=1024)
    for shared in lengths:
        other = () if shared == len(prompt) else (3 + (prompt[shared] + 1) % 90,)
        engine.add_request(str(shared), {"prompt_token_ids": (*prompt[:shared], *other), "cache_salt": str(shared)}, greedy(max_tokens=1))
    run_all(engine)
    for shared in lengths:
        engine.add_request(str(shared), {"prompt_token_ids": prompt, "cache_salt": str(shared)}, params)
    ended = run_all(engine)
    for shared in lengths:
        where = f"{name}, block size {block_size}, {shared} tokens computed before"
        output = ended[str(shared)]
        assert output.num_cached_tokens == min(shared, len(prompt) - 1) // block_size * block_size, where
        assert_tokens(output.outputs[0].token_ids, expected(oracle, prompt, params), where=where, prompt=prompt)
    assert engine.statistics().cache.num_hit_tokens > 0


@pytest.mark.parametrize(("name", "block_size"), GRID)
def test_forks_after_every_prompt_length_all_equal_generate(name: str, block_size: int, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    prompts = oracle.prompts + oracle.family
    engine = new_engine(oracle, block_size, 4 * sum(blocks_to_fit(block_size, len(prompt) + 16) for prompt in prompts))
    params = greedy(n=3, max_tokens=6)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    ended = run_all(engine)
    for index, prompt in enumerate(prompts):
        assert [completion.index for completion in ended[str(index)].outputs] == [0, 1, 2]
        for completion in ended[str(index)].outputs:
            where = f"{name}, block size {block_size}, sample {completion.index}"
            assert_tokens(completion.token_ids, expected(oracle, prompt, params), where=where, prompt=prompt)
    statistics = engine.statistics()
    assert statistics.cache.num_copies > 0 or block_size == 1
    assert statistics.num_computed_tokens < sum(len(prompt) + 3 * 6 for prompt in prompts)  # one prefill each, not three
    assert statistics.cache.groups[0].num_in_use == 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_prefix_of_a_running_request_is_waited_for_and_then_shared(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    engine = new_engine(oracle, 4, 200, max_num_batched_tokens=100)
    for index, prompt in enumerate(oracle.family):
        engine.add_request(str(index), prompt, greedy())
    ended = run_all(engine)
    for index, prompt in enumerate(oracle.family):
        assert_tokens(ended[str(index)].outputs[0].token_ids, oracle.reference(prompt).token_ids, where=name, prompt=prompt)
    assert sum(output.num_cached_tokens for output in ended.values()) > 100
    assert any("computing the same prefix" in str(event) for output in ended.values() for event in output.events)
