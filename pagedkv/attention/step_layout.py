"""How one step reads the pools: decodes bucketed by length, prefill chunks cut into tiles. Worked out once, read by every layer.

It owns index tensors of one step. It does not read K or V, and knows no head dimension and no score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.mask import Mask
from pagedkv.plan import Int32Array, Int64Array, StepPlan

# Measured on a CPU. Another bucket costs as much as gathering and multiplying some 500 tokens that nobody needs, ...
_PADDING_TOKENS = 512
# ... K and V of a bucket should stay in the cache between the gather and the two products: elements of K and V together, ...
_BUCKET_NUMEL = 1 << 20
# ... a tile should be large enough to multiply well, yet skip most of what is not causal, ...
_TILE_ROWS = 256
# ... and where its scores are held in memory, they should stay in the cache, too: elements over all heads.
_TILE_SCORES = 1 << 19


@dataclass(frozen=True, slots=True)
class LayoutKey:
    """What two layers must have in common to share a layout.

    Attributes:
        group: layer group, which selects the block tables.
        mask: which positions are seen.
        num_kv_heads: heads of K and V.
        rows_per_block: distance of two blocks in ``LayerPool.key_rows``.
        numel_per_token: elements of K and V of one token, for the size of a bucket.
        score_heads: query heads when scores are held in memory, which bounds the tiles; 0 when a fused kernel runs.
    """

    group: int
    mask: Mask
    num_kv_heads: int
    rows_per_block: int
    numel_per_token: int
    score_heads: int


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Decodes of similar length, gathered and computed together as ``n`` sequences of ``M`` blocks.

    Attributes:
        first, end: the bucket's part of ``StepLayout.decode_tokens``; ``n = end - first``.
        rows: ``[n * Hkv * M]`` int64 rows of the pool, ordered by sequence, head, block; the null block pads.
        low, high: the gathered columns that any sequence of the bucket sees.
        visible: ``[n, 1, 1, 1, high - low]`` bool, columns that a sequence sees; None when all see all.
        stale: int64 rows of the gathered ``[n * Hkv * M * B]`` tokens that lie in a sequence's own blocks but belong to no
            visible token, whose V must be zeroed before it is multiplied; None when there are none.
        query_column: ``[n, 1, 1, 1, 1]`` int64, the column of each sequence's query, counted from ``low``.
    """

    first: int
    end: int
    rows: Tensor
    low: int
    high: int
    visible: Tensor | None
    stale: Tensor | None
    query_column: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Consecutive queries of one chunk and the gathered columns that they see.

    Attributes:
        first, end: packed tokens.
        low, high: gathered columns; the last one is the last query's own.
        visible: ``[end - first, high - low]`` bool; None when the tile is plain causal over its own tokens.
    """

    first: int
    end: int
    low: int
    high: int
    visible: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The queries of one sequence that computes more than one token. ``rows``: ``[Hkv * M]`` int64 rows of the pool."""

    rows: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """All reading of one step for the layers of one ``LayoutKey``. ``decode_tokens``: ``[n]`` int64 packed tokens by bucket."""

    decode_tokens: Tensor
    buckets: tuple[Bucket, ...]
    chunks: tuple[Chunk, ...]


