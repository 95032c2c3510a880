"""The error tree: everything that pagedkv raises on purpose, and who has to act on it.

PagedKVError
├── InvalidRequestError       (ValueError)    the caller's input: change the value that the message names
│   ├── RequestTooLargeError                  can never fit: shorten it, or make the pool or the limits larger
│   ├── DuplicateRequestError                 a request of that id is still alive
│   └── TraceError                            a file of recorded requests that cannot be read: names file, line and column
├── HandleError               (LookupError)   a handle that means nothing here
│   ├── UnknownHandleError                    never issued by this object
│   └── StaleHandleError                      released already; a second release is this, too
├── OutOfBlocksError                          not enough blocks now: wait, preempt, release or unpin
├── ConfigError               (ValueError)    a setting that cannot work
│   ├── UnsupportedModelError                 a model that could not be shown right, with the reason
│   └── UnsupportedBackendError               an attention backend that is unknown or cannot run this model
├── PoolAllocationError       (MemoryError)   the device refused the bytes of a pool; nothing was kept
├── ClosedError               (RuntimeError)  used after close()
├── StepError                 (RuntimeError)  a step failed as a whole and was undone; it may be tried again
└── InvariantError            (RuntimeError)  a bug of ours, or of an object passed in: names the broken invariant

Nothing here is raised by ``assert``: the checks hold under ``python -O``.
"""

from __future__ import annotations


class PagedKVError(Exception):
    """Base of every error that pagedkv raises on purpose."""


class InvalidRequestError(PagedKVError, ValueError):
    """The caller passed a value that cannot be served; the message names it, its limit and the setting to change."""


class RequestTooLargeError(InvalidRequestError):
    """The request could never fit, even alone in an empty pool.

    Args:
        what: the request, in words.
        needed: the amount it needs at its largest.
        limit: the amount there can ever be.
        unit: what both count, for example ``"blocks"`` or ``"tokens"``.
        change: the settings that would help.
    """

    def __init__(self, what: str, *, needed: int, limit: int, unit: str, change: str) -> None:
        super().__init__(f"{what} needs {needed} {unit} and there can never be more than {limit}: {change}")
        self.needed = needed
        self.limit = limit
        self.unit = unit


class DuplicateRequestError(InvalidRequestError):
    """A request with this id has not ended yet."""


class TraceError(InvalidRequestError):
    """A file of recorded requests holds something that cannot be read.

    Args:
        problem: what was found and what is allowed.
        path: the file.
        line: where in it, from 1; 0 for the file as a whole.
        column: the name of the column or key; empty for the line as a whole.
    """

    def __init__(self, problem: str, *, path: str, line: int = 0, column: str = "") -> None:
        place = path + (f", line {line}" if line else "") + (f", column {column!r}" if column else "")
        super().__init__(f"{place}: {problem}")
        self.path = path
        self.line = line
        self.column = column


class HandleError(PagedKVError, LookupError):
    """A handle that does not name a live object of the receiver."""


class UnknownHandleError(HandleError):
    """The handle was never issued by this object."""


class StaleHandleError(HandleError):
    """The handle's object was released; releasing twice raises this as well."""


class OutOfBlocksError(PagedKVError):
    """A command needs more blocks than are free or evictable now. Nothing was changed.

    Args:
        needed: blocks that the command needs.
        available: blocks that are free, or cached and held by nobody.
        change: what would help.
    """

    def __init__(self, *, needed: int, available: int, change: str = "release or unpin sequences") -> None:
        super().__init__(f"needs {needed} blocks, {available} are available: {change}")
        self.needed = needed
        self.available = available


class ConfigError(PagedKVError, ValueError):
    """A setting that cannot work; the message names the setting, its value and what is allowed."""


class UnsupportedModelError(ConfigError):
    """The model could not be shown to give the right tokens over paged K/V; the message says what was tried."""


class UnsupportedBackendError(ConfigError):
    """The attention backend is unknown, or says why it cannot run this model."""


class PoolAllocationError(PagedKVError, MemoryError):
    """The device refused the memory of a pool. What had been taken was given back."""


class ClosedError(PagedKVError, RuntimeError):
    """The object was used after ``close()``."""


class StepError(PagedKVError, RuntimeError):
    """A step failed as a whole and was undone: requests, tables and blocks are as before it."""


class InvariantError(PagedKVError, RuntimeError):
    """An internal promise is broken; the message names it. Please report it with the snapshot."""
