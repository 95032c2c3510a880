"""Attention over pages by the native kernel: K and V are read in place, block by block, without a copy.

It owns scratch memory and the step's work lists. What is computed is said in ``native/src``; which build runs, by ``native/library.py``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedkv.attention.mask import Mask
from pagedkv.attention.native.library import ITEM_NBYTES, Library, Loaded, RowsStruct, StepStruct, load_library
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.protocol import AttendOptions, AttentionSpec, StepAttention, check_query, check_write
from pagedkv.errors import ConfigError, InvalidRequestError, UnsupportedBackendError
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool

_MASKS = {"causal": 0, "sliding": 1, "chunked": 2}
_MAX_DIM = 1024  # what a tile's packed K and V are sized for


class CpuBackend:
    """Runs every feature on the CPU in float32, bfloat16 and float16; sums are in float32.

    Decodes stream through K and V in place; longer sequences are cut into parts of fixed length that threads share, so that a sequence's
    result depends neither on the number of threads nor on what else is in the batch. Prefill chunks run in tiles, as small matrix
    products. Method: online softmax over parts, as in FlashAttention and its split decoding (Dao et al., 2022 and 2023).

    Args:
        num_threads: threads of the kernel; as many as torch uses, asked at every step, when None.
        batch_invariant: a token's result is the same bits, too, however its prompt is cut into chunks; decodes are then slower.
        build: name of the one build to use; the best that runs here when None.

    Raises:
        UnsupportedBackendError: no build can run here; gives the reason for each.
        ConfigError: fewer threads than one.
    """

    def __init__(self, *, num_threads: int | None = None, batch_invariant: bool = False, build: str | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"num_threads is {num_threads}: at least 1 is needed")
        self._library = _library(load_library(build))
        self._num_threads = num_threads
        self._batch_invariant = batch_invariant
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._rows = RowsStruct()
        self._rows_address = ctypes.addressof(self._rows)

    @property
    def name(self) -> str:
        """``"cpu"``."""
        return "cpu"

    @property
    def build(self) -> str:
        """Name of the build that runs: its instruction set."""
        return self._library.build.name

    @property
    def num_threads(self) -> int:
        """Threads that the next step will use."""
        return self._num_threads or torch.get_num_threads()

    def supports(self, spec: AttentionSpec) -> str | None:
        """None, unless the layer is elsewhere, of another dtype, wider than 1,024, or its heads cannot be grouped."""
        if spec.device_type != "cpu":
            return f"tensors are on {spec.device_type!r}, the kernel runs on the CPU"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} query heads are not a multiple of {spec.num_kv_heads} K/V heads"
        if spec.dtype not in DTYPES:
            return f"{spec.dtype}: float32, bfloat16 and float16 are supported"
        if max(spec.key_dim, spec.value_dim) > _MAX_DIM:
            return f"heads are {spec.key_dim} and {spec.value_dim} wide: {_MAX_DIM} at most are supported"
        return None

    def plan(self, batch: StepBatch) -> StepAttention:
        """Take the step's tables; a work list follows when the first layer of its kind asks for one."""
        return _CpuStep(batch, self.num_threads)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        """Store K ``[T, Hkv, Dk]`` and V ``[T, Hkv, Dv]``; see ``AttentionBackend.write``. Cost: one copy of both."""
        batch, spec = step.batch, pool.spec
        check_write(pool, key, value, batch)
        key, value = _dense_rows(key), _dense_rows(value)
        rows, itemsize = self._rows, pool.dtype.itemsize
        rows.key, rows.value = key.data_ptr(), value.data_ptr()
        rows.key_pool, rows.value_pool = pool.key.data_ptr(), pool.value.data_ptr()
        rows.blocks, rows.offsets = batch.slot_blocks[spec.group].data_ptr(), batch.slot_offsets[spec.group].data_ptr()
        rows.key_stride[:], rows.value_stride[:] = key.stride()[:2], value.stride()[:2]
        rows.key_pool_stride[:], rows.value_pool_stride[:] = pool.key.stride()[:3], pool.value.stride()[:3]
        rows.num_tokens, rows.num_kv_heads, rows.item_nbytes = key.shape[0], spec.num_kv_heads, itemsize
        rows.key_nbytes, rows.value_nbytes = spec.key_dim * itemsize, spec.value_dim * itemsize
        self._library.functions.pagedkv_write(self._rows_address)

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        """``[T, Hq, Dk]`` to ``[T, Hq, Dv]``; see ``AttentionBackend.attend``.

        Cost: K and V of the step's sequences are read once; nothing but the output is allocated. The first layer of a kind pays for
        the step's work list.
        """
        if not isinstance(step, _CpuStep):
            raise InvalidRequestError(f"the step was planned by another backend, as {type(step).__name__}")
        check_query(query, pool, step.batch, options)
        if pool.dtype not in DTYPES or pool.device.type != "cpu":
            raise InvalidRequestError(
                f"the pool holds {pool.dtype} on {pool.device}: the kernel reads {', '.join(map(str, DTYPES))} on the CPU"
            )
        query = _dense_rows(query)
        output = query.new_empty(query.shape[0], query.shape[1], pool.spec.value_dim)
        call = step.call(self, query, pool, options)
        call.point_at(query, output, pool)
        functions = self._library.functions
        if call.scratch_nbytes > self._scratch.numel():
            self._grow(call.scratch_nbytes)
        functions.pagedkv_attend(
            call.address, call.work.items, call.work.merges, call.work.counts_address, self._scratch.data_ptr(), step.num_threads
        )
        return output

    def new_work(self, struct: StepStruct) -> _Work:
        """The work list of one step for layers of one kind."""
        address, plan = ctypes.addressof(struct), self._library.functions.pagedkv_plan
        counts = (ctypes.c_int64 * 4)()
        plan(address, None, None, counts)
        memory = torch.empty((counts[0] + counts[1]) * ITEM_NBYTES, dtype=torch.uint8)
        items = memory.data_ptr()
        merges = items + counts[0] * ITEM_NBYTES
        plan(address, items, merges, counts)
        return _Work(memory, items, merges, counts, ctypes.addressof(counts))

    def scratch_nbytes(self, struct: StepStruct, work: _Work, num_threads: int) -> int:
        """Scratch memory that one call needs."""
        return int(self._library.functions.pagedkv_scratch_nbytes(ctypes.addressof(struct), work.counts_address, num_threads))

    @property
    def batch_invariant(self) -> bool:
        """Whether results do not depend on how prompts are cut into chunks."""
        return self._batch_invariant

    def _grow(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._scratch = torch.empty(1 << (nbytes - 1).bit_length(), dtype=torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A work list: the memory that holds it, and the addresses of its parts."""

    memory: Tensor
    items: int
    merges: int
    counts: ctypes.Array[ctypes.c_int64]
    counts_address: int


class _CpuStep(StepAttention):
    """The step's tables, the work lists made so far, and a filled struct for each way of attending."""

    __slots__ = ("_calls", "_works", "num_threads")

    def __init__(self, batch: StepBatch, num_threads: int) -> None:
        super().__init__(batch)
        self.num_threads = num_threads
        self._works: dict[tuple[int, Mask, int, int, int, int], _Work] = {}
        self._calls: dict[tuple[object, ...], _Call] = {}

    def call(self, backend: CpuBackend, query: Tensor, pool: LayerPool, options: AttendOptions) -> _Call:
        heads, spec = query.shape[1], pool.spec
        key = (id(options), spec, heads, pool.dtype)
        call = self._calls.get(key)
        if call is None:
            struct = _filled(self.batch, pool, options, num_heads=heads, batch_invariant=backend.batch_invariant)
            kind = (spec.group, options.mask, heads, spec.num_kv_heads, spec.key_dim, spec.value_dim)
            work = self._works.get(kind)
            if work is None:
                work = self._works[kind] = backend.new_work(struct)
            nbytes = backend.scratch_nbytes(struct, work, self.num_threads)
            call = self._calls[key] = _Call(struct, work, nbytes, options)
        return call


class _Call:
    """One way of attending in one step; only the addresses of a layer's tensors change from call to call."""

    __slots__ = ("_kept", "address", "scratch_nbytes", "struct", "work")

    def __init__(self, struct: StepStruct, work: _Work, scratch_nbytes: int, options: AttendOptions) -> None:
        self.struct = struct
        self.address = ctypes.addressof(struct)
        self.work = work
        self.scratch_nbytes = scratch_nbytes
        sinks, slopes = _floats(options.sinks), _floats(options.alibi_slopes)
        struct.sinks = None if sinks is None else sinks.data_ptr()
        struct.slopes = None if slopes is None else slopes.data_ptr()
        self._kept = (options, sinks, slopes)  # alive, so that neither an address nor an id can come back as another's

    def point_at(self, query: Tensor, output: Tensor, pool: LayerPool) -> None:
        struct = self.struct
        struct.query, struct.output = query.data_ptr(), output.data_ptr()
        struct.key, struct.value = pool.key.data_ptr(), pool.value.data_ptr()
        struct.query_stride[:] = query.stride()[:2]


def _filled(batch: StepBatch, pool: LayerPool, options: AttendOptions, *, num_heads: int, batch_invariant: bool) -> StepStruct:
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


def _library(loaded: Loaded) -> Library:
    if loaded.library is None:
        raise UnsupportedBackendError(f"attention backend 'cpu' has no library that runs here: {'; '.join(loaded.reasons)}")
    return loaded.library


def _dense_rows(tensor: Tensor) -> Tensor:
    """The same tensor, its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _floats(per_head: Tensor | None) -> Tensor | None:
    return None if per_head is None else per_head.detach().to(torch.float32).contiguous()
