"""The forwards of one model over caches of one pool: seen before the model sees them, and once more before their caller does.

Owns the two hooks of the model, and the forward that is between them: one at a time, whatever the number of threads. How a forward
reads its blocks is said in ``dense.py`` and ``packed.py``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakMethod, finalize

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pagedkv.errors import InvalidRequestError, StepError, UnsupportedModelError
from pagedkv.generation.books import Books
from pagedkv.generation.call import ForwardReader
from pagedkv.generation.cross import CrossAttention
from pagedkv.generation.dense import DenseForward
from pagedkv.generation.growth import Growth, NewColumns
from pagedkv.generation.packed import PackedForward, PackedReading
from pagedkv.generation.rows import Rows
from pagedkv.generation.seats import Seats
from pagedkv.models.alterations import Alterations


@dataclass(slots=True, eq=False)
class _Running:
    """A forward between its two hooks."""

    rows: Rows
    growth: Growth
    forward: DenseForward | PackedForward
    thread: int
    call: FrameType  # of the module call; as long as it is on the stack the forward goes on, whatever else is called within it


class Forwards:
    """Hooks into a model until ``unhook()``, or until nobody refers to this any more.

    Args:
        model: the model.
        reader: of its arguments.
        seats: the caches that are open.
        books: their blocks; may be replaced while there are no caches.

    Attributes:
        packed: makes packed forwards; None where all are dense.
    """

    def __init__(self, model: PreTrainedModel, reader: ForwardReader, seats: Seats, books: Books) -> None:
        self.books = books
        self.packed: PackedReading | None = None
        self._model = model
        self._reader = reader
        self._seats = seats
        self._lock = threading.RLock()
        self._running: _Running | None = None
        before, after = WeakMethod(self._before), WeakMethod(self._after)
        handles = (
            model.register_forward_pre_hook(lambda *call: _called(before, *call), with_kwargs=True),
            model.register_forward_hook(lambda *call: _called(after, *call), with_kwargs=True, always_call=True),
        )
        self._remove_hooks = finalize(self, _remove, handles)
        self._alterations = Alterations(model)

    def unhook(self) -> None:
        """Leave the model."""
        self._remove_hooks()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Between forwards: for a ``with`` block, nobody else runs one or changes rows."""
        self._end_stale()
        with self._lock:
            self._seats.reap()
            yield

    def check_idle(self, rows: Rows) -> None:
        """Raise ``StepError`` while a forward runs over these rows, in another thread or around the caller."""
        running = self._running
        if running is None or running.rows is not rows:
            return
        if running.thread != threading.get_ident():
            raise StepError("the cache is used by a forward in another thread: one cache belongs to one batch at a time")
        if _is_on_stack(running.call):
            raise StepError("the cache is used within a forward over it: one cache belongs to one batch at a time")

    def update(self, rows: Rows, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store and read a layer's K and V in the forward that is running.

        Raises:
            InvalidRequestError: none is, over these rows.
        """
        running = self._running
        if running is None or running.rows is not rows or running.thread != threading.get_ident():
            raise InvalidRequestError(
                f"this cache is for forwards of one {type(self._model).__name__}, as a whole: it was given to another model or to a part"
            )
        return running.forward.update(key, value, layer)

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._end_stale()
        arguments = self._reader.named(args, kwargs)
        rows = getattr(arguments.get(self._reader.cache_argument), "_rows", None)
        if not isinstance(rows, Rows) or not rows.belongs_to(self.books.manager) or module is not self._model:
            return None
        self.check_idle(rows)
        if self._running is not None and self._running.thread == threading.get_ident():
            raise StepError("a forward over a cache was begun within another one over the same pool: steps of one model take turns")
        self._lock.acquire()
        try:
            self._seats.check(rows)
            self._seats.reap()
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
        if running.call is not _module_call():
            return None  # of the same model, without a cache, within the forward
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
        books, past = self.books, rows.num_columns
        call = self._reader.read(arguments, past)
        if isinstance(rows.beside, CrossAttention) and rows.beside.is_empty:
            rows.start(rows.beside.begin(arguments, call.num_rows))
        if not rows.num_rows and books.shared_names and self._alterations.seen():
            books.forget_shared()
        if call.own_mask and rows.has_given_back:
            raise InvalidRequestError(
                "an attention mask of one's own may show what layers with windows have given back: make the pool with windowed_groups=False"
            )
        holes = rows.see(call.num_rows, call.old_seen)
        # Where padding between its tokens may count, what a row holds does not follow from them: no other is the same.
        by_columns = (self.packed is None or self.packed.counts_columns) and rows.has_gaps(call.new_seen)
        if by_columns or not call.counts_from(rows.lengths(call.num_rows), past, takes_positions=self._reader.takes_positions):
            call.token_ids = None
        packed = self.packed if self.packed is not None and not holes and self.packed.can_run(call, rows) else None
        # What is cached need not be computed, unless its logits are wanted. The dense way computes it in any case.
        may_skip = packed is None or call.wanted_columns.tolist() == [call.num_new_columns - 1]
        growth = rows.grow(NewColumns(call.new_seen, call.token_ids, may_skip=may_skip))
        try:
            books.note_use()
            if growth.extension is not None:
                books.storage.copy_blocks(growth.extension.copies)
            forward: DenseForward | PackedForward
            if packed is not None:
                forward = packed.begin(call, growth, books.manager, books.storage)
            else:
                forward = DenseForward(growth, books.manager, books.storage.layers, books.index, has_past=past > 0)
        except BaseException:
            rows.cancel(growth)
            raise
        return _Running(rows, growth, forward, threading.get_ident(), _module_call())

    def _end_stale(self) -> None:
        """Take back a forward of this thread that failed. After an interrupt this comes late, since torch calls no hook then."""
        running = self._running
        if running is not None and running.thread == threading.get_ident() and not _is_on_stack(running.call):
            self._running = None
            try:
                running.forward.abandon()
                running.rows.cancel(running.growth)
            finally:
                self._lock.release()


def _remove(handles: tuple[RemovableHandle, ...]) -> None:
    for handle in handles:
        handle.remove()


def _module_call() -> FrameType:
    """The frame of torch that calls a hook: it calls the one before a forward, the forward, and the one after it."""
    frame = sys._getframe(1)
    while frame.f_globals is globals() and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_on_stack(call: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def _called(method: WeakMethod[Any], *call: Any) -> Any:
    """Call a hook whose owner is still there."""
    found = method()
    return None if found is None else found(*call)
