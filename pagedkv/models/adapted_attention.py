"""What adapters compute: for each class of attention modules without the attention interface, a way through it that reads blocks in place.

Each adapter is written for one class of transformers. It calls the module's own projections and rotation and says with which scale,
window and ALiBi it attends; where the module attends in a method of its own, that alone is replaced. It owns no proof: options that it
does not know it refuses, and whether a model that runs so computes what it should is found by the self-check.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from pagedkv.attention import Mask
from pagedkv.errors import UnsupportedModelError
from pagedkv.models.alibi import BiasColumns, linear_slopes
from pagedkv.models.context import AttentionCall, StepContext
from pagedkv.models.limits import max_positions

# Distances over which biases must be linear to be taken for slopes; where they are rounded, this shows in far fewer.
_NUM_BIASES = 4096

Compute = Callable[..., Any]
Shared = dict[object, Any]  # what the layers of one model have in common, by whatever tells it apart


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """What takes a method's place in one module during a step.

    Attributes:
        method: its name.
        compute: called with the step that runs and the method's own arguments; returns what the method does, without attention weights.
    """

    method: str
    compute: Compute


def _cache(arguments: Mapping[str, object]) -> Any:
    """The step's cache among a call's arguments: releases of transformers differ in what attention modules call it."""
    (cache,) = (value for value in arguments.values() if isinstance(value, Cache))
    return cache


def _attend(module: nn.Module, step: StepContext, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """``[1, T, Hq, Dv]`` of ``query [1, Hq, T, Dk]``, and K and V as the cache gave them back."""
    call = AttentionCall(module=module, query=query, key=key, value=value, **{"mask": None, "softcap": None, "window": None, **how})
    return step.attend(call)


def _bloom(module: Any, shared: Shared) -> Adapted:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise UnsupportedModelError("slow_but_exact adds the output up from parts")
    if module.beta != 1.0:
        raise UnsupportedModelError(f"beta is {module.beta}, and 1 is expected")
    slopes = _shared_slopes(module, shared, lambda: _alibi_tensor(module, _NUM_BIASES))

    def forward(step: StepContext, hidden_states: Tensor, residual: Tensor, **others: Any) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        key, value = _cache(others).update(key, value, module.layer_idx)
        attended = _attend(module, step, query, key, value, scale=module.inv_norm_factor, alibi_slopes=slopes)
        return module.dense(attended.flatten(2)) + residual, None

    return Adapted("forward", forward)


def _falcon(module: Any, shared: Shared) -> Adapted:
    # Heads that share K and V come with a copy each; one of them is stored.
    group = module.num_heads // module.num_kv_heads
    repeated = group if module.new_decoder_architecture else 1
    columns = _falcon_columns(module, shared, group) if module.config.alibi else None

    def forward(
        step: StepContext,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        *,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(hidden_states)))
        key, value = key[:, ::repeated], value[:, ::repeated]
        if columns is not None:
            query, key = columns.extended(query, key, position_ids)
        else:
            query, key = _modeling(module).apply_rotary_pos_emb(query, key, *cast(tuple[Tensor, Tensor], position_embeddings))
        key, value = _cache(others).update(key, value, module.layer_idx)
        # With ALiBi the model has computed on the mask, and its biases are in the columns.
        mask = attention_mask if columns is None else None
        attended = _attend(module, step, query, key, value, scale=module.inv_norm_factor, mask=mask)
        return module.dense(attended.flatten(2)), None

    return Adapted("forward", forward)


def _falcon_columns(module: Any, shared: Shared, group: int) -> BiasColumns:
    reach = max_positions(module.config)
    if reach is None:
        raise UnsupportedModelError("biases are rounded, and the config states no number of positions to know them for")
    key = ("columns", module.num_heads, group)
    if key not in shared:
        shared[key] = BiasColumns(_alibi_tensor(module, reach), group)
    return cast(BiasColumns, shared[key])


def _mpt(module: Any, shared: Shared) -> Adapted:
    def biases() -> Tensor:
        table: Tensor = _modeling(module).build_mpt_alibi_tensor(module.n_heads, module.max_seq_length)
        return table[:, 0]

    slopes = _shared_slopes(module, shared, biases)

    def forward(step: StepContext, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        joined = module.Wqkv(hidden_states)
        if module.clip_qkv:
            joined = joined.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, value = joined.unflatten(2, (3, module.n_heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = _cache(others).update(key, value, module.layer_idx)
        attended = _attend(module, step, query, key, value, scale=module.softmax_scale, alibi_slopes=slopes)
        return module.out_proj(attended.flatten(2)), None

    return Adapted("forward", forward)


def _inner(module: Any, *, scale: float, window: int | None = None) -> Adapted:
    """For modules that attend in a method ``_attn``."""

    def attend(
        step: StepContext, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, head_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if head_mask is not None:
            raise UnsupportedModelError(f"{type(module).__name__} passes head_mask, which paged attention does not know")
        mask = attention_mask if window is None else None
        # Some rotate in float32, and compare with stored keys in their own dtype.
        attended = _attend(module, step, query.to(key.dtype), key, value, scale=scale, mask=mask, window=window)
        return attended.transpose(1, 2), None

    return Adapted("_attn", attend)


def _gptj(module: Any, shared: Shared) -> Adapted:
    return _inner(module, scale=1.0 / float(module.scale_attn))


def _gpt_neox_japanese(module: Any, shared: Shared) -> Adapted:
    return _inner(module, scale=1.0 / float(module.norm_factor))


def _gpt_neo(module: Any, shared: Shared) -> Adapted:
    mask = Mask.sliding(module.config.window_size) if module.attention_type == "local" else Mask.causal()
    # Its mask is a table over all positions, longer than a self-check: looked at as a whole, where it has data.
    table: Tensor = module.bias
    if table.device.type != "meta":
        key = (mask, tuple(table.shape))
        if key not in shared:
            positions = torch.arange(table.shape[-1], device=table.device)
            shared[key] = mask.visible(positions[:, None], positions)
        if not torch.equal(table[0, 0].to(torch.bool), shared[key]):
            raise UnsupportedModelError(f"a layer of type {module.attention_type!r} has another mask than {mask}")
    return _inner(module, scale=1.0, window=mask.size or None)


def _three(module: Any, names: tuple[str, str, str], *, width: int, scale: float, output: str | None, cross: str) -> Adapted:
    """For modules that have three projections and nothing but attention behind them.

    Args:
        module: the module.
        names: of its projections of queries, keys and values.
        width: of a head.
        scale: factor on the scores.
        output: name of the projection of what was attended; None where another module has it.
        cross: name of the argument with another sequence to attend to.
    """

    def forward(step: StepContext, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
        if others.get(cross) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} attends to another sequence")
        parts = (getattr(module, name)(hidden_states) for name in names)
        query, key, value = (part.view(*part.shape[:2], -1, width).transpose(1, 2) for part in parts)
        key, value = _cache(others).update(key, value, module.layer_idx)
        attended = _attend(module, step, query, key, value, scale=scale, mask=attention_mask).flatten(2)
        return attended if output is None else getattr(module, output)(attended), None

    return Adapted("forward", forward)


def _bert(module: Any, shared: Shared) -> Adapted:
    width = module.attention_head_size
    return _three(module, ("query", "key", "value"), width=width, scale=width**-0.5, output=None, cross="encoder_hidden_states")


def _xglm(module: Any, shared: Shared) -> Adapted:
    names = ("q_proj", "k_proj", "v_proj")
    return _three(module, names, width=module.head_dim, scale=module.scaling, output="out_proj", cross="key_value_states")


def _modeling(module: nn.Module) -> Any:
    """The modeling file of the module's class."""
    return sys.modules[type(module).__module__]


