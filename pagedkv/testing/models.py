"""Tiny random models of many architectures, for tests that need a real one without weights to download.

Owns their sizes. Weights are drawn wide (standard deviation 0.25), so that attention matters: with the usual narrow ones
a model that ignores its past gives nearly the same logits. transformers is imported when a model is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pagedkv.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WINDOW = 8
"""Sliding windows of the models that have one, in tokens."""

TINY_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Sizes and token ids of the models whose configs use the usual names."""
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """For each name transformers' model type and the arguments of its config."""
    window = {"sliding_window": WINDOW}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    soft_capped = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
    gpt2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
    plain_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    return {
        "llama": ("llama", TINY_SIZES),
        "mistral": ("mistral", {**TINY_SIZES, **window}),
        "qwen2": ("qwen2", TINY_SIZES),
        "qwen3": ("qwen3", {**TINY_SIZES, "head_dim": 16}),
        "gemma2": ("gemma2", {**TINY_SIZES, **window, **layers, **soft_capped, "head_dim": 16, "query_pre_attn_scalar": 16}),
        "gemma3": ("gemma3_text", {**TINY_SIZES, **window, **layers, "head_dim": 16, "query_pre_attn_scalar": 16}),
        "gpt2": ("gpt2", gpt2),
        "opt": (
            "opt",
            {key: value for key, value in {**TINY_SIZES, **opt}.items() if key not in ("intermediate_size", "num_key_value_heads")},
        ),
        "phi": ("phi", {**TINY_SIZES, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
        "mixtral": ("mixtral", {**TINY_SIZES, **_EXPERTS}),
        "gpt_oss": ("gpt_oss", {**TINY_SIZES, **_EXPERTS, **window, **layers, **plain_rope, "head_dim": 16}),
    }


TINY_MODELS: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "phi", "mixtral", "gpt_oss")
"""Names that ``tiny_model`` knows. mistral, gemma2, gemma3 and gpt_oss have sliding windows of ``WINDOW`` tokens; gemma2 a
soft cap; gpt_oss attention sinks; gpt2 and opt learned positions; mixtral and gpt_oss experts."""


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model: 2 layers, 97 tokens, 256 positions.

    Args:
        name: one of ``TINY_MODELS``.
        overrides: config arguments that replace the tiny model's.

    Raises:
        ConfigError: an unknown name.
    """
    from transformers import AutoConfig

    known = _configs()
    if name not in known:
        raise ConfigError(f"tiny model {name!r} is unknown: use one of {', '.join(TINY_MODELS)}")
    model_type, arguments = known[name]
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **{**arguments, **overrides})
    return config


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal language model on the CPU, float32, in evaluation mode.

    Args:
        name: one of ``TINY_MODELS``.
        seed: of the weights; the same seed gives the same weights, and no global generator is touched.
        overrides: config arguments that replace the tiny model's, for example ``num_hidden_layers=3``.

    Raises:
        ConfigError: an unknown name.

    Cost: some tens of milliseconds.
    """
    return randomised(tiny_config(name, **overrides), seed=seed)


def randomised(
    config: PreTrainedConfig, *, seed: int = 0, attn_implementation: str | None = None, seq2seq: bool = False
) -> PreTrainedModel:
    """A language model of any config with wide random weights, made as ``tiny_model`` makes them.

    Args:
        config: of the model.
        seed: of the weights.
        attn_implementation: transformers' name of one; the model's own choice when not given, eager where there is a soft cap.
        seq2seq: an encoder-decoder model instead of a causal one.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    # Some releases of transformers default to SDPA for models with a soft cap, and leave the cap out there.
    chosen = "eager" if attn_implementation is None and getattr(config, "attn_logit_softcapping", None) else attn_implementation
    options = {} if chosen is None else {"attn_implementation": chosen}
    family = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = family.from_config(config, dtype=torch.float32, **options)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.25, generator=generator)
            elif "sink" in parameter_name:
                parameter.normal_(0.0, 1.0, generator=generator)
    model.eval()  # type: ignore[no-untyped-call]
    return model
