"""Every architecture that the installed transformers can name, shrunk until it runs in milliseconds.

Owns which architectures there are, read from transformers' own registry, and the sizes they are shrunk to: a table of config
fields, not of models. What a single architecture needs beyond it stands in ``_OVERRIDES``. Windows and chunks are ``WINDOW``
tokens, so that prompts of ordinary tests are longer. transformers is imported when something is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pagedkv.testing.models import WINDOW, randomised

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 97
NUM_LAYERS = 4
_HIDDEN, _HEADS, _HEAD_DIM, _EXPERTS = 32, 4, 8, 4


def _named(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Fields of configs, and what they are shrunk to where a config has them.
_SIZES: dict[str, Any] = {
    **_named(VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size"),
    **_named(VOCAB_SIZE, "shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base src_vocab_size tgt_vocab_size"),
    **_named(0, "pad_token_id sep_token_id cls_token_id mask_token_id"),
    **_named(1, "bos_token_id"),
    **_named(2, "eos_token_id decoder_start_token_id"),
    **_named(256, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions"),
    **_named(256, "max_source_positions original_max_position_embeddings rel_extent max_sequence_length"),
    **_named(_HIDDEN, "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width"),
    **_named(_HIDDEN, "input_embedding_size output_embedding_size backbone_hidden_size pronunciation_embed_dim shape_embed_dim"),
    **_named(_HIDDEN, "adapter_in_dim adapter_out_dim adapter_input_size attention_hidden_size"),
    **_named(_HIDDEN, "audio_hidden_size encoder_hidden_size output_dim hidden_dim"),
    **_named(_HEAD_DIM, "num_filters downsample_hidden_size"),
    **_named(2 * _HIDDEN, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dim_ff dff d_inner intermediate_size_mlp"),
    **_named(2 * _HIDDEN, "dense_intermediate_size ffn_hidden_size n_inner feed_forward_size"),
    **_named(_HIDDEN, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size"),
    **_named(_HIDDEN, "shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size"),
    **_named(NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    **_named(NUM_LAYERS, "encoder_layers num_encoder_layers"),
    **_named(2, "num_kv_shared_layers layer_group_size attn_layer_period no_rope_layer_interval"),
    **_named(2, "sliding_window_pattern global_attn_every_n_layers full_attention_interval max_window_layers n_layers_per_attn_res_block"),
    **_named(1, "attn_layer_offset num_dense_layers first_k_dense_replace num_nextn_predict_layers"),
    **_named(_HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    **_named(_HEADS, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads"),
    **_named(_HEADS, "linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads num_query_groups"),
    **_named(32, "index_n_heads indexer_n_heads"),  # with few, many keys score zero alike, and which are chosen is up to chance
    **_named(2, "swa_num_key_value_heads linear_num_key_heads"),
    **_named(_HEAD_DIM, "head_dim kv_channels dim_head d_head qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim swa_head_dim"),
    **_named(_HEAD_DIM, "linear_value_head_dim linear_head_dim swa_v_head_dim attention_head_size query_pre_attn_scalar kv_lora_rank"),
    **_named(_HEAD_DIM, "laurel_rank hidden_size_per_layer_input d_rel gated_norm_rank o_lora_rank hc_lowrank ple_embed_dim adapter_rank"),
    **_named(2 * _HEAD_DIM, "global_head_dim q_lora_rank"),
    **_named(_HEAD_DIM // 2, "qk_rope_head_dim rotary_dim"),
    **_named(3 * _HEAD_DIM // 2, "qk_head_dim"),
    **_named(WINDOW, "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size local_attention"),
    **_named(WINDOW, "local_attention_window_len index_topk keep_window_size"),
    **_named(4, "index_block_size block_size"),
    **_named(2, "index_topk_blocks"),
    **_named(8, "state_size mamba_d_state ssm_state_size mamba_dt_rank time_step_rank"),
    **_named(2 * _HIDDEN // _HEADS, "mamba_d_head mamba_head_dim"),
    **_named(2 * _HIDDEN, "mamba_d_ssm"),
    **_named(2, "n_groups mamba_n_groups mamba_ngroups mamba_expand expand"),
    **_named(4, "chunk_size mamba_chunk_size"),
    **_named(_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k n_expert_groups"),
    **_named(True, "use_sliding_window is_decoder"),
    **_named(False, "tie_word_embeddings"),  # what reads out the embedding that it read in repeats itself
    **_named(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group expert_interval"),
}
# Special tokens of other kinds keep their ids, which lie outside the vocabulary: no text has images.

_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {
        **{
            "swa_num_attention_heads": _HEADS,
            "swa_num_key_value_heads": _HEADS,
            "swa_q_lora_rank": _HEAD_DIM,
            "swa_kv_lora_rank": _HEAD_DIM,
        },
        **{"swa_head_dim": 2 * _HEAD_DIM, "swa_qk_nope_head_dim": _HEAD_DIM, "swa_v_head_dim": _HEAD_DIM},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]], "attention_layers": ["global", "local"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": _HEAD_DIM // 2},
    "mamba2": {"head_dim": 2 * _HIDDEN // _HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HIDDEN // _HEADS},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}
"""What single architectures need beyond the table, most often because two of its fields must agree in them."""
_SEQ2SEQ = {"is_decoder": False, "decoder_start_token_id": 2}  # some configs leave the latter to checkpoints


def decoder_architectures() -> tuple[str, ...]:
    """Model types for which transformers names a causal language model, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def encoder_decoder_architectures() -> tuple[str, ...]:
    """Model types for which transformers names a sequence-to-sequence language model, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES))


def shrunk_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default config of an architecture, shrunk: 4 layers of every kind it has, 97 tokens, windows of ``WINDOW`` tokens.

    Args:
        model_type: a name of transformers' registry.
        overrides: arguments that replace the shrunk ones.

    Raises:
        KeyError: transformers does not know the name.
        Exception: whatever the config raises that does not accept these sizes; a new architecture may need overrides.
    """
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], {**_OVERRIDES.get(model_type, {}), **overrides})


