"""A model's blocks for any number of caches.

Owns the decision whether and how the model can be run right (``trial.py``), and the life of the caches' rows. It does not own what these
are (``rows.py``), their blocks (``books.py``), nor the forwards (``forwards.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv import checks
from pagedkv.checks import integer, shown
from pagedkv.core import CheckLevel, Window
from pagedkv.errors import ConfigError, UnsupportedBackendError, UnsupportedModelError
from pagedkv.generation.books import Books, Grouping, Sizes
from pagedkv.generation.call import ForwardReader
from pagedkv.generation.cross import CrossAttention
from pagedkv.generation.forwards import Forwards
from pagedkv.generation.packed import PackedReading
from pagedkv.generation.rows import Beside, Rows
from pagedkv.generation.seats import Seats
from pagedkv.generation.states import LayerStates
from pagedkv.generation.trial import Reference, run_reference, trial_blocks
from pagedkv.models import ModelRunner
from pagedkv.models.adapters import AdaptedModel, unwrapped
from pagedkv.models.memory import free_memory
from pagedkv.models.positions import RotaryEmbeddings
from pagedkv.models.replacements import Wanted
from pagedkv.models.tiers import TierName
from pagedkv.sizing import blocks_in_memory

_DEFAULT_TOKENS = 16_384
_DEFAULT_SHARE = 0.25  # of the free memory, at most


class CachePool:
    """Blocks of one model that many ``PagedCache`` share, in one thread or several; forwards take turns.

    Args:
        model: a model in evaluation mode, as it is or with adapters inside a wrapper (PEFT's), whose ``generate`` is then called. It
            gets a hook before its forward and one after, until the pool is closed; they leave forwards without a cache of this pool alone.
        num_blocks: blocks, the null block included: one number, or one for each layer group, in the order of ``windows``. Those behind a
            window are given back while a sequence grows, so fewer do for groups with one, as long as the longest prompt that comes in
            one forward fits; or
        kv_cache_memory_bytes: as many as fit in so many bytes; or neither: blocks for 16,384 tokens, in at most a quarter of the
            memory that is free.
        block_size: tokens in a block.
        max_num_seqs: different sequences at once, over all caches; rows that are the same count once.
        tier: ``"packed"``: attention reads blocks in place, padding is not computed, and rows that are the same are computed once.
            ``"dense"``: the model's own attention over gathered blocks, which every model with a plain cache allows. ``"auto"``: packed
            where the model allows it; a forward that asks for more than logits (attentions, hidden states), or whose input is
            more than tokens at their places, is dense in any case.
        pack_linears: as for ``ModelRunner``, but never ``"int8"``; used in packed forwards.
        fuse: likewise.
        windowed_groups: whether layers with a sliding or chunked window give back the blocks behind it, where forwards run packed. With
            False, ``PagedCache.crop`` can go back as far as one likes.
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
        model: PreTrainedModel | AdaptedModel,
        *,
        num_blocks: int | Sequence[int] | None = None,
        kv_cache_memory_bytes: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 256,
        tier: TierName = "auto",
        pack_linears: Wanted = "auto",
        fuse: Wanted = "auto",
        windowed_groups: bool = True,
        check: CheckLevel = "off",
    ) -> None:
        if tier not in get_args(TierName):
            raise ConfigError(f"tier is {shown(tier)}: it must be one of {', '.join(get_args(TierName))}")
        if pack_linears not in (True, False, "auto"):  # "int8" would change tokens, and those of packed forwards alone
            raise ConfigError(f"pack_linears is {shown(pack_linears)}: inside generate() it must be True, False or 'auto'")
        integer("block_size", block_size, least=1, most=2**31 - 1)
        checks.flag("windowed_groups", windowed_groups)
        if isinstance(model, AdaptedModel):
            model = unwrapped(model)
        reference = run_reference(model)
        layers = (*reference.layers, *reference.cross_layers.values())
        nbytes_per_block = block_size * sum(layer.nbytes_per_token(reference.dtype) for layer in layers)
        size = _num_blocks(num_blocks, kv_cache_memory_bytes, block_size=block_size, nbytes_per_block=nbytes_per_block, device=model.device)
        self._model = model
        self._keeps_states = reference.keeps_states
        self._seats = Seats()
        self._num_named = 0
        self._closes_with_caches = False
        self.tier_reason: str | None = None
        tried = Sizes([trial_blocks(block_size)], block_size, max_num_seqs=len(reference.logits[0]))
        grouping = Grouping(reference.layers)
        reader = ForwardReader(model)
        self._forwards = Forwards(model, reader, self._seats, Books(reference, grouping, tried, device=model.device, check=check))
        try:
            runner = self._prove(reference, reader, tier=tier, block_size=block_size, pack_linears=pack_linears, fuse=fuse)
            if windowed_groups and runner is not None:
                grouping = Grouping.of(runner)
            sizes = Sizes(_of_each_group(size, grouping), block_size, max_num_seqs)
            self._forwards.books.close()
            self._forwards.books = Books(reference, grouping, sizes, device=model.device, check=check)
        except BaseException:
            self._forwards.unhook()
            if self._forwards.packed is not None:
                self._forwards.packed.close()
            raise

    def _prove(
        self, reference: Reference, reader: ForwardReader, *, tier: TierName, block_size: int, pack_linears: Wanted, fuse: Wanted
    ) -> ModelRunner | None:
        """Find out how the model can be run right, the faster way last, and return what runs it so; the runner checks itself, too."""
        from pagedkv.generation.comparison import compare  # it runs a cache over this pool

        compare(self, reference)
        if tier == "dense":
            return None
        try:
            if reference.cross_layers:
                raise UnsupportedModelError("packed forwards of generate() are for decoders alone")
            if reference.keeps_states:
                raise UnsupportedModelError("layers keep states beside K and V, which packed forwards of generate() do not follow")
            if not RotaryEmbeddings(self._model).is_steady:
                raise UnsupportedModelError(
                    "generate() rotates a whole batch at the frequencies of its longest row, packed forwards do not"
                )
            runner = ModelRunner(self._model, block_size=block_size, tier="packed", pack_linears=pack_linears, fuse=fuse)
            if runner.layers != reference.layers:
                runner.close()
                raise UnsupportedModelError("packed forwards store K/V in another form than the model's own, which dense ones read")
        except Exception as error:  # whatever a model raises when it is run in a way that it was not made for
            setting = isinstance(error, ConfigError) and not isinstance(error, UnsupportedModelError | UnsupportedBackendError)
            if tier == "packed" or setting:
                raise
            self.tier_reason = str(error)
            return None
        self._forwards.packed = PackedReading(runner, reader)
        try:
            compare(self, reference)
        except UnsupportedModelError as error:
            self._forwards.packed = None
            runner.close()
            if tier == "packed":
                raise
            self.tier_reason = str(error)
            return None
        return runner

    @property
    def tier(self) -> str:
        """``"packed"`` or ``"dense"``: how forwards run that ask for no more than logits."""
        return "dense" if self._forwards.packed is None else "packed"

    # Questions.

    @property
    def model(self) -> PreTrainedModel:
        """The model whose caches these are."""
        return self._model

    @property
    def num_layers(self) -> int:
        """Layers that store K and V."""
        return len(self._forwards.books.index)

    @property
    def num_cross_layers(self) -> int:
        """Layers of cross attention that store K and V; 0 for a decoder alone."""
        cross = self._forwards.books.cross
        return 0 if cross is None else len(cross.index)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._forwards.books.manager.block_size

    @property
    def nbytes_per_block(self) -> int:
        """Bytes of one block in each layer group together: K and V of ``block_size`` tokens, all layers of self attention."""
        return sum(self._forwards.books.group_nbytes)

    @property
    def group_nbytes(self) -> tuple[int, ...]:
        """Bytes of one block in each layer group, K and V of its layers of self attention."""
        return self._forwards.books.group_nbytes

    @property
    def windows(self) -> tuple[Window | None, ...]:
        """For each layer group how far back it reads; None for everything, as the first always, which may have no layers."""
        return self._forwards.books.manager.windows

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be handed out at all, in all layer groups."""
        return sum(self._forwards.books.manager.usable_blocks)

    @property
    def num_blocks_in_use(self) -> int:
        """Blocks that caches hold now, in all layer groups."""
        return sum(self.group_blocks_in_use)

    @property
    def group_blocks_in_use(self) -> tuple[int, ...]:
        """The same, in each layer group."""
        with self._forwards.exclusive():
            return self._forwards.books.in_use

    @property
    def num_cross_blocks_in_use(self) -> int:
        """Blocks of cross attention that caches hold now, from a pool of as many of their own; 0 for a decoder alone."""
        with self._forwards.exclusive():
            cross = self._forwards.books.cross
            return 0 if cross is None else cross.num_blocks_in_use

    @property
    def peak_blocks_in_use(self) -> int:
        """The most blocks that were held at once in all layer groups, since ``reset_peak``."""
        return self._forwards.books.peak

    @property
    def peak_nbytes_in_use(self) -> int:
        """The most bytes of K and V that such blocks took at once."""
        return self._forwards.books.peak_nbytes

    def check(self) -> None:
        """Verify the bookkeeping; raises ``InvariantError`` naming what is broken."""
        with self._forwards.exclusive():
            self._forwards.books.check()

    # Commands of users.

    def fill_free_blocks(self, value: float = 0.0) -> int:
        """Overwrite all blocks that hold nothing: zeros erase what is left in them, NaN proves that nobody reads it; returns how many."""
        with self._forwards.exclusive():
            return self._forwards.books.fill_free(value)

    def reset_peak(self) -> None:
        """Begin to look for the most blocks anew."""
        with self._forwards.exclusive():
            self._forwards.books.reset_peak()

    def purge(self, namespace: str) -> int:
        """Forget the prefixes cached under a namespace; returns how many blocks that were.

        A first forward does so for all of them where the model was altered since the one before it (see ``ModelRunner.altered``).
        """
        with self._forwards.exclusive():
            return self._forwards.books.manager.purge(namespace)

    def close(self) -> None:
        """End all caches of the pool, give its memory back and take the hooks from the model. May be called again."""
        if self._seats.is_closed:
            return
        with self._forwards.exclusive():
            self._seats.close()
            self._forwards.unhook()
            self._forwards.books.close()
            if self._forwards.packed is not None:
                self._forwards.packed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Commands of caches.

    def open(self, namespace: str | None, *, closes_with_caches: bool = False) -> Rows:
        """Rows for a new cache, with whose end the pool may be meant to end; raises ``ClosedError`` after ``close()``."""
        with self._forwards.exclusive():
            self._seats.check_open()
            self._closes_with_caches = closes_with_caches
            self._num_named += 1
            private = namespace is None
            name = f"\0cache {self._num_named}" if namespace is None else checks.text("namespace", namespace)
            beside: Beside | None = LayerStates(self._model) if self._keeps_states else None
            books = self._forwards.books
            if not private:
                books.shared_names[name] = None
            if books.cross is not None:
                beside = CrossAttention(books.cross)
            return self._seats.take(Rows(books.manager, name, books.storage.copy_blocks, private=private, beside=beside))

    def fork(self, rows: Rows) -> Rows:
        """Rows for a cache that starts as a copy of another."""
        with self.using(rows):
            return self._seats.take(rows.fork())

    @contextmanager
    def using(self, rows: Rows) -> Iterator[Rows]:
        """Rows that are read or changed between forwards.

        Raises:
            ClosedError: the cache or the pool is closed.
            StepError: a forward over them is running.
        """
        self._forwards.check_idle(rows)
        with self._forwards.exclusive():
            self._seats.check(rows)
            yield rows

    def release(self, rows: Rows) -> None:
        """Give back all blocks of rows whose cache is closed."""
        if self._seats.is_closed:
            return
        self._forwards.check_idle(rows)
        with self._forwards.exclusive():
            self._seats.leave(rows)
        if self._closes_with_caches and self._seats.is_empty:
            self.close()

    def abandon(self, rows: Rows) -> None:
        """Note that the cache of these rows is gone; their blocks come back at the next command. Safe in the garbage collector."""
        self._seats.abandon(rows)

    def num_columns(self, rows: Rows) -> int:
        """Columns of a cache; also asked within a forward, of whose columns it does not know yet."""
        self._seats.check(rows)
        return rows.num_columns

    def update(self, rows: Rows, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store and read a layer's K and V in the forward that is running."""
        self._seats.check(rows)
        return self._forwards.update(rows, key, value, layer)


