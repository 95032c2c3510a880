"""Step plans made by hand, for tests and experiments below the scheduler. It needs numpy only and owns nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int32Array, StepPlan

Ints = Sequence[int] | npt.NDArray[np.integer]


def make_plan(
    query_lens: Ints,
    seq_lens: Ints,
    *,
    block_tables: Sequence[Sequence[int]] | npt.NDArray[np.integer],
    block_size: int,
    token_ids: Ints | None = None,
) -> StepPlan:
    """A step plan from lengths and block tables, as a scheduler would have made it.

    Sequence ``s`` computes its last ``query_lens[s]`` of ``seq_lens[s]`` positions now; every sequence wants the logits of
    its last token. The order of the sequences is kept, so put decodes first where it matters.

    Args:
        query_lens: ``[S]`` tokens computed now, at least 1 each.
        seq_lens: ``[S]`` tokens stored after the step.
        block_tables: ``[S, M]`` block ids for one layer group, or ``[G, S, M]``; rows of a list may differ in length and
            are padded with the null block.
        block_size: tokens in one block.
        token_ids: ``[T]`` the tokens to compute; all 0 when left out.

    Returns:
        a plan with step 0, handles and rows ``0 .. S - 1``, and no copies.

    Raises:
        InvalidRequestError: lengths that disagree, or a table too short for its sequence.

    >>> plan = make_plan([1, 3], [6, 3], block_tables=[[2, 5], [4]], block_size=4)
    >>> plan.slot_mapping.tolist(), plan.positions.tolist(), plan.num_decodes
    ([[21, 16, 17, 18]], [5, 0, 1, 2], 1)
    """
    queries, lengths = np.asarray(query_lens, dtype=np.int32), np.asarray(seq_lens, dtype=np.int32)
    tables = _tables(block_tables)
    _check(queries, lengths, tables=tables, block_size=block_size)
    ends = np.cumsum(queries, dtype=np.int32)
    every = np.arange(len(queries), dtype=np.int64)
    owner = np.repeat(every, queries)
    positions = np.arange(len(owner), dtype=np.int32) + (lengths - ends)[owner]
    slots = tables[:, owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return StepPlan(
        step=0,
        seqs=every,
        rows=every,
        token_ids=_token_ids(token_ids, len(owner)),
        positions=positions,
        query_lens=queries,
        seq_lens=lengths,
        cu_seqlens_q=np.append(np.int32(0), ends),
        slot_mapping=slots,
        block_tables=tables,
        copies=tuple(np.zeros((0, 2), dtype=np.int32) for _ in tables),
        num_decodes=int(np.argmax(np.append(queries > 1, True))),  # those before the first that is longer
        logits_indices=ends.astype(np.int64) - 1,
        sampling_seqs=every,
        sampling_logits=every,
    )


def _check(queries: Int32Array, lengths: Int32Array, *, tables: Int32Array, block_size: int) -> None:
    num_seqs = len(queries)
    if lengths.shape != queries.shape or tables.shape[1] != num_seqs or not num_seqs:
        raise InvalidRequestError(f"{num_seqs} query lengths, {len(lengths)} sequence lengths, {tables.shape[1]} block tables")
    if (queries < 1).any() or (queries > lengths).any():
        raise InvalidRequestError(f"query lengths {queries.tolist()} must lie between 1 and the sequence lengths {lengths.tolist()}")
    if -(-int(lengths.max()) // block_size) > tables.shape[2]:
        raise InvalidRequestError(f"tables of {tables.shape[2]} blocks of {block_size} are too short for {int(lengths.max())} tokens")


def _token_ids(given: Ints | None, count: int) -> Int32Array:
    tokens = np.zeros(count, dtype=np.int32) if given is None else np.asarray(given, dtype=np.int32)
    if tokens.shape != (count,):
        raise InvalidRequestError(f"token_ids {list(tokens.shape)}: one for each of {count} tokens is needed")
    return tokens


def _tables(block_tables: Sequence[Sequence[int]] | npt.NDArray[np.integer]) -> Int32Array:
    if isinstance(block_tables, np.ndarray):
        array = block_tables.astype(np.int32)
        if array.ndim not in (2, 3):
            raise InvalidRequestError(f"block_tables {list(array.shape)}: [S, M] or [G, S, M] is needed")
        return array if array.ndim == 3 else array[None]
    padded = np.zeros((1, len(block_tables), max((len(row) for row in block_tables), default=0)), dtype=np.int32)
    for index, row in enumerate(block_tables):
        padded[0, index, : len(row)] = row
    return padded
