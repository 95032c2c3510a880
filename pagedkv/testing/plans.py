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
    queries = np.asarray(query_lens, dtype=np.int32)
    lengths = np.asarray(seq_lens, dtype=np.int32)
    tables = _tables(block_tables)
    num_seqs = len(queries)
    _check(queries, lengths, tables=tables, block_size=block_size)
    cumulative = np.zeros(num_seqs + 1, dtype=np.int32)
    np.cumsum(queries, out=cumulative[1:])
    num_tokens = int(cumulative[-1])
    owner = np.repeat(np.arange(num_seqs), queries)
    positions = np.arange(num_tokens, dtype=np.int32) - cumulative[owner] + (lengths - queries)[owner]
    slots = tables[:, owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    tokens = np.zeros(num_tokens, dtype=np.int32) if token_ids is None else np.asarray(token_ids, dtype=np.int32)
    if tokens.shape != (num_tokens,):
        raise InvalidRequestError(f"token_ids {list(tokens.shape)}: one for each of {num_tokens} tokens is needed")
    longer = np.flatnonzero(queries > 1)
    every = np.arange(num_seqs, dtype=np.int64)
    return StepPlan(
        step=0,
        seqs=every,
        rows=every,
        token_ids=tokens,
        positions=positions.astype(np.int32),
        query_lens=queries,
        seq_lens=lengths,
        cu_seqlens_q=cumulative,
        slot_mapping=slots,
        block_tables=tables,
        copies=tuple(np.zeros((0, 2), dtype=np.int32) for _ in tables),
        num_decodes=int(longer[0]) if len(longer) else num_seqs,
        logits_indices=cumulative[1:].astype(np.int64) - 1,
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
