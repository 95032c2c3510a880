"""Changes to logits before temperature: penalties, bias, forbidden tokens, a request's own processors, in this order.

It owns what each change does to a row. It does not own which rows have one (the row table) nor filters. Changes of one kind are
one indexed write over all rows that have it; only processors run row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.errors import InvalidRequestError, PagedKVError
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.sampling.dense import to_device
from pagedkv.sampling.rows import Processor, RowTable

History = Callable[[int], Int32Array]
"""Row to the ``[num_tokens]`` int32 tokens known of it, prompt first."""


def edit(scores: Tensor, rows: Int64Array, picks: Int64Array, *, table: RowTable, history: History) -> dict[int, PagedKVError]:
    """Apply every change of the picked rows, in place.

    Args:
        scores: ``[Q, V]`` contiguous float32, changed.
        rows: ``[Q]`` rows of the table.
        picks: indices into ``rows`` of the rows that have a change.
        table: the rows' parameters.
        history: tokens by row.

    Returns:
        Index into ``rows`` to the error of a row whose own processor failed; its scores mean nothing.

    Cost: one indexed write per kind of change and row-wise work of O(tokens known) for penalties.
    """
    _repetition(scores, rows, picks, table=table, history=history)
    _presence_and_frequency(scores, rows, picks, table=table, history=history)
    _bias(scores, rows, picks, table=table)
    _forbid(scores, rows, picks, table=table, history=history)
    return _allow_and_process(scores, rows, picks, table=table, history=history)


def call_processors(processors: Iterable[Processor], tokens: Int32Array, scores: Tensor) -> Tensor:
    """Run processors of transformers' signature on one row.

    Args:
        processors: called in order with ``[1, L]`` int64 ids and ``[1, V]`` scores.
        tokens: ``[L]`` int32 prompt and output.
        scores: ``[V]`` float32.

    Returns:
        ``[V]`` float32.

    Raises:
        InvalidRequestError: a processor raised (its error is the cause) or returned another shape.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(scores.device)
    current = scores[None]
    for processor in processors:
        try:
            result = processor(ids, current)
        except Exception as error:  # whatever a caller's own code raises ends its request and no other
            name = getattr(processor, "__name__", type(processor).__name__)
            raise InvalidRequestError(f"logits processor {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(result, Tensor) or result.shape != current.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            name = getattr(processor, "__name__", type(processor).__name__)
            raise InvalidRequestError(f"logits processor {name} returned {got}, it has to return scores of shape {tuple(current.shape)}")
        current = result.to(scores.dtype)
    return current[0]


def _flat(scores: Tensor, pick: int, ids: npt.NDArray[np.integer]) -> Int64Array:
    vocab_size = scores.shape[1]
    known = ids[(ids >= 0) & (ids < vocab_size)]  # a model's table of inputs may be wider than its logits
    return known.astype(np.int64) + pick * vocab_size


def _repetition(scores: Tensor, rows: Int64Array, picks: Int64Array, *, table: RowTable, history: History) -> None:
    parts: list[Int64Array] = []
    penalties: list[np.float32] = []
    for pick in picks[table.repetition[rows[picks]] != 1.0]:
        parts.append(_flat(scores, int(pick), history(int(rows[pick]))))
        penalties.append(table.repetition[rows[pick]])
    if not parts:
        return
    index = to_device(np.concatenate(parts), scores.device)
    penalty = to_device(np.repeat(np.asarray(penalties, dtype=np.float32), [len(part) for part in parts]), scores.device)
    flat = scores.view(-1)
    old = flat[index]
    flat[index] = torch.where(old < 0, old * penalty, old / penalty)  # a token named twice gets the same value twice


def _presence_and_frequency(scores: Tensor, rows: Int64Array, picks: Int64Array, *, table: RowTable, history: History) -> None:
    parts: list[Int64Array] = []
    deltas: list[npt.NDArray[np.float32]] = []
    for pick in picks[(table.presence[rows[picks]] != 0.0) | (table.frequency[rows[picks]] != 0.0)]:
        row = int(rows[pick])
        ids, counts = np.unique(_flat(scores, int(pick), history(row)[table.num_prompt_tokens[row] :]), return_counts=True)
        parts.append(ids)
        deltas.append((table.frequency[row] * counts + table.presence[row]).astype(np.float32))
    if parts:
        index = to_device(np.concatenate(parts), scores.device)
        scores.view(-1)[index] -= to_device(np.concatenate(deltas), scores.device)


def _bias(scores: Tensor, rows: Int64Array, picks: Int64Array, *, table: RowTable) -> None:
    extras = [(int(pick), table.extras(int(rows[pick]))) for pick in picks]
    biased = [(pick, extra) for pick, extra in extras if extra.bias_ids.size]
    if biased:
        index = to_device(np.concatenate([_flat(scores, pick, extra.bias_ids) for pick, extra in biased]), scores.device)
        scores.view(-1)[index] += to_device(np.concatenate([extra.bias_values for _, extra in biased]), scores.device)


def _forbid(scores: Tensor, rows: Int64Array, picks: Int64Array, *, table: RowTable, history: History) -> None:
    """Bad words that the next token would complete, and every end before ``min_tokens``."""
    parts: list[Int64Array] = []
    for pick in picks:
        row = int(rows[pick])
        extra = table.extras(row)
        if extra.bad_words:
            tokens = history(row)
            ends = [word[-1] for word in extra.bad_words if _ends_with(tokens, word[:-1])]
            parts.append(_flat(scores, int(pick), np.asarray(ends, dtype=np.int64)))
        if extra.stop_ids.size and len(history(row)) - table.num_prompt_tokens[row] < table.min_tokens[row]:
            parts.append(_flat(scores, int(pick), extra.stop_ids))
    if parts:
        scores.view(-1)[to_device(np.concatenate(parts), scores.device)] = -torch.inf


def _ends_with(tokens: Int32Array, tail: Int64Array) -> bool:
    return len(tail) <= len(tokens) and bool((tokens[len(tokens) - len(tail) :] == tail).all())


def _allow_and_process(
    scores: Tensor, rows: Int64Array, picks: Int64Array, *, table: RowTable, history: History
) -> dict[int, PagedKVError]:
    errors: dict[int, PagedKVError] = {}
    for pick in picks:
        row = int(rows[pick])
        extra = table.extras(row)
        target = scores[int(pick)]
        if extra.allowed_ids is not None:
            allowed = to_device(extra.allowed_ids, scores.device)
            kept = target[allowed]
            target.fill_(-torch.inf)
            target[allowed] = kept
        if extra.processors:
            try:
                target.copy_(call_processors(extra.processors, history(row), target))
            except InvalidRequestError as error:
                errors[int(pick)] = error
    return errors
