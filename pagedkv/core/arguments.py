"""What callers of a manager pass, made into arrays that can be trusted, or refused by name. Owns no state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from pagedkv.checks import integers, shown, text
from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int32Array, Int64Array

NO_TOKEN = -1
_INT32 = np.dtype(np.int32)


def as_handles(seqs: object) -> Int64Array:
    """``[n]`` int64 handles, known or not."""
    handles = integers("sequence handles", seqs)
    if handles.dtype.kind == "u" and len(handles) and int(handles.max()) >= 2**63:
        raise InvalidRequestError(f"sequence handles must be below 2**63, got {int(handles.max())}")
    return handles.astype(np.int64)


def as_tokens(token_ids: object) -> Int32Array:
    """``[n]`` int32 token ids from 0."""
    wide = integers("token ids", token_ids)
    if not _within(wide, 0):
        raise InvalidRequestError(f"token ids must be from 0 to 2**31 - 1, got {int(wide.min())} to {int(wide.max())}")
    return wide.astype(np.int32)


def as_counts(values: object, length: int, what: str) -> Int32Array:
    """``[length]`` int32 of any sign."""
    if isinstance(values, np.ndarray) and values.dtype == _INT32 and values.shape == (length,):
        return values
    counts = integers(what, values)
    if len(counts) != length:
        raise InvalidRequestError(f"{what}: expected {length} integers, one for each sequence, got {len(counts)}")
    if not _within(counts, -(2**31)):
        raise InvalidRequestError(f"{what}: expected 32-bit integers, got {int(counts.min())} to {int(counts.max())}")
    return counts.astype(np.int32)


def as_block_ids(block_ids: object) -> Int32Array:
    """``[n]`` int32 block ids, known or not."""
    if isinstance(block_ids, np.ndarray) and block_ids.dtype == _INT32 and block_ids.ndim == 1:
        return block_ids
    wide = integers("block ids", block_ids)
    if not _within(wide, -(2**31)):
        raise InvalidRequestError(f"block ids must be 32-bit integers, got {int(wide.min())} to {int(wide.max())}")
    return wide.astype(np.int32)


def as_namespace(name: object) -> str:
    """A namespace, which is a text."""
    return name if type(name) is str else text("namespace", name, error=InvalidRequestError)


def as_list(values: object, what: str) -> list[object]:
    """Several of something; one text is not several, though Python would walk over it."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InvalidRequestError(f"{what} is {shown(values)}: it must be a list")
    return list(values)


def as_prompts(prompts: object, namespaces: Sequence[str] | None) -> tuple[list[Int32Array], list[str]]:
    """Prompts and the namespace of each."""
    tokens = [as_tokens(prompt) for prompt in as_list(prompts, "prompts")]
    if namespaces is None:
        return tokens, [""] * len(tokens)
    names = [as_namespace(name) for name in as_list(namespaces, "namespaces")]
    if len(names) != len(tokens):
        raise InvalidRequestError(f"{len(names)} namespaces were given for {len(tokens)} prompts")
    return tokens, names


def _within(numbers: Int64Array, least: int) -> bool:
    """Whether all of them are from ``least`` to below 2**31; by their places: numpy finds those sooner than the values."""
    return not len(numbers) or (numbers.item(numbers.argmin()) >= least and numbers.item(numbers.argmax()) < 2**31)
