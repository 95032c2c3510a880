"""Faults on purpose: the k-th call of something fails, or the k-th line that a package executes raises.

Owns what is armed, and nothing of what it strikes. A fault loop runs the same work once for every k until a fault does not strike any more:
all the places at which the work can fail have failed by then.

    >>> import math
    >>> def work(fault):
    ...     with failing_calls(math, "sqrt", fault):
    ...         return [math.sqrt(number) for number in (4, 9)]
    >>> [outcome for outcome in fault_loop(work)]
    [InjectedFaultError('fault 0'), InjectedFaultError('fault 1'), [2.0, 3.0]]
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeVar

_Result = TypeVar("_Result")
Site = tuple[str, int]
"""A file and the number of a line in it."""


class InjectedFaultError(Exception):
    """Raised by a fault unless it was told what else to raise. No ``PagedKVError``: nothing that handles refusals swallows it."""


class Fault:
    """Strikes at the k-th of the events that it counts.

    Args:
        at: from 0; never, but counting, when not given.
        persistent: whether all later events fail as well; for lines: that line whenever it is reached again.
        error: makes the exception; an ``InjectedFaultError`` when not given.

    Attributes:
        count: events so far.
        num_struck: exceptions raised so far.
        sites: of the lines counted, in order; empty where calls are counted.
    """

    def __init__(self, at: int | None = None, *, persistent: bool = False, error: Callable[[], BaseException] | None = None) -> None:
        self.at = at
        self.persistent = persistent
        self.count = self.num_struck = 0
        self.sites: list[Site] = []
        self._error = error or (lambda: InjectedFaultError(f"fault {at}"))

    def event(self, site: Site | None = None) -> None:
        """Count an event; raise if it is the one, or a later one that fails as well."""
        index, self.count = self.count, self.count + 1
        if site is not None:
            self.sites.append(site)
        if self.at is None or index < self.at:
            return
        again = self.persistent and (site is None or site == self.sites[self.at])
        if index == self.at or again:
            self.num_struck += 1
            raise self._error()


@contextmanager
def failing_calls(owner: object, name: str, fault: Fault) -> Iterator[Fault]:
    """Count the calls of ``owner.name`` while inside, and fail the one that the fault names, before it does anything.

    Args:
        owner: an object, for that one alone, a class, for all its instances, or a module.
        name: a function or method of it.
        fault: counts on through several uses.
    """
    original: Any = getattr(owner, name)
    own = vars(owner).get(name)

    @functools.wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        fault.event()
        return original(*args, **options)

    setattr(owner, name, call)
    try:
        yield fault
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def failing_lines(packages: tuple[ModuleType, ...], fault: Fault) -> Iterator[Fault]:
    """Count the lines that these packages execute in this thread while inside, and raise instead of the one that the fault names.

    The interpreter stops tracing when an exception comes out of it, so one ``with`` raises once; a persistent fault strikes again in the
    next one. What runs already when the ``with`` begins is not traced. Cost: about a microsecond a line.

    Args:
        packages: imported packages, of which all that lies in their folders counts, and modules, which count alone.
        fault: counts on through several uses.
    """
    places = tuple(_place(package) for package in packages)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            fault.event((frame.f_code.co_filename, frame.f_lineno))
        elif event == "call" and not frame.f_code.co_filename.startswith(places):
            return None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield fault
    finally:
        sys.settrace(before)


def _place(package: ModuleType) -> str:
    file = Path(package.__file__ or "")
    return f"{file.parent}{os.sep}" if file.name == "__init__.py" else str(file)


def fault_loop(work: Callable[[Fault], _Result], *, persistent: bool = False, most: int = 100_000) -> Iterator[_Result | BaseException]:
    """Run ``work`` with a fault at event 0, 1, 2, ... until one does not strike, and yield what came of each run: a result or an exception.

    Args:
        work: does the same each time, from the same beginnings.
        persistent: as for ``Fault``.
        most: faults at most; a loop that never comes to its end is not one.

    Raises:
        RuntimeError: there were more.
    """
    for at in range(most):
        fault = Fault(at, persistent=persistent)
        try:
            outcome: _Result | BaseException = work(fault)
        except Exception as error:
            outcome = error
        yield outcome
        if not fault.num_struck:
            return
    raise RuntimeError(f"{most} faults have struck, and there is no end")
