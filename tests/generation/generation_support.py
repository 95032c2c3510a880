"""Tiny models of every kind, left-padded prompts, and ``generate`` with and without a paged cache, compared token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pagedkv import CachePool, PagedCache
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.testing.models import TINY_MODELS, TINY_SIZES, WINDOW, randomised, tiny_model

_BASE: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
_GPT: dict[str, Any] = {**_BASE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_LATENT: dict[str, Any] = {
    **TINY_SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_FALCON: dict[str, Any] = {**_BASE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
_CHUNKED: dict[str, Any] = {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
_JAMBA: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "use_mamba_kernels": False}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {**_BASE, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon_alibi": ("falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4, "tie_word_embeddings": False}),
    "mpt": ("mpt", {**_BASE, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "deepseek_v32": ("deepseek_v32", {**_LATENT, "index_topk": 6, "index_n_heads": 32, "index_head_dim": 8}),
    "diffllama": ("diffllama", TINY_SIZES),
    "falcon_h1": ("falcon_h1", {**TINY_SIZES, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    "jamba": ("jamba", {**TINY_SIZES, **_JAMBA, "num_experts_per_tok": 1}),
    "lfm2": ("lfm2", {**TINY_SIZES, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": ("qwen3_next", {**TINY_SIZES, **_EXPERTS, **_LINEAR, "head_dim": 16}),
    "llama4": (
        "llama4_text",
        {**TINY_SIZES, **_CHUNKED, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}
NAMES = (*TINY_MODELS, *_MORE)


def small_model(name: str, **options: Any) -> PreTrainedModel:
    if name in TINY_MODELS:
        return tiny_model(name, **options)
    model_type, arguments = _MORE[name]
    seed = options.pop("seed", 0)
    return randomised(AutoConfig.for_model(model_type, **{**arguments, **options}), seed=seed)


def prompts(rows: int, columns: int, *, seed: int, padding: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, with so many columns of left padding in the first rows."""
    tokens = torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row, count in enumerate(padding):
        tokens[row, :count], mask[row, :count] = 0, 0
    return tokens, mask


SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "do_sample": False, "use_cache": True}


def generate(model: PreTrainedModel, tokens: Tensor, cache: PagedCache | None, **settings: Any) -> Tensor:
    torch.manual_seed(0)
    result = model.generate(tokens, **{CACHE_ARGUMENT: cache}, **{**SETTINGS, **settings})
    assert isinstance(result, Tensor)
    return result


def assert_same_tokens(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: {list(got.shape)} instead of {list(want.shape)}"
    for row, (ours, own) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        first = next((place for place, pair in enumerate(zip(ours, own, strict=True)) if pair[0] != pair[1]), None)
        assert first is None, f"{what}: row {row} first differs at {first}: {ours} instead of {own}"


def compare(pool: CachePool, tokens: Tensor, what: str, **settings: Any) -> None:
    """The same tokens with a paged cache as without, over free blocks full of NaN; and every block is back behind it."""
    want = generate(pool.model, tokens, None, **settings)
    pool.fill_free_blocks(float("nan"))
    with PagedCache(pool) as cache:
        got = generate(pool.model, tokens, cache, **settings)
        assert pool.num_blocks_in_use == cache.num_blocks > 0
    assert_same_tokens(got, want, what)
    assert pool.num_blocks_in_use == 0
    pool.check()
