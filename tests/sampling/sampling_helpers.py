"""Shared by the sampling tests: registering rows, and what transformers' own processors leave of the same logits."""

from __future__ import annotations

import numpy as np
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pagedkv.sampling import Sampler, SamplingParams, TokenHistories


def make_histories(tokens: list[list[int]]) -> TokenHistories:
    table = np.full((len(tokens), max(map(len, tokens), default=0) + 3), 2**30, dtype=np.int32)  # what lies behind is garbage
    for row, known in enumerate(tokens):
        table[row, : len(known)] = known
    return TokenHistories(table, np.asarray([len(known) for known in tokens], dtype=np.int32))


def make_sampler(params: list[SamplingParams], *, vocab_size: int, prompt: list[int] | None = None, seed: int = 0, **kwargs) -> Sampler:
    sampler = Sampler(vocab_size, "cpu", max_rows=2)
    for row, each in enumerate(params):
        sampler.add(row, each, prompt_token_ids=prompt or [1, 2, 3], seed=seed + row, index=0, **kwargs)
    return sampler


def reference_scores(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> torch.Tensor:
    """transformers' warpers on one row ``[V]``, temperature in float32 as there, the filters in float64 to be free of its rounding."""
    ids, x = torch.tensor([history]), logits[None]
    if params.repetition_penalty != 1.0:
        x = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, x)
    x = TemperatureLogitsWarper(params.temperature)(ids, x).double()
    if params.top_k:
        x = TopKLogitsWarper(params.top_k)(ids, x)
    if params.top_p < 1.0:
        x = TopPLogitsWarper(params.top_p)(ids, x)
    if params.min_p > 0.0:
        x = MinPLogitsWarper(params.min_p)(ids, x)
    if params.typical_p < 1.0:
        x = TypicalLogitsWarper(params.typical_p)(ids, x)
    return x[0].float()


def arange(num: int) -> np.ndarray:
    return np.arange(num, dtype=np.int64)