def _alibi_tensor(module: Any, num_positions: int) -> Tensor:
    """``[H, P]`` float32 biases of the keys at the first positions, as BLOOM and Falcon make them."""
    ones = torch.ones((1, num_positions), dtype=torch.int64, device="cpu")
    table: Tensor = _modeling(module).build_alibi_tensor(ones, module.num_heads, torch.float32)
    return table[:, 0]


def _shared_slopes(module: nn.Module, shared: Shared, biases: Callable[[], Tensor]) -> Tensor:
    """The same tensor for all layers, so that a step prepares their attention once."""
    if "slopes" not in shared:
        shared["slopes"] = linear_slopes(biases()).to(next(module.parameters()).device)
    return cast(Tensor, shared["slopes"])


ADAPTERS: Mapping[str, Callable[[Any, Shared], Adapted]] = MappingProxyType(
    {
        "transformers.models.bloom.modeling_bloom.BloomAttention": _bloom,
        "transformers.models.codegen.modeling_codegen.CodeGenAttention": _gptj,
        "transformers.models.falcon.modeling_falcon.FalconAttention": _falcon,
        "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": _gpt_neo,
        "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": _gpt_neox_japanese,
        "transformers.models.gptj.modeling_gptj.GPTJAttention": _gptj,
        "transformers.models.megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention": _bert,
        "transformers.models.mpt.modeling_mpt.MptAttention": _mpt,
        "transformers.models.rembert.modeling_rembert.RemBertSelfAttention": _bert,
        "transformers.models.xglm.modeling_xglm.XGLMAttention": _xglm,
    }
)
"""By the class that each is written for. Given a module and what its model's layers share, an adapter raises ``UnsupportedModelError``
for what it does not know."""