def _num_blocks(
    num_blocks: int | Sequence[int] | None, memory_bytes: int | None, *, block_size: int, nbytes_per_block: int, device: torch.device
) -> int | list[int]:
    if num_blocks is not None and memory_bytes is not None:
        raise ConfigError("num_blocks and kv_cache_memory_bytes were both given: give one")
    if isinstance(num_blocks, Sequence):
        return [integer("num_blocks", count, least=2, most=2**31 - 1) for count in num_blocks]
    if num_blocks is not None:
        return integer("num_blocks", num_blocks, least=2, most=2**31 - 1)
    if memory_bytes is not None:
        return blocks_in_memory(memory_bytes, nbytes_per_block, setting="kv_cache_memory_bytes")
    share = int(free_memory(device) * _DEFAULT_SHARE)
    return min(-(-_DEFAULT_TOKENS // block_size) + 1, blocks_in_memory(share, nbytes_per_block, setting="a quarter of the free memory"))


def _of_each_group(num_blocks: int | list[int], grouping: Grouping) -> list[int]:
    count = len(grouping.windows)
    if isinstance(num_blocks, int):
        return [num_blocks] * count
    if len(num_blocks) != count:
        raise ConfigError(f"num_blocks is {num_blocks}: the model has {count} layer groups here, give one number or so many")
    return num_blocks
