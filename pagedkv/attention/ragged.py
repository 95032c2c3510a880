"""Attention over K and V that a model made from gathered ones, the tokens of all sequences in one row. Reads no pool and owns nothing.

The slow way: a model that goes on to change what it has stored (latents that it expands, heads that it joins) has the whole past
in memory anyway, so there is nothing to gain from reading blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedkv.attention.protocol import AttendOptions
from pagedkv.plan import StepPlan

# Rows of scores held in memory at once, over all heads and keys: some tens of megabytes.
_MAX_SCORES = 1 << 22


def attend_ragged(query: Tensor, key: Tensor, value: Tensor, *, plan: StepPlan, options: AttendOptions) -> Tensor:
    """Each sequence's new tokens attend over all of its own.

    Args:
        query: ``[Hq, T, Dk]``, packed like the step's tokens.
        key: ``[H, K, Dk]``, ``H`` a divisor of ``Hq``: the ``plan.seq_lens`` tokens of every sequence, one after the other.
        value: ``[H, K, Dv]`` likewise.
        plan: the step.
        options: mask, scale and variants.

    Returns:
        ``[T, Hq, Dv]`` in the query's dtype, contiguous.

    Cost: a few torch calls a sequence; scores of at most 4 million elements are held at once, one query's where that is more.
    """
    output = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
    first_token = first_key = 0
    for num_queries, length in zip(plan.query_lens.tolist(), plan.seq_lens.tolist(), strict=True):
        rows = max(1, _MAX_SCORES // (length * query.shape[0]))
        for start in range(0, num_queries, rows):
            tokens = slice(first_token + start, first_token + min(start + rows, num_queries))
            end = length - num_queries + min(start + rows, num_queries)
            low = options.mask.first_visible(length - num_queries + start)
            keys = slice(first_key + low, first_key + end)
            result = _attend_rows(query[:, tokens], key[:, keys], value[:, keys], end=end, options=options)
            output[tokens] = result.transpose(0, 1)
        first_token += num_queries
        first_key += length
    return output


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, *, end: int, options: AttendOptions) -> Tensor:
    """Query ``[Hq, q, Dk]`` of the last ``q`` positions before ``end``; K ``[H, k, Dk]`` of the last ``k``."""
    group = query.shape[0] // key.shape[0]
    key, value = (tensor if group == 1 else tensor.repeat_interleave(group, dim=0) for tensor in (key, value))
    query_positions = torch.arange(end - query.shape[1], end, device=query.device)
    key_positions = torch.arange(end - key.shape[1], end, device=query.device)
    visible = options.mask.visible(query_positions[:, None], key_positions)
    if options.softcap is None and options.sinks is None and options.alibi_slopes is None:
        result: Tensor = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=visible, scale=options.scale)
        return result[0]
    precision = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(precision) @ key.to(precision).transpose(1, 2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        scores = scores + options.alibi_slopes.to(precision)[:, None, None] * (key_positions - query_positions[:, None])
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks.to(precision)[:, None, None].expand(-1, scores.shape[1], 1)], dim=2)
    weights = torch.softmax(scores, dim=2)[..., : key.shape[1]]
    return (weights @ value.to(precision)).to(query.dtype)
