"""Preemption at every step at which it can come, in pools of every size, with the tokens of a run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from parity_cases import BLOCK_SIZES
from parity_support import MAX_NEW, Oracle, assert_tokens, blocks_to_fit, expected, greedy, new_engine, poisoned_step, run_all

from pagedkv.outputs import RequestOutput
from pagedkv.testing.models import TINY_MODELS

FEW = ("llama", "gemma2", "gpt_oss")


def _slow_unless(often: bool) -> object:
    return () if often else pytest.mark.slow


def _some(names: tuple[str, ...]) -> list[object]:
    return [pytest.param(name, marks=_slow_unless(name in names)) for name in TINY_MODELS]


def _halved() -> list[object]:
    """Every model with every block size by turns with the prefix cache and without, neighbours otherwise; the rest is slow."""
    cells = product(enumerate(TINY_MODELS), enumerate(BLOCK_SIZES), (True, False))
    return [
        pytest.param(name, size, caching, id=f"{name}-{size}-{'cached' if caching else 'uncached'}", marks=_slow_unless(caching == even))
        for (model, name), (place, size), caching in cells
        for even in [(model + place) % 2 == 0]
    ]


@pytest.mark.parametrize(("name", "block_size", "caching"), _halved())
def test_preemption_after_every_decode_step_gives_the_same_tokens(
    name: str, block_size: int, caching: bool, oracle_of: Callable[[str], Oracle]
) -> None:
    # One copy of the request for each step: copy k loses its blocks after step k, and once more three steps later.
    oracle = oracle_of(name)
    prompt = oracle.prompt_of(26)
    blocks = (MAX_NEW + 1) * blocks_to_fit(block_size, len(prompt) + MAX_NEW) + 9
    engine = new_engine(oracle, block_size, blocks, enable_prefix_caching=caching)
    for copy in range(MAX_NEW):
        engine.add_request(str(copy), {"prompt_token_ids": prompt, "cache_salt": str(copy)}, greedy(n=2 if copy % 4 == 3 else 1))
    ended: dict[str, RequestOutput] = {}
    step = preempted = 0
    while engine.has_unfinished:
        ended.update((output.request_id, output) for output in poisoned_step(engine) if output.finished)
        preempted += sum(engine.preempt(str(copy)) for copy in (step, step - 3))
        step += 1
    assert preempted >= MAX_NEW
    for copy in range(MAX_NEW):
        for completion in ended[str(copy)].outputs:
            where = f"{name}, block size {block_size}, caching {caching}, sample {completion.index}, preempted after step {copy}"
            assert_tokens(completion.token_ids, oracle.reference(prompt).token_ids, where=where, prompt=prompt)
    if caching and block_size < 32:
        assert engine.statistics().cache.num_hit_tokens > 0, "nothing computed before a preemption was found again"


@pytest.mark.parametrize("name", _some(FEW))
def test_preemption_after_every_step_of_a_chunked_prefill_gives_the_same_tokens(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    prompt, neighbour = oracle.prompt_of(40), oracle.prompt_of(17)
    steps = -(-len(prompt) // 7) + 6 + 3
    for at in range(steps):
        engine = new_engine(oracle, 4, 60, max_num_batched_tokens=7)
        engine.add_request("it", prompt, greedy(max_tokens=6))
        engine.add_request("neighbour", neighbour, greedy(max_tokens=6))
        ended: dict[str, RequestOutput] = {}
        step = 0
        while engine.has_unfinished:
            ended.update((output.request_id, output) for output in poisoned_step(engine) if output.finished)
            if step == at:
                engine.preempt("it")
            step += 1
        where = f"{name}, preempted after step {at}"
        assert_tokens(ended["it"].outputs[0].token_ids, oracle.reference(prompt).token_ids[:6], where=where, prompt=prompt)
        assert_tokens(ended["neighbour"].outputs[0].token_ids, oracle.reference(neighbour).token_ids[:6], where=where, prompt=neighbour)


@pytest.mark.parametrize("name", _some(FEW[:1]))
@pytest.mark.parametrize("block_size", [4, 16])
def test_pools_of_every_size_give_the_same_tokens(name: str, block_size: int, oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of(name)
    prompts = [oracle.prompt_of(length) for length in (26, 15, 8, 17)]
    smallest = blocks_to_fit(block_size, 26 + MAX_NEW)
    enough = sum(blocks_to_fit(block_size, len(prompt) + MAX_NEW) for prompt in prompts) + 4
    preempted = []
    for num_blocks in range(smallest, enough + 1):
        engine = new_engine(oracle, block_size, num_blocks, watermark=0.0)
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, greedy())
        ended = run_all(engine)
        for index, prompt in enumerate(prompts):
            where = f"{name}, {num_blocks} blocks of {block_size}"
            assert_tokens(ended[str(index)].outputs[0].token_ids, expected(oracle, prompt, greedy()), where=where, prompt=prompt)
        preempted.append(engine.statistics().num_preemptions)
    assert preempted[0] > 0
    assert preempted[-1] == 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_twins_that_share_every_block_and_need_one_more_each_take_turns(name: str, oracle_of: Callable[[str], Oracle]) -> None:
    # Both reach the end of their third block in one step, where their twin blocks become one: three blocks are held and one is left.
    # Preempting either frees nothing, as the other holds the same blocks; but it needs none any more.
    oracle = oracle_of(name)
    prompt = oracle.family[2]
    assert len(prompt) == 9
    engine = new_engine(oracle, 4, 5, max_num_batched_tokens=8, watermark=0.0)
    for twin in ("one", "two"):
        engine.add_request(twin, prompt, greedy(max_tokens=7))
    ended = run_all(engine)
    for twin in ("one", "two"):
        where = f"{name}, {twin}: {ended[twin].error}"
        assert_tokens(ended[twin].outputs[0].token_ids, oracle.reference(prompt).token_ids[:7], where=where, prompt=prompt)
    assert engine.statistics().cache.num_deduplicated > 0, "the twins did not come to share a block"
    assert engine.statistics().num_preemptions > 0
