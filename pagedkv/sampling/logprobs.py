"""Log-probabilities of tokens, from the model's raw logits.

It owns their arithmetic and order. It does not own who asks for them; a row that does not ask costs nothing. What it returns holds
no text: `pagedkv.sampling.values.Logprob.decoded_token` is filled in where there is a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.errors import InvalidRequestError
from pagedkv.sampling.dense import Float32Array, best_first
from pagedkv.sampling.filters import top_candidates
from pagedkv.sampling.values import Logprob


def token_logprobs(logits: Tensor, token_id: int, num: int) -> dict[int, Logprob]:
    """The log-probability of one token and of the most likely ones.

    Args:
        logits: ``[V]`` float32 raw logits, on any device.
        token_id: the token that was chosen, below V.
        num: how many of the most likely to add; -1 is all V.

    Returns:
        The chosen token first, then by rank; ``num`` or ``num + 1`` entries.

    Cost: one copy of the row to the host, a few passes over it and a sort of about ``num`` candidates.
    """
    row = np.ascontiguousarray(logits.detach().cpu().numpy())
    chosen = row[token_id]
    best = row.max()
    normaliser = float(best) + float(np.log(np.exp(row - best).sum(dtype=np.float64)))
    rank = 1 + int((row > chosen).sum()) + int((row[:token_id] == chosen).sum())
    result = {token_id: Logprob(float(chosen) - normaliser, rank)}
    for position, other in enumerate(_best_tokens(row, len(row) if num < 0 else num), start=1):
        result.setdefault(other, Logprob(float(row[other]) - normaliser, position))
    return result


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int] | npt.NDArray[np.integer], num: int) -> list[dict[int, Logprob]]:
    """What the model thought of each next token of a prompt.

    Args:
        logits: ``[P, V]`` float32, the rows of positions ``0 .. P - 1``.
        next_token_ids: ``[P]`` the tokens that follow them, so the first token of a prompt has none.
        num: as in `token_logprobs`.

    Returns:
        ``P`` mappings, in order.

    Raises:
        InvalidRequestError: as many ids as rows are needed.

    Cost: P times `token_logprobs`.
    """
    if logits.dim() != 2 or len(logits) != len(next_token_ids):
        raise InvalidRequestError(f"logits of shape {tuple(logits.shape)} for {len(next_token_ids)} next tokens, one row each is needed")
    return [token_logprobs(row, int(token), num) for row, token in zip(logits, next_token_ids, strict=True)]


def _best_tokens(row: Float32Array, num: int) -> list[int]:
    if num == 0:
        return []
    if num >= len(row):
        return [int(token) for token in best_first(row)]
    found = top_candidates(torch.from_numpy(row)[None], np.asarray([num], dtype=np.int64))
    order = best_first(found.scores)[:num]  # equals by ascending id, as candidates are
    return [int(token) for token in found.ids[order]]
