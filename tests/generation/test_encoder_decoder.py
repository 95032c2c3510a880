"""Encoder-decoder models: self and cross attention in blocks, the same tokens as with transformers' own pair of caches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation_support import assert_same_tokens, prompts, small_model
from pair_models import PAIRS, pair_model
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from pagedkv import CachePool, PagedCache, PagedEncoderDecoderCache
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, OutOfBlocksError, UnsupportedModelError
from pagedkv.models import CACHE_ARGUMENT

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
}


def sources(seed: int) -> tuple[Tensor, Tensor]:
    """Three inputs, the second of them shorter."""
    tokens, mask = prompts(3, 9, seed=seed)
    tokens[1, 5:], mask[1, 5:] = 0, 0
    return tokens, mask


def generate(model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: Any, **settings: Any) -> Tensor:
    torch.manual_seed(0)
    fixed = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **settings}
    result = model.generate(tokens, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **fixed)
    assert isinstance(result, Tensor)
    return result


@pytest.fixture(scope="module")
def pool() -> Iterator[CachePool]:
    with CachePool(pair_model("t5"), num_blocks=80, block_size=4, check="step") as pool:
        yield pool


def test_prompt_look_up_over_blocks_gives_the_same_tokens(pool: CachePool) -> None:
    tokens, mask = sources(1)
    want = generate(pool.model, tokens[:1], mask[:1], None, prompt_lookup_num_tokens=3)
    with PagedEncoderDecoderCache(pool) as cache:
        got = generate(pool.model, tokens[:1], mask[:1], cache, prompt_lookup_num_tokens=3)
    assert_same_tokens(got, want, "prompt look-up")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("t5", "bart") else pytest.mark.slow) for name in PAIRS])
def test_generate_over_blocks_gives_the_same_tokens(name: str, mode: str) -> None:
    tokens, mask = sources(2)
    with CachePool(pair_model(name), num_blocks=80, block_size=4, check="step") as pool:
        want = generate(pool.model, tokens, mask, None, **MODES[mode])
        pool.fill_free_blocks(float("nan"))
        with PagedEncoderDecoderCache(pool) as cache:
            assert_same_tokens(generate(pool.model, tokens, mask, cache, **MODES[mode]), want, f"{mode} on {name}")
            # However many rows: the inputs of 9, 5 and 9 tokens are stored once, and no padding.
            assert pool.num_cross_blocks_in_use == 3 + 2 + 3
        assert pool.num_blocks_in_use == pool.num_cross_blocks_in_use == 0
        pool.check()


def test_rows_of_the_same_decoder_tokens_and_other_inputs_are_kept_apart(pool: CachePool) -> None:
    tokens, mask = sources(3)
    tokens[2], mask[2] = tokens[0], mask[0]
    own = EncoderDecoderCache(DynamicCache(), DynamicCache())
    decoder = torch.tensor([[0, 5, 7]]).repeat(3, 1)
    with torch.no_grad(), PagedEncoderDecoderCache(pool) as cache:
        for columns in (slice(0, 2), slice(2, 3)):
            outputs = [
                pool.model(
                    input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder[:, columns], **{CACHE_ARGUMENT: past}, use_cache=True
                )
                for past in (cache, own)
            ]
            torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
        assert pool.num_blocks_in_use == 3
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([2, 1]))
        assert cache.get_seq_length() == 2
        cache.batch_repeat_interleave(2)
        cache.reset()
        assert pool.num_blocks_in_use == pool.num_cross_blocks_in_use == 0
        assert not cache.is_updated


def test_copies_share_both_tables(pool: CachePool) -> None:
    tokens, mask = sources(4)
    want = generate(pool.model, tokens, mask, None)
    with torch.no_grad(), PagedEncoderDecoderCache(pool) as cache:
        pool.model(input_ids=tokens, attention_mask=mask, decoder_input_ids=want[:, :4], **{CACHE_ARGUMENT: cache}, use_cache=True)
        held = pool.num_blocks_in_use, pool.num_cross_blocks_in_use
        with copy.deepcopy(cache) as other:
            assert (pool.num_blocks_in_use, pool.num_cross_blocks_in_use) == held
            # Without a mask of the decoder, transformers takes the five tokens for new ones.
            settings = {"decoder_input_ids": want[:, :5], "decoder_attention_mask": torch.ones(3, 5, dtype=torch.long)}
            got = generate(pool.model, tokens, mask, other, max_new_tokens=5, **settings)
            assert_same_tokens(got, want[:, :10], "copy")
        assert (pool.num_blocks_in_use, pool.num_cross_blocks_in_use) == held


def test_bare_cache_and_cache_of_a_decoder_are_refused(pool: CachePool) -> None:
    for source in (pool, pair_model("t5")):
        with pytest.raises(UnsupportedModelError, match="PagedEncoderDecoderCache"):
            PagedCache(source)
    with pytest.raises(UnsupportedModelError, match="no encoder-decoder"):
        PagedEncoderDecoderCache(small_model("llama"))
    with pytest.raises(UnsupportedModelError, match="decoders alone"):
        CachePool(pool.model, tier="packed")
    with pytest.raises(ConfigError, match="num_blocks"):
        PagedEncoderDecoderCache(pool, num_blocks=9)


def test_too_small_pool_gives_everything_back() -> None:
    tokens, mask = sources(5)
    with PagedEncoderDecoderCache(pair_model("t5"), num_blocks=9, block_size=4) as cache:
        pool = cache.block_pool
        with pytest.raises(OutOfBlocksError, match="num_blocks"):
            generate(pool.model, tokens.repeat(2, 1), mask.repeat(2, 1), cache)  # 16 blocks of cross attention
        assert pool.num_blocks_in_use == pool.num_cross_blocks_in_use == 0
        with pytest.raises(OutOfBlocksError, match="num_blocks"):
            generate(pool.model, tokens, mask, cache, num_beams=8)
        cache.reset()
        assert pool.num_blocks_in_use == pool.num_cross_blocks_in_use == 0
        with pytest.raises(InvalidRequestError, match="rows"), torch.no_grad():
            pool.model(decoder_input_ids=tokens[:, :1], encoder_outputs=(torch.zeros(2, 9, 32),), **{CACHE_ARGUMENT: cache}, use_cache=True)
        want = generate(pool.model, tokens, mask, None, max_new_tokens=4)
        assert_same_tokens(generate(pool.model, tokens, mask, cache, max_new_tokens=4), want, "afterwards")
    with pytest.raises(ClosedError, match="closed"):
        cache.reset()


def test_failed_forward_leaves_the_cache_empty(pool: CachePool) -> None:
    tokens, mask = sources(6)

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    with PagedEncoderDecoderCache(pool) as cache:
        hook = pool.model.get_output_embeddings().register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            generate(pool.model, tokens, mask, cache)
        hook.remove()
        assert pool.num_blocks_in_use == pool.num_cross_blocks_in_use == 0
        assert_same_tokens(generate(pool.model, tokens, mask, cache), generate(pool.model, tokens, mask, None), "afterwards")
