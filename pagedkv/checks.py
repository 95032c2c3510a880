"""Checks of values that come from outside. Each returns the value in its plain type or raises, naming setting, value and limit.

Owns no limit: what is allowed is said by whoever asks.
"""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.errors import ConfigError, InvalidRequestError, PagedKVError

_LONGEST_VALUE = 80  # characters of a wrong value that an error repeats
_REPR = reprlib.Repr()  # looks at the first few of a million items, and survives an object that cannot be printed
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST_VALUE


def integer(name: str, value: object, *, least: int, most: int | None = None, error: type[PagedKVError] = ConfigError) -> int:
    """An int from ``least`` to ``most``, numpy's integers too; bools are refused, because ``True`` is a mistake and not a 1."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # whatever has __index__
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise error(f"{name} is {shown(value)}: it must be an integer of at least {least}")
    if number < least:
        raise error(f"{name} is {number}: it must be at least {least}")
    if most is not None and number > most:
        raise error(f"{name} is {number}: it must be at most {most}")
    return number


def integers(name: str, values: object, *, ndim: int = 1) -> npt.NDArray[Any]:
    """Integers of any width, as an array of ``ndim`` dimensions; raises ``InvalidRequestError``.

    Floats and bools are refused, a bool among integers too: nobody means token 1 by ``True``.
    """
    form = "a flat list of integers" if ndim == 1 else f"integers in {ndim} dimensions"
    try:
        numbers = np.asarray(values)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # lists of different lengths, or what cannot be read at all
        raise InvalidRequestError(f"{name} must be {form}, got {shown(values)}: {error}") from error
    if numbers.ndim != ndim or (len(numbers) and numbers.dtype.kind not in "iu"):
        raise InvalidRequestError(f"{name} must be {form}, got {numbers.dtype} of shape {numbers.shape}: {shown(values)}")
    if isinstance(values, list | tuple) and not {bool, np.bool_}.isdisjoint(map(type, values)):
        raise InvalidRequestError(f"{name} must be {form}, got a bool among them: {shown(values)}")
    return numbers


def number(name: str, value: object, *, limit: str, error: type[PagedKVError] = ConfigError) -> float:
    """A finite float; ints are taken, bools and texts are not. The caller compares it with the ``limit`` that it names."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        result = float(value)  # type: ignore[arg-type]  # whatever has __float__
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of several numbers raises the last
        raise error(f"{name} is {shown(value)}: it must be {limit}") from None
    if not math.isfinite(result):
        raise error(f"{name} is {result}: it must be {limit}")
    return result


def text(name: str, value: object, *, error: type[PagedKVError] = ConfigError) -> str:
    """A str and nothing that merely prints like one."""
    if not isinstance(value, str):
        raise error(f"{name} is {shown(value)}, a {type(value).__name__}: it must be a text")
    return value


def flag(name: str, value: object, *, error: type[PagedKVError] = ConfigError) -> bool:
    """A bool and nothing that merely behaves like one."""
    if not isinstance(value, bool):
        raise error(f"{name} is {shown(value)}: it must be True or False")
    return value


def shown(value: object) -> str:
    """A wrong value as an error repeats it: on one line, and not at any length."""
    words = " ".join(_REPR.repr(value).split())
    return words if len(words) <= _LONGEST_VALUE else f"{words[:_LONGEST_VALUE]}..."
