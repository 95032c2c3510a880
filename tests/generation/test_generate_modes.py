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
# Each way in which forwards read blocks, and models with states; 12 of the 14 have assisted generation. All others are in the long sweep.
QUICKLY: dict[TierName, tuple[str, ...]] = {
    "packed": ("llama", "gemma2", "gpt_oss", "llama4", "bloom", "deepseek_v3", "diffllama"),  # the last two over gathered K and V
    "dense": ("gpt2", "gptj", "mpt", "falcon_alibi", "deepseek_v32", "lfm2", "qwen3_next"),
}


def cases(*modes: str) -> list[Any]:
    return [
        pytest.param(mode, name, tier, marks=pytest.mark.slow)
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


def check(pool: CachePool, mode: str, name: str, *, rows: int = 3, **settings: Any) -> None:
    """The same tokens as transformers' own cache gives, in one mode."""
    what = f"{mode} on {name}, {pool.tier}"
    if mode in BATCH:
        tokens, mask = prompts(rows, 11, seed=5, padding=(4, 1))
        return compare(pool, tokens, what, attention_mask=mask, **settings, **BATCH[mode])
    tokens, mask = prompts(1, 11, seed=6)
    if mode == "draft model":
        settings["assistant_model"] = draft = small_model(name)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.01)
    else:
        settings["prompt_lookup_num_tokens"] = 3
        tokens[0, 6:9] = tokens[0, 0:3]
    compare(pool, tokens, what, attention_mask=mask, **settings)


@pytest.mark.parametrize(("name", "tier"), [(name, tier) for tier, names in QUICKLY.items() for name in names])
def test_every_mode_gives_a_few_tokens_as_transformers_cache_does(name: str, tier: TierName) -> None:
    with CachePool(small_model(name), num_blocks=120, block_size=4, tier=tier, check="step") as pool:
        assert pool.tier == tier
        for mode in (*BATCH, *(() if name in RECURRENT else ASSISTED)):
            check(pool, mode, name, rows=2, max_new_tokens=3)


@pytest.mark.parametrize(("mode", "name", "tier"), cases(*BATCH, *ASSISTED))
def test_generate_over_blocks_gives_the_same_tokens(mode: str, name: str, tier: TierName, pool_of: Callable[..., CachePool]) -> None:
    check(pool_of(name, tier), mode, name)


@pytest.mark.parametrize(("name", "reason"), [("falcon_alibi", "another form"), ("lfm2", "states"), ("deepseek_v32", "states")])
def test_model_that_cannot_be_packed_is_dense_and_says_why(name: str, reason: str) -> None:
    model = small_model(name)
    with CachePool(model, num_blocks=9) as pool:
        assert pool.tier == "dense"
        assert reason in str(pool.tier_reason)
    with pytest.raises(UnsupportedModelError, match=reason):
        CachePool(model, tier="packed")
