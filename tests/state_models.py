"""Tiny models with recurrent, convolutional or linear-attention layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedModel

from pagedkv.testing.models import randomised

_IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "mamba2": (
        "mamba2",
        {
            **_IDS,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 8,
            "head_dim": 16,
            "num_heads": 4,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "falcon_mamba": ("falcon_mamba", {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "jamba": (
        "jamba",
        {
            **_BASE,
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8},
            **{"mamba_d_conv": 4, "mamba_expand": 2, "use_mamba_kernels": False},
        },
    ),
    "bamba": ("bamba", {**_BASE, **_MAMBA2, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**_BASE, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_BASE, **_MAMBA2, **_EXPERTS, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    ),
    "lfm2": ("lfm2", {**_BASE, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": ("qwen3_next", {**_BASE, **_DELTA, **_EXPERTS, **_MIXED, "shared_expert_intermediate_size": 32}),
    "qwen3_5": ("qwen3_5_text", {**_BASE, **_DELTA, **_MIXED}),
    "olmo_hybrid": ("olmo_hybrid", {**_BASE, **_DELTA, **_MIXED, "linear_num_value_heads": 2}),
}


def state_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """One of them, random weights, on the CPU in float32."""
    model_type, arguments = STATEFUL[name]
    return randomised(AutoConfig.for_model(model_type, **arguments), seed=seed)