def build_layout(plan: StepPlan, key: LayoutKey, *, tables: Int32Array, block_size: int, device: torch.device) -> StepLayout:
    """Work out one layout.

    Args:
        plan: the step.
        key: what the layers share.
        tables: ``[S, M]`` block tables of the key's group.
        block_size: tokens in one block.
        device: where the index tensors go.

    Cost: a few dozen numpy calls per bucket and chunk; no loop over decodes.
    """
    decodes = np.flatnonzero(plan.query_lens == 1)
    spans = _Spans.of(plan.seq_lens[decodes].astype(np.int64) - 1, key.mask, block_size)
    order = np.argsort(-spans.num_blocks, kind="stable")
    spans, decodes = spans.take(order), decodes[order]
    buckets = []
    for first, end in _cuts(spans.num_blocks, key, block_size):
        ids = _gather_ids(tables, decodes[first:end], spans.take(slice(first, end)))
        buckets.append(_bucket(spans.take(slice(first, end)), _pool_rows(ids, key), first=first, key=key, block_size=block_size))
    chunks = tuple(_chunks(plan, key, tables=tables, block_size=block_size, device=device))
    tokens = plan.cu_seqlens_q[decodes].astype(np.int64)
    return StepLayout(
        decode_tokens=torch.from_numpy(tokens).to(device),
        buckets=tuple(_to_device(bucket, device) for bucket in buckets),
        chunks=chunks,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Per decode ``[n]`` int64: the blocks it reads, and its visible tokens ``[low, high)`` counted from the first of them."""

    first_block: Int64Array
    num_blocks: Int64Array
    low: Int64Array
    high: Int64Array

    @classmethod
    def of(cls, positions: Int64Array, mask: Mask, block_size: int) -> _Spans:
        first = mask.first_visible_each(positions)
        first_block = first // block_size
        start = first_block * block_size
        return cls(first_block, positions // block_size - first_block + 1, first - start, positions + 1 - start)

    def take(self, index: Int64Array | slice) -> _Spans:
        return _Spans(self.first_block[index], self.num_blocks[index], self.low[index], self.high[index])


def _cuts(num_blocks: Int64Array, key: LayoutKey, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut decodes, longest first, where padding would cost more than another bucket, or the bucket would leave the cache."""
    total, first = len(num_blocks), 0
    while first < total:
        longest = int(num_blocks[first])
        fitting = max(1, _BUCKET_NUMEL // (longest * block_size * key.numel_per_token))
        padding = np.cumsum(longest - num_blocks[first : first + fitting]) * block_size
        end = first + int(np.searchsorted(padding, _PADDING_TOKENS, side="right"))
        yield first, end
        first = end


def _gather_ids(tables: Int32Array, seqs: Int64Array, spans: _Spans) -> Int64Array:
    """``[n, M]`` block ids, the null block after each sequence's last."""
    column = np.arange(int(spans.num_blocks.max()))
    inside = column < spans.num_blocks[:, None]
    columns = np.where(inside, spans.first_block[:, None] + column, 0)
    return np.where(inside, tables[seqs[:, None], columns], 0).astype(np.int64)


def _pool_rows(ids: Int64Array, key: LayoutKey) -> Tensor:
    """Rows of the pool by sequence, head and block, for ``[n, M]`` int64 block ids."""
    heads = np.arange(key.num_kv_heads, dtype=np.int64)[:, None]
    return torch.from_numpy((ids[:, None, :] * key.rows_per_block + heads).reshape(-1))


def _bucket(spans: _Spans, rows: Tensor, *, first: int, key: LayoutKey, block_size: int) -> Bucket:
    num, low, high = len(spans.low), int(spans.low.min()), int(spans.high.max())
    width = int(spans.num_blocks.max()) * block_size
    column = np.arange(width)
    seen = (column >= spans.low[:, None]) & (column < spans.high[:, None])
    visible = stale = None
    if not seen[:, low:high].all():
        visible = torch.from_numpy(seen[:, low:high].reshape(num, 1, 1, 1, high - low))
        # Padding is the null block, which is zeros for ever: only a sequence's own blocks can hold something stale.
        own = (column >= low) & (column < np.minimum(high, spans.num_blocks * block_size)[:, None])
        seq, place = np.nonzero(own & ~seen)
        heads = np.arange(key.num_kv_heads)
        if len(seq):
            stale = torch.from_numpy(((seq[:, None] * key.num_kv_heads + heads) * width + place[:, None]).reshape(-1))
    query_column = torch.from_numpy(spans.high - low - 1).view(num, 1, 1, 1, 1)
    return Bucket(first, first + num, rows=rows, low=low, high=high, visible=visible, stale=stale, query_column=query_column)


def _to_device(bucket: Bucket, device: torch.device) -> Bucket:
    if device.type == "cpu":
        return bucket
    return Bucket(
        first=bucket.first,
        end=bucket.end,
        rows=bucket.rows.to(device),
        low=bucket.low,
        high=bucket.high,
        visible=None if bucket.visible is None else bucket.visible.to(device),
        stale=None if bucket.stale is None else bucket.stale.to(device),
        query_column=bucket.query_column.to(device),
    )


def _chunks(plan: StepPlan, key: LayoutKey, *, tables: Int32Array, block_size: int, device: torch.device) -> Iterator[Chunk]:
    seqs = np.flatnonzero(plan.query_lens > 1)
    cut = [_tile_spans(int(plan.seq_lens[seq] - plan.query_lens[seq]), int(plan.seq_lens[seq]), key) for seq in seqs]
    masked = [(end - first, end - low) for spans in cut for first, end, low, causal in spans if not causal]
    ruler = _ruler(key.mask, masked, device)
    for seq, spans in zip(seqs.tolist(), cut, strict=True):
        first_token, first_position = int(plan.cu_seqlens_q[seq]), spans[0][0]
        first_block = spans[0][2] // block_size
        start = first_block * block_size
        ids = tables[seq, first_block : -(-int(plan.seq_lens[seq]) // block_size)].astype(np.int64)[None]
        tiles = tuple(
            Tile(
                first=first_token + first - first_position,
                end=first_token + end - first_position,
                low=low - start,
                high=end - start,
                visible=None if causal else ruler[ruler.shape[0] - (end - first) :, ruler.shape[1] - (end - low) :],
            )
            for first, end, low, causal in spans
        )
        yield Chunk(rows=_pool_rows(ids, key).to(device), tiles=tiles)


def _tile_spans(first: int, end: int, key: LayoutKey) -> list[tuple[int, int, int, bool]]:
    """Cut query positions ``[first, end)`` into ``(first, end, lowest visible, plain causal)``.

    A chunk boundary of a chunked mask always cuts, so that inside a tile every mask depends on distance alone.
    """
    mask, spans, rows = key.mask, [], _TILE_ROWS
    if key.score_heads:
        columns = min(end, mask.size + rows) if mask.size else end
        rows = min(rows, max(16, _TILE_SCORES // (key.score_heads * columns)))
    while first < end:
        low = mask.first_visible(first)
        stop = min(end, low + mask.size) if mask.kind == "chunked" else end
        # Without a past, a fused kernel skips what is not causal by itself, in one call, as far as no window closes.
        causal = low == first and not key.score_heads
        if causal and mask.kind == "sliding":
            stop = min(stop, first + mask.size)
        elif not causal:
            stop = min(stop, first + rows)
        spans.append((first, stop, low, causal))
        first = stop
    return spans


def _ruler(mask: Mask, tiles: list[tuple[int, int]], device: torch.device) -> Tensor:
    """One bool mask whose lower right corners are the masks of all tiles ``(queries, columns)`` of the step.

    Tiles end at their last query's own column, and inside a tile visibility is a matter of distance: that of two tiles
    differs in size only.
    """
    height, width = (max(sizes, default=0) for sizes in zip(*tiles, strict=True)) if tiles else (0, 0)
    distance_rule = mask if mask.kind == "sliding" else Mask.causal()
    query = torch.arange(width - height, width, device=device)[:, None]
    return distance_rule.visible(query, torch.arange(width, device=device))
