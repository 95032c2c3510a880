"""Every way in which ``generate`` decodes, on every kind of model: the same tokens as with transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_support import NAMES, compare, prompts, small_model

from pagedkv import CachePool
from pagedkv.errors import UnsupportedModelError
from pagedkv.models.tiers import TierName

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
ASSISTED = ("prompt look-up", "draft model")
RECURRENT = ("falcon_h1", "jamba", "lfm2", "qwen3_next")  # for which transformers has no assisted generation
DENSE = (*RECURRENT, "deepseek_v32", "falcon_alibi")
EARLY = {
    "packed": ("llama", "gemma2", "deepseek_v3", "bloom"),
    "dense": ("gpt2", "bloom", "qwen3_next"),
}  # the others are in the long sweep
FEW = {
    "packed": {"gemma2": ("several beams", "sampled beams", "beams, prefill in chunks", "draft model")},
    "dense": {"bloom": ("sampling", "several samples", "prefill in chunks", "prompt look-up")},
}


def _always(mode: str, name: str, tier: str, often: tuple[str, ...]) -> bool:
    return name in EARLY[tier] if mode in often else mode in FEW[tier].get(name, ())


def cases(*modes: str, often: tuple[str, ...] = ()) -> list[Any]:
    return [
        pytest.param(mode, name, tier, marks=() if _always(mode, name, tier, often) else pytest.mark.slow)
        for mode in modes
        for name in NAMES
        for tier in ("packed", "dense")
        if (tier == "dense" or name not in DENSE) and (mode not in ASSISTED or name not in RECURRENT)
    ]


@pytest.fixture(scope="module")
def pool_of() -> Any:
    pools: dict[tuple[str, TierName], CachePool] = {}

    def make(name: str, tier: TierName) -> CachePool:
        if (name, tier) not in pools:
            pools[name, tier] = CachePool(small_model(name), num_blocks=120, block_size=4, tier=tier, check="step")
        return pools[name, tier]

    yield make
    for pool in pools.values():
        pool.close()


@pytest.mark.parametrize(("mode", "name", "tier"), cases(*BATCH, often=("greedy", "beams")))
def test_generate_over_blocks_gives_the_same_tokens(mode: str, name: str, tier: TierName, pool_of: Callable[..., CachePool]) -> None:
    tokens, mask = prompts(3, 11, seed=5, padding=(4, 1))
    compare(pool_of(name, tier), tokens, f"{mode} on {name}, {tier}", attention_mask=mask, **BATCH[mode])


@pytest.mark.parametrize(("name", "reason"), [("falcon_alibi", "another form"), ("lfm2", "states"), ("deepseek_v32", "states")])
def test_model_that_cannot_be_packed_is_dense_and_says_why(name: str, reason: str) -> None:
    model = small_model(name)
    with CachePool(model, num_blocks=9) as pool:
        assert pool.tier == "dense"
        assert reason in str(pool.tier_reason)
    with pytest.raises(UnsupportedModelError, match=reason):
        CachePool(model, tier="packed")


@pytest.mark.parametrize(("mode", "name", "tier"), cases(*ASSISTED))
def test_assisted_generation_over_blocks_gives_the_same_tokens(
    mode: str, name: str, tier: TierName, pool_of: Callable[..., CachePool]
) -> None:
    pool = pool_of(name, tier)
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
