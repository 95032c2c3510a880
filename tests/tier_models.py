"""Tiny models of the architectures that do not ask plain attention of the interface: adapted, run by the dense tiers, or gathered."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedModel

from pagedkv.testing.models import randomised

WINDOW = 8
_IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_FALCON = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LATENT = {
    **_BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
_FALCON_NEW = {"alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True, "parallel_attn": True}
_JAPANESE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_multiple_size": 2,
    "max_position_embeddings": 256,
}
_XGLM = {**_IDS, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.0}
_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "intermediate_size": 64, "window_size": WINDOW}
_MPT = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_FEED = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256, "dropout": 0.0}
_JETMOE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8}

ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {**_IDS, **_BLOOM}),
    "falcon_alibi": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon_rotary": ("falcon", {**_FALCON, "alibi": False, "multi_query": True, "parallel_attn": True}),
    "falcon_new": ("falcon", {**_FALCON, "alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mpt": ("mpt", _MPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {**_IDS, **_NEO, "attention_types": [[["global", "local"], 1]]}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 4, "n_ctx": 256}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {**_IDS, **_JAPANESE}),
    "xglm": ("xglm", _XGLM),
    "rembert": ("rembert", {**_BASE, "is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24}),
    "megatron-bert": ("megatron-bert", {**_BASE, "is_decoder": True}),
}
"""Models without transformers' attention interface, for which there are adapters: bloom, falcon_alibi and mpt know positions by ALiBi,
gpt_neo has windows."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom, 6 heads": ("bloom", {**_IDS, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "bloom, post layernorm": ("bloom", {**_IDS, **_BLOOM, "apply_residual_connection_post_layernorm": True}),
    "bloom, tp but not exact": ("bloom", {**_IDS, **_BLOOM, "pretraining_tp": 2}),
    "falcon, alibi, 6 heads": ("falcon", {**_FALCON, "hidden_size": 48, "num_attention_heads": 6, "alibi": True, "multi_query": False}),
    "falcon, alibi, multi-query": ("falcon", {**_FALCON, "alibi": True, "multi_query": True}),
    "falcon, alibi, new": ("falcon", {**_FALCON, "alibi": True, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon, alibi, bias": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "bias": True, "parallel_attn": True}),
    "falcon, rotary, one by one": ("falcon", {**_FALCON, "alibi": False, "multi_query": False, "parallel_attn": False}),
    "falcon, new, one norm": ("falcon", {**_FALCON, **_FALCON_NEW, "num_ln_in_parallel_attn": 1}),
    "falcon, new, as many heads": ("falcon", {**_FALCON, **_FALCON_NEW, "num_kv_heads": 4}),
    "mpt, clipped": ("mpt", {**_MPT, "attn_config": {"clip_qkv": 0.5}}),
    "mpt, scale": ("mpt", {**_MPT, "attn_config": {"softmax_scale": 0.7}}),
    "mpt, alibi_bias_max": ("mpt", {**_MPT, "attn_config": {"alibi_bias_max": 4}}),
    "mpt, 6 heads": ("mpt", {**_MPT, "d_model": 48, "n_heads": 6}),
    "gptj, all turned": ("gptj", {**_GPT, "rotary_dim": 8}),
    "gpt_neo, all local": ("gpt_neo", {**_IDS, **_NEO, "window_size": 3, "attention_types": [[["local"], 2]]}),
    "gpt_neo, all global": ("gpt_neo", {**_IDS, **_NEO, "attention_types": [[["global"], 2]]}),
    "gpt_neo, window of 1": ("gpt_neo", {**_IDS, **_NEO, "window_size": 1, "attention_types": [[["local", "global"], 1]]}),
    "codegen, all turned": ("codegen", {**_GPT, "rotary_dim": 8, "n_ctx": 256}),
    "gpt_neox_japanese, all turned": ("gpt_neox_japanese", {**_IDS, **_JAPANESE, "rotary_pct": 1.0}),
}
"""Further configs of the same."""

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "big_bird": ("big_bird", {**_BASE, "is_decoder": True, "attention_type": "original_full"}),
    "deepseek_v32": ("deepseek_v32", {**_LATENT, "index_topk": 6, "index_n_heads": 32, "index_head_dim": 8}),
}
"""A model without transformers' attention interface or an adapter, and one with it whose layers choose 6 keys each, for which they compute
on the mask."""

EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", {**_IDS, **_BART, **_FEED, "is_decoder": True, "is_encoder_decoder": False, "forced_eos_token_id": None}),
    "roformer": ("roformer", {**_BASE, "is_decoder": True}),
}
"""Models that count positions from one number for all rows."""

GATHERED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "head_dim": 4}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "diffllama": ("diffllama", _BASE),
    "jetmoe": ("jetmoe", {**_JETMOE, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256}),
}
"""Models that change K or V after storing them: two with latents, one that joins heads, one that repeats them."""


def tier_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """One of them, random weights, on the CPU in float32."""
    model_type, arguments = {**ADAPTED, **VARIANTS, **DENSE, **EQUAL, **GATHERED}[name]
    return randomised(AutoConfig.for_model(model_type, **arguments), seed=seed)
