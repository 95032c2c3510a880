"""Checks of single option values. Each returns the value in its canonical type or raises, naming value, limit and setting.

It owns no option: which option has which limit is decided in `params`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pagedkv.errors import InvalidRequestError

K = TypeVar("K")
V = TypeVar("V")

MAX_TOKEN_ID = 2**31 - 1


class FrozenMapping(Mapping[K, V]):
    """A read-only mapping that compares, hashes (when its values do), copies and pickles; a proxy of a dict would not pickle."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def refuse(name: str, value: object, limit: str) -> InvalidRequestError:
    """The error for one value: what it is, what it may be, which setting to change."""
    return InvalidRequestError(f"{name} is {value!r}, it has to be {limit}: change SamplingParams({name}=...)")


def integer(name: str, value: object, *, least: int, limit: str) -> int:
    """An int of at least ``least``; bools are refused, because ``n=True`` is a mistake and not a 1."""
    if isinstance(value, bool):
        raise refuse(name, value, limit)
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # whatever has __index__, numpy's integers too
    except TypeError:
        raise refuse(name, value, limit) from None
    if number < least:
        raise refuse(name, value, limit)
    return number


def number(name: str, value: object, limit: str) -> float:
    """A finite float; ints are taken, bools and strings are not."""
    if isinstance(value, bool | str | bytes):
        raise refuse(name, value, limit)
    try:
        result = float(value)  # type: ignore[arg-type]  # whatever has __float__
    except (TypeError, ValueError, OverflowError):
        raise refuse(name, value, limit) from None
    if not math.isfinite(result):
        raise refuse(name, value, limit)
    return result


def flag(name: str, value: object) -> bool:
    """A bool and nothing that merely behaves like one."""
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids in the order given, repeats dropped."""
    limit = f"a sequence of token ids from 0 to {MAX_TOKEN_ID}"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise refuse(name, value, limit)
    return tuple(dict.fromkeys(token_id(name, token, limit) for token in value))


def token_id(name: str, value: object, limit: str) -> int:
    """One token id that fits an int32."""
    token = integer(name, value, least=0, limit=limit)
    if token > MAX_TOKEN_ID:
        raise refuse(name, value, limit)
    return token


def strings(name: str, value: object) -> tuple[str, ...]:
    """One string or several, none of them empty: an empty stop string would match everywhere."""
    limit = "a non-empty string or a sequence of non-empty strings"
    items = (value,) if isinstance(value, str) else value
    if isinstance(items, bytes) or not isinstance(items, Sequence):
        raise refuse(name, value, limit)
    for item in items:
        if not isinstance(item, str) or not item:
            raise refuse(name, value, limit)
    return tuple(dict.fromkeys(items))
