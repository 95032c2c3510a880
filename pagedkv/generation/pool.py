"""A model's blocks for any number of caches, and the forwards of the model over them.

Owns the bookkeeping (a ``KVCacheManager``), the bytes (a ``KVStorage``) and the hooks by which it sees a forward before the
model does and its result before the caller does. It does not own what a cache's rows are (``rows.py``), nor how layers read
(``dense.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, get_args
from weakref import WeakMethod, finalize

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pagedkv.checks import integer, shown
from pagedkv.core import CheckLevel, KVCacheManager
from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, StepError, UnsupportedBackendError, UnsupportedModelError
from pagedkv.generation.call import ForwardReader
from pagedkv.generation.cross import CrossAttention, CrossPool
from pagedkv.generation.dense import DenseForward
from pagedkv.generation.packed import PackedForward, PackedReading
from pagedkv.generation.rows import Beside, Growth, NewColumns, Rows
from pagedkv.generation.states import LayerStates
from pagedkv.models import ModelRunner
from pagedkv.models.memory import free_memory
from pagedkv.models.replacements import Wanted
from pagedkv.models.tiers import TierName
from pagedkv.sizing import blocks_in_memory
from pagedkv.storage import KVStorage

if TYPE_CHECKING:
    from pagedkv.generation.trial import Reference

_DEFAULT_TOKENS = 16_384
_DEFAULT_SHARE = 0.25  # of the free memory, at most


@dataclass(slots=True, eq=False)
class _Running:
    """A forward between its two hooks."""

    rows: Rows
    growth: Growth
    forward: DenseForward | PackedForward
    thread: int


class CachePool:
    """Blocks of one model that many ``PagedCache`` share, in one thread or several; forwards take turns.

    Args:
        model: a causal language model in evaluation mode. It gets a hook before its forward and one after, until the pool is closed;
            they leave forwards without a cache of this pool alone.
        num_blocks: blocks, the null block included; or
        kv_cache_memory_bytes: as many as fit in so many bytes; or neither: blocks for 16,384 tokens, in at most a quarter of the
            memory that is free.
        block_size: tokens in a block.
        max_num_seqs: different sequences at once, over all caches; rows that are the same count once.
        tier: ``"packed"``: attention reads blocks in place, padding is not computed, and rows that are the same are computed once.
            ``"dense"``: the model's own attention over gathered blocks, which every model with a plain cache allows. ``"auto"``: packed
            where the model allows it; a forward that asks for more than logits (attentions, hidden states), or whose input is
            more than tokens at their places, is dense in any case.
        pack_linears: as for ``ModelRunner``; used in packed forwards.
        fuse: likewise.
        check: what the bookkeeping verifies after every command, as for ``KVCacheManager``.

    Raises:
        UnsupportedModelError: the model is refused; says why.
        ConfigError: a size that cannot work.
        PoolAllocationError: the device refused the memory.

    Attributes:
        tier_reason: why forwards are not packed, where that was tried.

    Cost: eight short forwards, which learn what the layers store and compare with transformers' own cache; for the packed tier, those of
    a ``ModelRunner`` as well.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 256,
        tier: TierName = "auto",
        pack_linears: Wanted = "auto",
        fuse: Wanted = "auto",
        check: CheckLevel = "off",
    ) -> None:
        from pagedkv.generation.trial import run_reference, trial_blocks  # it runs a cache over this pool

        if tier not in get_args(TierName):
            raise ConfigError(f"tier is {shown(tier)}: it must be one of {', '.join(get_args(TierName))}")
        integer("block_size", block_size, least=1, most=2**31 - 1)
        reference = run_reference(model)
        layers = (*reference.layers, *reference.cross_layers.values())
        nbytes_per_block = block_size * sum(layer.nbytes_per_token(reference.dtype) for layer in layers)
        size = _num_blocks(num_blocks, kv_cache_memory_bytes, block_size=block_size, nbytes_per_block=nbytes_per_block, device=model.device)
        self._model = model
        self._layers, self._dtype, self._keeps_states = reference.layers, reference.dtype, reference.keeps_states
        self._cross_layers = reference.cross_layers
        self._index = {layer: place for place, layer in enumerate(reference.layer_ids)}
        self._reader = ForwardReader(model)
        self._packed: PackedReading | None = None
        self.tier_reason: str | None = None
        self._lock = threading.RLock()
        self._running: _Running | None = None
        self._seats: dict[int, Rows] = {}
        self._abandoned: list[Rows] = []
        self._num_named = 0
        self._closed = self._closes_with_caches = False
        before, after = WeakMethod(self._before), WeakMethod(self._after)
        self._unhook = finalize(
            self,
            _remove,
            (
                model.register_forward_pre_hook(lambda *call: _called(before, *call), with_kwargs=True),
                model.register_forward_hook(lambda *call: _called(after, *call), with_kwargs=True, always_call=True),
            ),
        )
        try:
            self._lay_out(trial_blocks(block_size), block_size=block_size, max_num_seqs=len(reference.logits[0]), check=check)
            self._prove(reference, tier=tier, block_size=block_size, pack_linears=pack_linears, fuse=fuse)
            self._storage.close()
            self._lay_out(size, block_size=block_size, max_num_seqs=max_num_seqs, check=check)
        except BaseException:
            self._unhook()
            raise

    def _lay_out(self, num_blocks: int, *, block_size: int, max_num_seqs: int, check: CheckLevel) -> None:
        # The tokens of a decoder do not say what its K and V are where there is an encoder.
        sizes: Any = {"num_blocks": num_blocks, "block_size": block_size}
        self._manager = KVCacheManager(**sizes, max_num_seqs=max_num_seqs, enable_prefix_caching=not self._cross_layers, check=check)
        stored: Any = {**sizes, "dtype": self._dtype, "device": self._model.device}
        self._storage = KVStorage(self._layers, **stored)
        self._cross: CrossPool | None = None
        if self._cross_layers:
            layers = self._cross_layers
            self._cross = CrossPool(tuple(layers.values()), list(layers), **stored, max_num_seqs=max_num_seqs, check=check)
        self._peak = 0

    def _prove(self, reference: Reference, *, tier: TierName, block_size: int, pack_linears: Wanted, fuse: Wanted) -> None:
        """Find out how the model can be run right, the faster way last; its runner's own self-check judges that, too."""
        from pagedkv.generation.trial import compare  # it runs a cache over this pool

        compare(self, reference)
        if tier == "dense":
            return
        try:
            if reference.cross_layers:
                raise UnsupportedModelError("packed forwards of generate() are for decoders alone")
            if reference.keeps_states:
                raise UnsupportedModelError("layers keep states beside K and V, which packed forwards of generate() do not follow")
            runner = ModelRunner(self._model, block_size=block_size, tier="packed", pack_linears=pack_linears, fuse=fuse)
        except Exception as error:  # whatever a model raises when it is run in a way that it was not made for
            setting = isinstance(error, ConfigError) and not isinstance(error, UnsupportedModelError | UnsupportedBackendError)
            if tier == "packed" or setting:
                raise
            self.tier_reason = str(error)
            return
        self._packed = PackedReading(runner, self._reader)
        try:
            if runner.max_positions_reason is not None:
                raise UnsupportedModelError(f"packed, it would not compute what generate() does: {runner.max_positions_reason}")
            compare(self, reference)
        except UnsupportedModelError as error:
            self._packed = None
            runner.close()
            if tier == "packed":
                raise
            self.tier_reason = str(error)

    @property
    def tier(self) -> str:
        """``"packed"`` or ``"dense"``: how forwards run that ask for no more than logits."""
        return "dense" if self._packed is None else "packed"

    # Questions.

    @property
    def model(self) -> PreTrainedModel:
        """The model whose caches these are."""
        return self._model

    @property
    def num_layers(self) -> int:
        """Layers that store K and V."""
        return len(self._index)

    @property
    def num_cross_layers(self) -> int:
        """Layers of cross attention that store K and V; 0 for a decoder alone."""
        return len(self._cross_layers)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._manager.block_size

    @property
    def nbytes_per_block(self) -> int:
        """Bytes of one block, K and V of all layers of self attention."""
        return self._storage.nbytes // self._storage.num_blocks[0]

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be handed out at all."""
        return self._manager.num_usable_blocks

    @property
    def num_blocks_in_use(self) -> int:
        """Blocks that caches hold now."""
        with self._exclusive():
            return self._manager.num_usable_blocks - self._manager.num_available_blocks

    @property
    def num_cross_blocks_in_use(self) -> int:
        """Blocks of cross attention that caches hold now, from a pool of as many of their own; 0 for a decoder alone."""
        with self._exclusive():
            return 0 if self._cross is None else self._cross.num_blocks_in_use

    @property
    def peak_blocks_in_use(self) -> int:
        """The most blocks that were held at once, since ``reset_peak``."""
        return self._peak

    def check(self) -> None:
        """Verify the bookkeeping; raises ``InvariantError`` naming what is broken."""
        with self._exclusive():
            self._manager.check()
            if self._cross is not None:
                self._cross.manager.check()

    # Commands of users.

    def fill_free_blocks(self, value: float = 0.0) -> int:
        """Overwrite all blocks that hold nothing: zeros erase what is left in them, NaN proves that nobody reads it; returns how many."""
        with self._exclusive():
            books = [(self._manager, self._storage)]
            if self._cross is not None:
                books.append((self._cross.manager, self._cross.storage))
            count = 0
            for manager, storage in books:
                (free,) = manager.free_block_ids()
                storage.fill(free, value)
                count += len(free)
            return count

    def reset_peak(self) -> None:
        """Begin to look for the most blocks anew."""
        with self._exclusive():
            self._peak = self._manager.num_usable_blocks - self._manager.num_available_blocks

    def purge(self, namespace: str) -> int:
        """Forget the prefixes cached under a namespace, because weights have changed, say; returns how many blocks that were."""
        with self._exclusive():
            return self._manager.purge(namespace)

    def close(self) -> None:
        """End all caches of the pool, give its memory back and take the hooks from the model. May be called again."""
        if self._closed:
            return
        with self._exclusive():
            self._closed = True
            self._seats.clear()
            self._storage.close()
            if self._cross is not None:
                self._cross.storage.close()
            self._unhook()
            if self._packed is not None:
                self._packed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Commands of caches.

    def open(self, namespace: str | None, *, closes_with_caches: bool = False) -> Rows:
        """Rows for a new cache, with whose end the pool may be meant to end; raises ``ClosedError`` after ``close()``."""
        with self._exclusive():
            self._check_open()
            self._closes_with_caches = closes_with_caches
            self._num_named += 1
            private = namespace is None
            name = f"\0cache {self._num_named}" if namespace is None else namespace
            beside: Beside | None = LayerStates(self._model) if self._keeps_states else None
            if self._cross is not None:
                beside = CrossAttention(self._cross)
            return self._seat(Rows(self._manager, name, private=private, beside=beside))

    def fork(self, rows: Rows) -> Rows:
        """Rows for a cache that starts as a copy of another."""
        with self.using(rows):
            return self._seat(rows.fork())

    @contextmanager
    def using(self, rows: Rows) -> Iterator[Rows]:
        """Rows that are read or changed between forwards.

        Raises:
            ClosedError: the cache or the pool is closed.
            StepError: a forward over them is running.
        """
        self._check_idle(rows)
        with self._exclusive():
            self._check_seat(rows)
            yield rows

    def release(self, rows: Rows) -> None:
        """Give back all blocks of rows whose cache is closed."""
        if self._closed:
            return
        self._check_idle(rows)
        with self._exclusive():
            self._leave(rows)

    def abandon(self, rows: Rows) -> None:
        """Note that the cache of these rows is gone; their blocks come back at the next command. Safe in the garbage collector."""
        self._abandoned.append(rows)

    def num_columns(self, rows: Rows) -> int:
        """Columns of a cache; also asked within a forward, of whose columns it does not know yet."""
        self._check_seat(rows)
        return rows.num_columns

    def update(self, rows: Rows, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store and read a layer's K and V in the forward that is running."""
        self._check_seat(rows)
        running = self._running
        if running is None or running.rows is not rows or running.thread != threading.get_ident():
            raise InvalidRequestError(
                f"this cache is for forwards of one {type(self._model).__name__}, as a whole: it was given to another model or to a part"
            )
        return running.forward.update(key, value, layer)

    # The hooks.

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._end_stale()
        arguments = self._reader.named(args, kwargs)
        rows = getattr(arguments.get("past_key_values"), "_rows", None)
        if not isinstance(rows, Rows) or not rows.belongs_to(self._manager) or module is not self._model:
            return None
        self._check_idle(rows)
        self._lock.acquire()
        try:
            self._check_seat(rows)
            self._reap()
            running = self._running = self._begin(rows, arguments)
        except BaseException:
            if not rows.num_columns:
                rows.release()  # a first forward that did not begin leaves no rows
            self._lock.release()
            raise
        return None if running.forward.arguments is None else ((), running.forward.arguments)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        running = self._running
        if running is None or running.thread != threading.get_ident() or module is not self._model:
            return None
        if output is None:
            return self._end_stale()  # an exception ended the forward
        try:
            output = running.forward.finish(output)
            if isinstance(running.rows.beside, CrossAttention):
                running.rows.beside.commit()
            running.rows.commit(running.growth)
        except BaseException:
            running.rows.cancel(running.growth)
            raise
        finally:
            self._running = None
            self._lock.release()
        return output

    def _begin(self, rows: Rows, arguments: dict[str, Any]) -> _Running:
        if self._model.training:
            name = type(self._model).__name__
            raise UnsupportedModelError(f"{name} is in training mode: a K/V cache is for inference, call model.eval()")
        past = rows.num_columns
        call = self._reader.read(arguments, past)
        if isinstance(rows.beside, CrossAttention) and rows.beside.is_empty:
            rows.start(rows.beside.begin(arguments, call.num_rows))
        holes = rows.see(call.num_rows, call.old_seen)
        if not call.counts_from(rows.lengths(call.num_rows), past, takes_positions=self._reader.takes_positions):
            call.token_ids = None
        packed = self._packed if self._packed is not None and not holes and self._packed.can_run(call, rows) else None
        # What is cached need not be computed, unless its logits are wanted. The dense way computes it in any case.
        may_skip = packed is None or call.wanted_columns.tolist() == [call.num_new_columns - 1]
        growth = rows.grow(NewColumns(call.new_seen, call.token_ids, may_skip=may_skip))
        try:
            self._peak = max(self._peak, self._manager.num_usable_blocks - self._manager.num_available_blocks)
            if growth.extension is not None:
                self._storage.copy_blocks(growth.extension.copies)
            forward: DenseForward | PackedForward
            if packed is not None:
                forward = packed.begin(call, growth, self._manager, self._storage)
            else:
                forward = DenseForward(growth, self._manager, self._storage.layers, self._index, has_past=past > 0)
        except BaseException:
            rows.cancel(growth)
            raise
        return _Running(rows, growth, forward, threading.get_ident())

    # How it is done.

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._end_stale()
        with self._lock:
            self._reap()
            yield

    def _end_stale(self) -> None:
        """Take back a forward of this thread that failed. After an interrupt this comes late, since torch calls no hook then."""
        running = self._running
        if running is not None and running.thread == threading.get_ident():
            self._running = None
            try:
                running.forward.abandon()
                running.rows.cancel(running.growth)
            finally:
                self._lock.release()

    def _check_idle(self, rows: Rows) -> None:
        running = self._running
        if running is not None and running.rows is rows and running.thread != threading.get_ident():
            raise StepError("the cache is used by a forward in another thread: one cache belongs to one batch at a time")

    def _check_seat(self, rows: Rows) -> None:
        self._check_open()
        if id(rows) not in self._seats:
            raise ClosedError("the cache is closed: make a new one")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the pool of the cache is closed: make a new one")

    def _seat(self, rows: Rows) -> Rows:
        self._seats[id(rows)] = rows
        return rows

    def _leave(self, rows: Rows) -> None:
        if self._seats.pop(id(rows), None) is not None:
            rows.release()
            if self._closes_with_caches and not self._seats:
                self.close()

    def _reap(self) -> None:
        while self._abandoned and not self._closed:
            self._leave(self._abandoned.pop())


def _remove(hooks: tuple[RemovableHandle, ...]) -> None:
    for hook in hooks:
        hook.remove()


def _called(method: WeakMethod[Any], *call: Any) -> Any:
    """Call a hook whose pool is still there."""
    found = method()
    return None if found is None else found(*call)


def _num_blocks(num_blocks: int | None, memory_bytes: int | None, *, block_size: int, nbytes_per_block: int, device: torch.device) -> int:
    if num_blocks is not None and memory_bytes is not None:
        raise ConfigError("num_blocks and kv_cache_memory_bytes were both given: give one")
    if num_blocks is not None:
        return integer("num_blocks", num_blocks, least=2, most=2**31 - 1)
    if memory_bytes is not None:
        return blocks_in_memory(memory_bytes, nbytes_per_block, setting="kv_cache_memory_bytes")
    share = int(free_memory(device) * _DEFAULT_SHARE)
    return min(-(-_DEFAULT_TOKENS // block_size) + 1, blocks_in_memory(share, nbytes_per_block, setting="a quarter of the free memory"))
