"""The structs of one step's native calls: filled once for each way of attending, so that a layer brings nothing but addresses.

Owns what keeps the structs and what they point to alive. It owns neither the library nor scratch memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedkv.attention.native.library import JoinedStruct, LayerStruct, RowsStruct, StepStruct
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.protocol import AttendOptions, check_query
from pagedkv.errors import InvalidRequestError
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool

_MASKS = {"causal": 0, "sliding": 1, "chunked": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A work list: the memory that holds it, and the addresses of its parts."""

    memory: Tensor
    items: int
    merges: int
    counts: ctypes.Array[ctypes.c_int64]
    counts_address: int


class AttendCall:
    """One way of attending in one step; only the addresses of a layer's tensors change from call to call.

    Args:
        struct: made by ``filled``.
        work: the step's work list for layers of this kind.
        scratch_nbytes: bytes of scratch memory that a call needs.
        options: what was filled in.
    """

    __slots__ = ("_kept", "address", "scratch_nbytes", "struct", "work")

    def __init__(self, struct: StepStruct, work: Work, scratch_nbytes: int, options: AttendOptions) -> None:
        self.struct = struct
        self.address = ctypes.addressof(struct)
        self.work = work
        self.scratch_nbytes = scratch_nbytes
        sinks, slopes = _floats(options.sinks), _floats(options.alibi_slopes)
        struct.sinks = None if sinks is None else sinks.data_ptr()
        struct.slopes = None if slopes is None else slopes.data_ptr()
        self._kept = (options, sinks, slopes)  # alive, so that neither an address nor an id can come back as another's

    def point_at(self, query: Tensor, output: Tensor, pool: LayerPool) -> None:
        """Set what changes from layer to layer."""
        struct = self.struct
        struct.query, struct.output = query.data_ptr(), output.data_ptr()
        struct.key, struct.value = pool.key.data_ptr(), pool.value.data_ptr()
        struct.query_stride[:] = query.stride()[:2]


class JoinedRows:
    """The structs for rows ``[T, (Hq + 2 Hkv) * D]`` of queries, keys and values side by side.

    Args:
        batch: the step.
        pool: any layer's of the kind.
        call: of attention alone, for this object only.
        num_heads: of queries.
        num_threads: that run it.

    Attributes:
        shape: of the rows.
        scratch_nbytes: bytes of scratch memory that a call needs.
        address: of the struct.
    """

    __slots__ = ("_kept", "address", "scratch_nbytes", "shape")

    def __init__(self, batch: StepBatch, pool: LayerPool, call: AttendCall, *, num_heads: int, num_threads: int) -> None:
        spec, itemsize, work = pool.spec, pool.dtype.itemsize, call.work
        head, width = spec.key_dim, (num_heads + 2 * spec.num_kv_heads) * spec.key_dim
        self.shape, self.scratch_nbytes = torch.Size((batch.plan.num_tokens, width)), call.scratch_nbytes
        call.struct.query_stride[:] = (width, head)
        rotation = LayerStruct(num_rows=self.shape[0], num_heads=num_heads + spec.num_kv_heads, width=head, dtype=DTYPES[pool.dtype])
        rotation.x_stride[:] = rotation.out_stride[:] = (width, head)
        rotation.y_stride[0] = head
        rows = RowsStruct(num_tokens=self.shape[0], num_kv_heads=spec.num_kv_heads, item_nbytes=itemsize)
        rows.key_nbytes = rows.value_nbytes = head * itemsize
        rows.key_stride[:] = rows.value_stride[:] = (width, head)
        rows.key_pool_stride[:], rows.value_pool_stride[:] = pool.key.stride()[:3], pool.value.stride()[:3]
        rows.blocks, rows.offsets = batch.slot_blocks[spec.group].data_ptr(), batch.slot_offsets[spec.group].data_ptr()
        joined = JoinedStruct(*map(ctypes.addressof, (rotation, rows, call.struct)), work.items, work.merges, work.counts_address)
        joined.key_offset, joined.value_offset = num_heads * head * itemsize, (num_heads + spec.num_kv_heads) * head * itemsize
        joined.num_threads = num_threads
        self._kept = (rotation, rows, call, joined)  # they know each other by address only
        self.address = ctypes.addressof(joined)


def check_joined(pool: LayerPool, batch: StepBatch, options: AttendOptions, *, num_heads: int) -> None:
    """Raise ``InvalidRequestError`` when a layer cannot be attended from joined rows; the rows themselves are the caller's to check."""
    spec = pool.spec
    if spec.key_dim != spec.value_dim or spec.key_dim % 2:
        raise InvalidRequestError(f"heads are {spec.key_dim} and {spec.value_dim} wide: one even width is needed")
    if pool.dtype not in DTYPES or pool.device.type != "cpu":
        raise InvalidRequestError(
            f"the pool holds {pool.dtype} on {pool.device}: the kernel reads {', '.join(map(str, DTYPES))} on the CPU"
        )
    check_query(torch.empty((batch.plan.num_tokens, num_heads, spec.key_dim), dtype=pool.dtype), pool, batch, options)


def filled(batch: StepBatch, pool: LayerPool, options: AttendOptions, *, num_heads: int, batch_invariant: bool) -> StepStruct:
    """The struct of one way of attending, but for a layer's addresses and the strides of queries."""
    spec, tables = pool.spec, batch.block_tables[pool.spec.group]
    struct = StepStruct()
    struct.tables, struct.table_stride = tables.data_ptr(), tables.stride(0)
    struct.cu_seqlens_q, struct.seq_lens = batch.cu_seqlens_q.data_ptr(), batch.seq_lens.data_ptr()
    struct.output_stride[:] = (num_heads * spec.value_dim, spec.value_dim)
    struct.key_stride[:], struct.value_stride[:] = pool.key.stride()[:3], pool.value.stride()[:3]
    struct.num_seqs, struct.num_heads, struct.num_kv_heads = batch.plan.num_seqs, num_heads, spec.num_kv_heads
    struct.key_dim, struct.value_dim, struct.block_size = spec.key_dim, spec.value_dim, pool.block_size
    struct.dtype, struct.mask, struct.mask_size = DTYPES[pool.dtype], _MASKS[options.mask.kind], options.mask.size
    struct.batch_invariant = batch_invariant
    struct.scale, struct.softcap = options.scale, options.softcap or 0.0
    return struct


def _floats(per_head: Tensor | None) -> Tensor | None:
    return None if per_head is None else per_head.detach().to(torch.float32).contiguous()
