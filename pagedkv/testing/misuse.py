"""Calls that a manager must refuse: handles released or never given out, counts and tokens out of range."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError, PagedKVError, StaleHandleError, UnknownHandleError

_NEVER_ISSUED = (0, -1, 99_999 << 32)

Call = Callable[[], object]


def misuse(
    manager: KVCacheManager, kind: int, pick: int, *, live: Sequence[int], released: Sequence[int]
) -> tuple[type[PagedKVError], Call]:
    """A wrong call, and the error that it must raise.

    Args:
        manager: whose commands are misused.
        kind: which call, modulo the number of those that are possible.
        pick: which handle it is tried with.
        live: handles of live sequences.
        released: handles of ended ones.
    """
    gone = released[-1 - pick % len(released)] if released else 0
    wrong, error = (gone, StaleHandleError) if gone and pick % 2 else (_NEVER_ISSUED[pick % len(_NEVER_ISSUED)], UnknownHandleError)
    handle_calls = _handle_calls(manager, wrong, live)
    if not live:
        return error, handle_calls[kind % len(handle_calls)]
    value_calls = _value_calls(manager, live[pick % len(live)])
    kind %= len(handle_calls) + len(value_calls)
    if kind < len(handle_calls):
        return error, handle_calls[kind]
    return InvalidRequestError, value_calls[kind - len(handle_calls)]


def _handle_calls(manager: KVCacheManager, wrong: int, live: Sequence[int]) -> tuple[Call, ...]:
    return (
        lambda: manager.release([*live, wrong]),
        lambda: manager.extend([wrong], 1),
        lambda: manager.complete([wrong], [0]),
        lambda: manager.cancel([wrong]),
        lambda: manager.fork(wrong, 1),
        lambda: manager.truncate([wrong], [1]),
        lambda: manager.append([wrong], [0]),
    )


def _value_calls(manager: KVCacheManager, one: int) -> tuple[Call, ...]:
    return (
        lambda: manager.release([one, one]),
        lambda: manager.truncate([one], [0]),
        lambda: manager.fork(one, 0),
        lambda: manager.append([one], [-2]),
        lambda: manager.open([[0], []]),
    )
