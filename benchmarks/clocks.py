"""Clocks around functions: how long each kind of work takes within a whole, without what other kinds take inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

Kind = str | Callable[[Any], str]  # of work; or what tells it from the object whose method is called


class Clocks:
    """Seconds of each kind of work since ``reading`` began. They stand still outside of it, where a wrapped function costs a test.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._kinds: list[str] = []
        self._since = 0.0

    @contextmanager
    def reading(self, kind: str) -> Iterator[dict[str, float]]:
        """Count for a ``with`` block; the seconds of each kind are there when it has ended. What no clock is around is of ``kind``."""
        self._seconds = {}
        self._start(kind)
        try:
            yield self._seconds
        finally:
            self._stop()

    def wrap(self, owner: type, name: str, kind: Kind) -> None:
        """Put a clock around a method of a class, for good. Bound methods that were taken before do not have it."""
        method = getattr(owner, name)

        @wraps(method)
        def clocked(this: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._kinds:
                return method(this, *args, **kwargs)
            self._start(kind if isinstance(kind, str) else kind(this))
            try:
                return method(this, *args, **kwargs)
            finally:
                self._stop()

        setattr(owner, name, clocked)

    def wrap_block(self, owner: type, name: str, kind: str) -> None:
        """Put a clock around the beginning and the end of what a method gives to ``with``, not around the block itself."""
        method = getattr(owner, name)

        @wraps(method)
        @contextmanager
        def clocked(*args: Any, **kwargs: Any) -> Iterator[Any]:
            block: AbstractContextManager[Any] = method(*args, **kwargs)
            if not self._kinds:
                with block as value:
                    yield value
                return
            self._start(kind)
            with block as value:
                self._stop()
                try:
                    yield value
                finally:
                    self._start(kind)
            self._stop()

        setattr(owner, name, clocked)

    def _start(self, kind: str) -> None:
        now = self._clock()
        if self._kinds:
            self._count(now)
        self._kinds.append(kind)
        self._since = self._clock()

    def _stop(self) -> None:
        self._count(self._clock())
        self._kinds.pop()
        self._since = self._clock()

    def _count(self, now: float) -> None:
        kind = self._kinds[-1]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
