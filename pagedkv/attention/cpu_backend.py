"""Attention over pages by the native kernel: K and V are read in place, block by block, without a copy.

It owns scratch memory and the step's work lists. What is computed is said in ``native/src``; which build runs, by ``native/library.py``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pagedkv.attention.mask import Mask
from pagedkv.attention.native.calls import AttendCall, JoinedRows, Work, check_joined, filled
from pagedkv.attention.native.decoder import DecoderRun
from pagedkv.attention.native.library import ITEM_NBYTES, Library, Loaded, RowsStruct, StepStruct, load_library
from pagedkv.attention.native.operations import DTYPES
from pagedkv.attention.protocol import AttendOptions, AttentionSpec, StepAttention, check_query, check_write
from pagedkv.errors import ConfigError, InvalidRequestError, UnsupportedBackendError
from pagedkv.storage.batch import StepBatch
from pagedkv.storage.pool import LayerPool

_LINE = 64  # bytes of the processor's cache that are read as one
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

    def attend_joined(
        self, rows: Tensor, cosines: Tensor, sines: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions, *, num_heads: int
    ) -> Tensor:
        """Rotate, ``write`` and ``attend`` in one call, for a layer whose queries, keys and values are made by one product.

        Args:
            rows: ``[T, (Hq + 2 Hkv) * D]`` contiguous, of the pool's dtype; queries and keys are rotated in place.
            cosines: ``[T, D]`` contiguous, of the same dtype, as ``Operations.rotate`` takes them; not checked.
            sines: likewise.
            pool: the layer's K and V, both ``D`` wide, ``D`` even.
            step: what ``plan`` returned for this step.
            options: mask, scale and variants.
            num_heads: ``Hq``.

        Returns:
            ``[T, Hq * D]``.

        Raises:
            InvalidRequestError: shapes that do not fit the pool or the step.
        """
        if not isinstance(step, _CpuStep):
            raise InvalidRequestError(f"the step was planned by another backend, as {type(step).__name__}")
        call = step.joined(self, pool, options, num_heads)
        if rows.shape != call.shape or rows.dtype != pool.dtype or not rows.is_contiguous():
            raise InvalidRequestError(
                f"rows are {rows.dtype} {list(rows.shape)}, strides {rows.stride()}: contiguous {pool.dtype} {list(call.shape)} is needed"
            )
        output = rows.new_empty(rows.shape[0], num_heads * pool.spec.value_dim)
        if call.scratch_nbytes > self._scratch.numel():
            self._grow(call.scratch_nbytes)
        self._library.functions.pagedkv_attend_joined(
            call.address,
            rows.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            pool.key.data_ptr(),
            pool.value.data_ptr(),
            output.data_ptr(),
            self._scratch.data_ptr(),
        )
        return output

    def run_decoders(
        self,
        run: DecoderRun,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        step: StepAttention,
        options: AttendOptions,
        *,
        num_heads: int,
        num_layers: int | None = None,
        keeps_all: bool = True,
    ) -> Tensor:
        """Decoder layers one after the other, with their ``attend_joined``, in one call.

        Args:
            run: the layers, packed for this build, and their pools.
            x: ``[T, H]`` contiguous, bfloat16.
            cosines: as ``attend_joined`` takes them, like what follows.
            sines: likewise.
            step: what ``plan`` returned for this step.
            options: mask, scale and variants of all layers.
            num_heads: ``Hq``.
            num_layers: how many of the run's layers, from the first on; None for all.
            keeps_all: whether what each layer makes is wanted, or the last one's only.

        Returns:
            ``[layers, T, H]``, what each layer makes of what the one before it made; ``[1, T, H]`` of the last one.

        Raises:
            InvalidRequestError: shapes that do not fit the layers, the pools or the step.
        """
        if not isinstance(step, _CpuStep):
            raise InvalidRequestError(f"the step was planned by another backend, as {type(step).__name__}")
        first, pool = run.layers[0], run.pools[0]
        call = step.joined(self, pool, options, num_heads)
        num_tokens, width = call.shape
        if x.shape != (num_tokens, first.hidden_size) or x.dtype is not torch.bfloat16 or not x.is_contiguous():
            raise InvalidRequestError(
                f"rows are {x.dtype} {list(x.shape)}, strides {x.stride()}: contiguous bfloat16 {[num_tokens, first.hidden_size]} is needed"
            )
        wanted, attended = (width, num_heads * pool.spec.value_dim, self.build), (first.num_joined, first.num_attended, first.build)
        if pool.dtype is not torch.bfloat16 or wanted != attended:
            raise InvalidRequestError(
                f"a layer makes {attended[0]} numbers a token and takes {attended[1]} by the build {attended[2]!r}:"
                f" of a pool of {pool.dtype} it would be {wanted[0]} and {wanted[1]} by {wanted[2]!r}"
            )
        num_layers = len(run.layers) if num_layers is None else num_layers
        output = x.new_empty(num_layers if keeps_all else 1, *x.shape)
        rows_nbytes = -(-num_tokens * run.row_nbytes // _LINE) * _LINE
        if rows_nbytes + call.scratch_nbytes > self._scratch.numel():
            self._grow(rows_nbytes + call.scratch_nbytes)
        scratch = self._scratch.data_ptr()
        self._library.functions.pagedkv_run_decoders(
            run.address,
            num_layers,
            call.address,
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            output.data_ptr(),
            keeps_all,
            scratch,
            scratch + rows_nbytes,
        )
        return output

    def new_work(self, struct: StepStruct) -> Work:
        """The work list of one step for layers of one kind."""
        address, plan = ctypes.addressof(struct), self._library.functions.pagedkv_plan
        counts = (ctypes.c_int64 * 4)()
        plan(address, None, None, counts)
        memory = torch.empty((counts[0] + counts[1]) * ITEM_NBYTES, dtype=torch.uint8)
        items = memory.data_ptr()
        merges = items + counts[0] * ITEM_NBYTES
        plan(address, items, merges, counts)
        return Work(memory, items, merges, counts, ctypes.addressof(counts))

    def scratch_nbytes(self, struct: StepStruct, work: Work, num_threads: int) -> int:
        """Scratch memory that one call needs."""
        return int(self._library.functions.pagedkv_scratch_nbytes(ctypes.addressof(struct), work.counts_address, num_threads))

    @property
    def batch_invariant(self) -> bool:
        """Whether results do not depend on how prompts are cut into chunks."""
        return self._batch_invariant

    def _grow(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._scratch = torch.empty(1 << (nbytes - 1).bit_length(), dtype=torch.uint8)


class _CpuStep(StepAttention):
    """The step's tables, the work lists made so far, and a filled struct for each way of attending."""

    __slots__ = ("_calls", "_joined", "_works", "num_threads")

    def __init__(self, batch: StepBatch, num_threads: int) -> None:
        super().__init__(batch)
        self.num_threads = num_threads
        self._works: dict[tuple[int, Mask, int, int, int, int, torch.dtype], Work] = {}
        self._calls: dict[tuple[object, ...], AttendCall] = {}
        self._joined: dict[tuple[object, ...], JoinedRows] = {}

    def call(self, backend: CpuBackend, query: Tensor, pool: LayerPool, options: AttendOptions) -> AttendCall:
        heads, spec = query.shape[1], pool.spec
        key = (id(options), spec, heads, pool.dtype)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._new_call(backend, pool, options, heads)
        return call

    def joined(self, backend: CpuBackend, pool: LayerPool, options: AttendOptions, heads: int) -> JoinedRows:
        key = (id(options), pool.spec, heads, pool.dtype)
        joined = self._joined.get(key)
        if joined is None:
            check_joined(pool, self.batch, options, num_heads=heads)
            call = self._new_call(backend, pool, options, heads)
            joined = self._joined[key] = JoinedRows(self.batch, pool, call, num_heads=heads, num_threads=self.num_threads)
        return joined

    def _new_call(self, backend: CpuBackend, pool: LayerPool, options: AttendOptions, heads: int) -> AttendCall:
        spec = pool.spec
        struct = filled(self.batch, pool, options, num_heads=heads, batch_invariant=backend.batch_invariant)
        kind = (spec.group, options.mask, heads, spec.num_kv_heads, spec.key_dim, spec.value_dim, pool.dtype)  # what work is cut by
        work = self._works.get(kind)
        if work is None:
            work = self._works[kind] = backend.new_work(struct)
        return AttendCall(struct, work, backend.scratch_nbytes(struct, work, self.num_threads), options)


def _library(loaded: Loaded) -> Library:
    if loaded.library is None:
        raise UnsupportedBackendError(f"attention backend 'cpu' has no library that runs here: {'; '.join(loaded.reasons)}")
    return loaded.library


def _dense_rows(tensor: Tensor) -> Tensor:
    """The same tensor, its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