def shrunk_model(model_type: str, *, seed: int = 0, attn_implementation: str | None = None) -> PreTrainedModel:
    """A causal language model of a shrunk config, with weights so wide that attention and state matter.

    Args:
        model_type: one of ``decoder_architectures()``.
        seed: of the weights.
        attn_implementation: as ``randomised`` takes it.

    Raises:
        Exception: whatever transformers raises that cannot build it.

    Cost: some tens of milliseconds, and the import of the architecture's code.
    """
    return randomised(shrunk_config(model_type), seed=seed, attn_implementation=attn_implementation)


def shrunk_seq2seq_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """The same for one of ``encoder_decoder_architectures()``."""
    return randomised(shrunk_config(model_type, **_SEQ2SEQ), seed=seed, seq2seq=True)


def _shrunk(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import PreTrainedConfig

    arguments: dict[str, Any] = {}
    defaults = _defaults(config_class)
    num_layers = next((defaults[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in defaults), None)
    for name, value in defaults.items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = _shrunk(type(value), {**_OVERRIDES.get(value.model_type, {}), **overrides.get(name, {})})
        elif name in _SIZES and isinstance(value, int | str | list | None):
            arguments[name] = _SIZES[name]
        elif name in ("num_key_value_heads", "num_kv_heads"):
            arguments[name] = _kv_heads(defaults, value)
        elif isinstance(value, list) and len(value) == num_layers and not (name == "layer_types" and "use_sliding_window" in defaults):
            arguments[name] = _fewer(value)
    return config_class(
        **{**arguments, **{name: value for name, value in overrides.items() if not isinstance(value, Mapping) or name not in arguments}}
    )


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Every argument of a config with its default, as far as it computes them itself."""
    fields = {field.name: None if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(config_class)}
    try:
        default = config_class()
    except Exception:  # some are valid only with other values than their own defaults
        return fields
    return {name: vars(default).get(name, value) for name, value in fields.items()}


def _kv_heads(defaults: Mapping[str, Any], num_kv_heads: int | None) -> int:
    """Heads in the same relation as by default: all, one, or a group each."""
    heads = next((defaults[name] for name in ("num_attention_heads", "n_heads", "n_head") if name in defaults), None)
    if num_kv_heads is None or num_kv_heads == heads or "kv_lora_rank" in defaults:
        return _HEADS
    return 1 if num_kv_heads == 1 else _HEADS // 2


def _fewer(by_layer: Sequence[Any]) -> list[Any]:
    """The distinct values of a list with one per layer, in the order they come first, repeated for ``NUM_LAYERS`` layers."""
    distinct: list[Any] = []
    for value in by_layer:
        if value not in distinct:
            distinct.append(value)
    return [distinct[layer % len(distinct)] for layer in range(NUM_LAYERS)]
