"""Attention over pages in plain torch: exact everywhere, fast enough without a kernel of our own.

It owns scratch memory that is kept between calls. It owns no K, no V and no rule about who may see what; how a step is cut
into calls is decided in ``step_layout``.

Decodes are gathered a bucket at a time into scratch that stays in the cache and multiplied in float32, query groups folded
into rows, so that K and V are read once per K/V head. Prefill chunks run per sequence, through torch's fused attention where
the layer has no soft cap, sinks or slopes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedkv.attention.protocol import AttendOptions, AttentionSpec, StepAttention, check_query, write_step
from pagedkv.attention.step_layout import Bucket, LayoutKey, StepLayout, Tile, build_layout
from pagedkv.errors import InvalidRequestError
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool


class TorchBackend:
    """Runs every feature on every device and floating dtype; softmax and decode products are in float32 or wider.

    Scratch grows to K and V of the largest bucket of decodes or of the longest prefilled sequence in one layer, and is kept:
    a fresh allocation of that size on every call would cost more than the attention. One instance belongs to one thread.
    """

    def __init__(self) -> None:
        self._scratch = _Scratch()

    @property
    def name(self) -> str:
        """``"torch"``."""
        return "torch"

    def supports(self, spec: AttentionSpec) -> str | None:
        """None, unless the heads cannot be grouped or the dtype is not float16, bfloat16, float32 or float64."""
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} K/V heads"
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            return f"{spec.dtype}: float16, bfloat16, float32 and float64 are supported"
        return None

    def plan(self, batch: StepBatch) -> StepAttention:
        """Take the step's block tables; a layout follows when the first layer of its kind asks for one."""
        return _TorchStep(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        """Store K ``[T, Hkv, Dk]`` and V ``[T, Hkv, Dv]``; see ``AttentionBackend.write``."""
        write_step(pool, key, value, step.batch)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        """``[T, Hq, Dk]`` to ``[T, Hq, Dv]``; see ``AttentionBackend.attend``.

        Cost: about ten torch calls per bucket of decodes and per tile of a chunk; no memory but the output is allocated
        beyond the scores of one bucket or tile.
        """
        if not isinstance(step, _TorchStep):
            raise InvalidRequestError(f"the step was planned by another backend, as {type(step).__name__}")
        check_query(query, pool, step.batch, options)
        call = _Call(query, pool, options, query.new_empty(query.shape[0], query.shape[1], pool.spec.value_dim))
        fused = options.softcap is None and options.sinks is None and options.alibi_slopes is None
        layout = step.layout(pool, options, score_heads=0 if fused else query.shape[1])
        if layout.buckets:
            self._decode(call, layout)
        for chunk in layout.chunks:
            key, value = self._gather(pool, chunk.rows, num_seqs=1)
            if not fused:
                key, value = self._widen("key", key), self._widen("value", value)
            attend_tile = _attend_fused if fused else _attend_scores
            for tile in chunk.tiles:
                attend_tile(call, tile, key=key[:, tile.low : tile.high], value=value[:, tile.low : tile.high])
        return call.output

    def _decode(self, call: _Call, layout: StepLayout) -> None:
        spec, tokens = call.pool.spec, layout.decode_tokens
        num, heads = tokens.shape[0], spec.num_kv_heads
        query = _wide(call.query.index_select(0, tokens)).mul_(call.options.scale).view(num * heads, -1, spec.key_dim)
        sums = self._scratch.take("output", (num * heads, query.shape[1], spec.value_dim), like=query)
        for bucket in layout.buckets:
            rows = slice(bucket.first * heads, bucket.end * heads)
            self._attend_bucket(call, bucket, query=query[rows], output=sums[rows])
        call.output.index_copy_(0, tokens, sums.view(num, -1, spec.value_dim).to(call.output.dtype))

    def _attend_bucket(self, call: _Call, bucket: Bucket, *, query: Tensor, output: Tensor) -> None:
        """Query ``[n * Hkv, group, Dk]``, already scaled, to output ``[n * Hkv, group, Dv]``."""
        heads, num = call.pool.spec.num_kv_heads, bucket.end - bucket.first
        key, value = self._gather(call.pool, bucket.rows, num_seqs=num)
        if bucket.stale is not None:
            # A weight of zero does not undo a NaN. Stale K is harmless: its score is selected away.
            value.view(-1, value.shape[2]).index_fill_(0, bucket.stale, 0)
        key, value = self._widen("key", key)[:, bucket.low : bucket.high], self._widen("value", value)[:, bucket.low : bucket.high]
        scores = torch.bmm(query, key.transpose(1, 2)).view(num, heads, -1, 1, key.shape[1])
        weights, share = _softmax(scores, call.options, visible=bucket.visible, query_column=bucket.query_column)
        torch.bmm(weights.view(num * heads, -1, key.shape[1]), value, out=output)
        if share is not None:
            output.mul_(share.view(num * heads, -1, 1))

    def _gather(self, pool: LayerPool, rows: Tensor, *, num_seqs: int) -> tuple[Tensor, Tensor]:
        """K ``[n * Hkv, M * B, Dk]`` and V ``[n * Hkv, M * B, Dv]`` in scratch, valid until the next gather."""
        spec, size = pool.spec, rows.shape[0]
        key = self._scratch.take("gathered key", (size, pool.key_rows.shape[1]), like=pool.key)
        value = self._scratch.take("gathered value", (size, pool.value_rows.shape[1]), like=pool.key)
        torch.index_select(pool.key_rows, 0, rows, out=key)
        torch.index_select(pool.value_rows, 0, rows, out=value)
        units = num_seqs * spec.num_kv_heads
        return key.view(units, -1, spec.key_dim), value.view(units, -1, spec.value_dim)

    def _widen(self, name: str, gathered: Tensor) -> Tensor:
        """The same numbers in float32 or wider, in scratch unless they are already."""
        dtype = _precision(gathered.dtype)
        if gathered.dtype == dtype:
            return gathered
        return self._scratch.take(name, gathered.shape, like=gathered, dtype=dtype).copy_(gathered)


class _TorchStep(StepAttention):
    """The step's block tables, and the layouts made so far."""

    __slots__ = ("_layouts", "_tables")

    def __init__(self, batch: StepBatch) -> None:
        super().__init__(batch)
        columns = batch.block_tables.shape[2]
        self._tables = batch.plan.block_tables[:, :, :columns][:, batch.plan.rows]
        self._layouts: dict[LayoutKey, StepLayout] = {}

    def layout(self, pool: LayerPool, options: AttendOptions, *, score_heads: int) -> StepLayout:
        spec = pool.spec
        key = LayoutKey(spec.group, options.mask, spec.num_kv_heads, pool.rows_per_block, spec.numel_per_token, score_heads)
        layout = self._layouts.get(key)
        if layout is None:
            tables = self._tables[spec.group]
            layout = build_layout(self.batch.plan, key, tables=tables, block_size=pool.block_size, device=pool.device)
            self._layouts[key] = layout
        return layout


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """The arguments of one ``attend``, and where its result goes."""

    query: Tensor
    pool: LayerPool
    options: AttendOptions
    output: Tensor

    def grouped(self, tensor: Tensor, tile: Tile) -> Tensor:
        """A tile's part of the packed ``[T, Hq, D]`` as a view ``[Hkv, group, t, D]``."""
        part = tensor[tile.first : tile.end]
        return part.view(part.shape[0], self.pool.spec.num_kv_heads, -1, part.shape[2]).permute(1, 2, 0, 3)


class _Scratch:
    """Flat tensors by purpose, dtype and device, which grow and are never given back while the backend lives."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory of a shape; what was taken under this name before is gone."""
        key = (name, dtype or like.dtype, like.device)
        numel = 1
        for size in shape:
            numel *= size
        kept = self._kept.get(key)
        if kept is None or kept.shape[0] < numel:
            with torch.inference_mode(False):  # else memory born in a step could not be written outside of inference mode
                kept = torch.empty(1 << (numel - 1).bit_length(), dtype=key[1], device=like.device)
            self._kept[key] = kept
        return kept[:numel].view(shape)


def _attend_fused(call: _Call, tile: Tile, *, key: Tensor, value: Tensor) -> None:
    """One tile through torch's own attention. K ``[Hkv, K, Dk]`` is seen by a group of query heads without being repeated."""
    query = call.grouped(call.query, tile)
    group = query.shape[1]
    result = F.scaled_dot_product_attention(
        query,
        key[:, None].expand(-1, group, -1, -1),
        value[:, None].expand(-1, group, -1, -1),
        attn_mask=tile.visible,
        is_causal=tile.visible is None,
        scale=call.options.scale,
    )
    call.grouped(call.output, tile).copy_(result)


def _attend_scores(call: _Call, tile: Tile, *, key: Tensor, value: Tensor) -> None:
    """One tile with its scores held in memory, for what the fused attention does not know. K and V are float32 or wider."""
    heads, columns, _ = key.shape
    query = _wide(call.grouped(call.query, tile)) * call.options.scale
    group, rows = query.shape[1:3]
    scores = torch.bmm(query.reshape(heads, group * rows, -1), key.transpose(1, 2)).view(heads, group, rows, columns)
    query_column = torch.arange(columns - rows, columns, device=key.device)[:, None]
    weights, share = _softmax(scores, call.options, visible=tile.visible, query_column=query_column)
    result = torch.bmm(weights.view(heads, group * rows, columns), value).view(heads, group, rows, -1)
    call.grouped(call.output, tile).copy_(result if share is None else result.mul_(share))


def _softmax(scores: Tensor, options: AttendOptions, *, visible: Tensor | None, query_column: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weights of scaled scores ``[..., Hkv, group, t, K]``, which may be overwritten.

    Args:
        scores: float32 or wider.
        options: soft cap, slopes and sinks.
        visible: bool that broadcasts to the scores; None when everything is seen.
        query_column: integers that broadcast to the scores: the column of each row's own query.

    Returns:
        the weights, and with sinks the factor ``[..., Hkv, group, t, 1]`` by which the weighted sum of V shrinks.
    """
    heads, group = scores.shape[-4:-2]
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if options.alibi_slopes is not None:
        distance = torch.arange(scores.shape[-1], device=scores.device) - query_column
        slopes = options.alibi_slopes.to(scores.dtype).view(heads, group, 1, 1)
        scores = scores.addcmul_(slopes, distance.to(scores.dtype))
    if visible is not None:
        scores = torch.where(visible, scores, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if options.sinks is None:
        return weights, None
    sinks = options.sinks.to(scores.dtype).view(heads, group, 1, 1)
    return weights, torch.sigmoid(torch.logsumexp(scores, dim=-1, keepdim=True) - sinks)


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_precision(tensor.dtype))
