"""Tiny encoder-decoders, and what transformers' own ``generate`` makes of each prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from pagedkv.testing.models import randomised

_BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128, "dropout": 0.0, "decoder_start_token_id": 2,
    "pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}  # fmt: skip
PAIRS = {"t5": _T5, "mt5": _T5, "bart": _BART, "marian": _BART, "pegasus": _BART}
"""t5 and mt5 know positions by a bias of their distance; the others learned them, and count them from one number for all rows."""


def pair_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """One of them, random weights, on the CPU in float32."""
    return randomised(AutoConfig.for_model(name, **{**PAIRS[name], **overrides}), seed=seed, seq2seq=True)


def random_prompts(*lens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lens]


def alone(model: PreTrainedModel, prompt: Sequence[int], max_new: int, **settings: Any) -> tuple[int, ...]:
    """Greedy tokens behind the one that the decoder begins with; nothing ends them."""
    ids = torch.tensor([list(prompt)])
    loop: Callable[..., Any] = model.generate
    fixed = {"do_sample": False, "max_new_tokens": max_new, "eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
    return tuple(loop(ids, attention_mask=torch.ones_like(ids), **{**fixed, **settings})[0, 1:].tolist())
