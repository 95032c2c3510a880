"""Every way in which ``generate`` decodes, on every kind of model: the same tokens as with transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_support import NAMES, compare, prompts, small_model

from pagedkv import CachePool

BATCH = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "no_repeat_ngram_size": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "beams, prefill in chunks": {"prefill_chunk_size": 4, "num_beams": 4},
}
EARLY = ("llama", "gemma2", "gpt2", "bloom", "deepseek_v3")  # one of each kind; the others are in the long sweep


def models(mode: str) -> list[Any]:
    always = EARLY if mode in ("greedy", "beams", "assisted") else ("gemma2", "bloom")
    return [pytest.param(name, marks=() if name in always else pytest.mark.slow) for name in NAMES]


def cases() -> list[Any]:
    return [pytest.param(mode, *each.values, id=f"{mode}-{each.values[0]}", marks=each.marks) for mode in BATCH for each in models(mode)]


@pytest.fixture(scope="module")
def pool_of() -> Any:
    pools: dict[str, CachePool] = {}

    def make(name: str) -> CachePool:
        if name not in pools:
            pools[name] = CachePool(small_model(name), num_blocks=120, block_size=4, check="audit")
        return pools[name]

    yield make
    for pool in pools.values():
        pool.close()


@pytest.mark.parametrize(("mode", "name"), cases())
def test_generate_over_blocks_gives_the_same_tokens(mode: str, name: str, pool_of: Callable[[str], CachePool]) -> None:
    tokens, mask = prompts(3, 11, seed=5, padding=(4, 1))
    compare(pool_of(name), tokens, f"{mode} on {name}", attention_mask=mask, **BATCH[mode])


@pytest.mark.parametrize("name", models("assisted"))
@pytest.mark.parametrize("mode", ["prompt look-up", "draft model"])
def test_assisted_generation_over_blocks_gives_the_same_tokens(mode: str, name: str, pool_of: Callable[[str], CachePool]) -> None:
    pool = pool_of(name)
    tokens, mask = prompts(1, 11, seed=6)
    if mode == "draft model":
        draft = small_model(name)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.01)
        compare(pool, tokens, f"{mode} on {name}", attention_mask=mask, assistant_model=draft)
    else:
        tokens[0, 6:9] = tokens[0, 0:3]
        compare(pool, tokens, f"{mode} on {name}", attention_mask=mask, prompt_lookup_num_tokens=3)
