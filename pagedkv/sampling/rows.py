"""The table of registered rows: each row's parameters as arrays, so that a step picks them up with one index each.

It owns what is remembered between steps and nothing else: no logits, no tokens, no random state that advances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagedkv.errors import InvalidRequestError, UnknownHandleError
from pagedkv.plan import Int64Array
from pagedkv.sampling.filters import Filters
from pagedkv.sampling.params import SamplingParams
from pagedkv.sampling.random import stream

Processor = Callable[[Tensor, Tensor], Tensor]
"""``(input_ids [1, L] int64, scores [1, V]) -> scores [1, V]``, transformers' logits processor signature."""

RANDOM, EDITED, LOGPROBS, WARPED, EMPTY = 1, 2, 4, 8, 128
NO_LOGPROBS = -2


@dataclass(frozen=True, slots=True, eq=False)
class RowExtras:
    """What few rows have and arrays would waste: ids, words and callables of one row."""

    bias_ids: Int64Array
    bias_values: npt.NDArray[np.float32]
    bad_words: tuple[Int64Array, ...]
    stop_ids: Int64Array
    allowed_ids: Int64Array | None
    processors: tuple[Processor, ...]
    warpers: tuple[Processor, ...]


class RowTable:
    """Parameters by row; rows are small integers and the arrays double as they grow.

    Attributes:
        flags: ``[capacity]`` uint8, 0 for a plain greedy row, so that one ``any()`` finds the fast path.
    """

    def __init__(self, max_rows: int) -> None:
        size = max(1, max_rows)
        self.flags = np.full(size, EMPTY, dtype=np.uint8)
        self.temperature = np.ones(size, dtype=np.float32)
        self.top_k = np.zeros(size, dtype=np.int64)
        self.top_p = np.ones(size, dtype=np.float64)
        self.min_p = np.zeros(size, dtype=np.float64)
        self.typical_p = np.ones(size, dtype=np.float64)
        self.repetition = np.ones(size, dtype=np.float32)
        self.presence = np.zeros(size, dtype=np.float32)
        self.frequency = np.zeros(size, dtype=np.float32)
        self.num_prompt_tokens = np.zeros(size, dtype=np.int64)
        self.min_tokens = np.zeros(size, dtype=np.int64)
        self.logprobs = np.full(size, NO_LOGPROBS, dtype=np.int64)
        self.streams = np.zeros(size, dtype=np.uint64)
        self._extras: dict[int, RowExtras] = {}

    def __len__(self) -> int:
        return int((self.flags != EMPTY).sum())

    def __contains__(self, row: int) -> bool:
        return 0 <= row < len(self.flags) and bool(self.flags[row] != EMPTY)

    def put(self, row: int, params: SamplingParams, extras: RowExtras, *, num_prompt_tokens: int, stream_of: tuple[int, int]) -> None:
        """Register a row that is empty. Raises `InvalidRequestError` when it is not."""
        self._reserve(row)
        if self.flags[row] != EMPTY:
            raise InvalidRequestError(f"row {row} is registered already: remove({row}) before it is added again")
        self.temperature[row] = 1.0 if params.is_greedy else params.temperature
        self.top_k[row], self.top_p[row] = params.top_k, params.top_p
        self.min_p[row], self.typical_p[row] = params.min_p, params.typical_p
        self.repetition[row] = params.repetition_penalty
        self.presence[row], self.frequency[row] = params.presence_penalty, params.frequency_penalty
        self.num_prompt_tokens[row], self.min_tokens[row] = num_prompt_tokens, params.min_tokens
        self.logprobs[row] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        self.streams[row] = stream(*stream_of)
        self._extras[row] = extras
        self.flags[row] = self._flags(params, extras)

    def drop(self, row: int) -> None:
        """Forget a row. Raises `UnknownHandleError` when it is empty."""
        self.check(np.asarray([row], dtype=np.int64))
        self.flags[row] = EMPTY
        del self._extras[row]

    def check(self, rows: Int64Array) -> None:
        """Raise `UnknownHandleError` for a row that is not registered."""
        outside = (rows < 0) | (rows >= len(self.flags))
        missing = rows[outside] if outside.any() else rows[self.flags[rows] == EMPTY]
        if missing.size:
            raise UnknownHandleError(f"row {int(missing[0])} is not registered with the sampler: add() it first")

    def extras(self, row: int) -> RowExtras:
        """The rarely used parameters of a registered row."""
        return self._extras[row]

    def filters(self, rows: Int64Array) -> Filters:
        """The filter settings of some rows."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.typical_p[rows])

    @staticmethod
    def _flags(params: SamplingParams, extras: RowExtras) -> int:
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        edited = penalised or extras.bias_ids.size or extras.bad_words or extras.allowed_ids is not None or extras.processors
        edited = edited or (params.min_tokens > 0 and extras.stop_ids.size)
        flags = 0 if params.is_greedy else RANDOM
        flags |= EDITED if edited else 0
        flags |= LOGPROBS if params.logprobs is not None else 0
        return flags | (WARPED if extras.warpers and not params.is_greedy else 0)

    def _reserve(self, row: int) -> None:
        if row < 0:
            raise InvalidRequestError(f"row is {row}, it has to be at least 0")
        size = len(self.flags)
        if row < size:
            return
        grown = max(row + 1, 2 * size)
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                setattr(self, name, np.concatenate([array, np.zeros(grown - size, dtype=array.dtype)]))
        self.flags[size:] = EMPTY


def make_extras(
    params: SamplingParams,
    *,
    processors: Sequence[Processor],
    warpers: Sequence[Processor],
    eos_token_ids: Sequence[int],
    bad_words_token_ids: Sequence[Sequence[int]],
) -> RowExtras:
    """The parameters of one row that are lists, as arrays."""
    bias = params.logit_bias or {}
    words = dict.fromkeys(tuple(int(token) for token in word) for word in (*(params.bad_words_token_ids or ()), *bad_words_token_ids))
    stop_ids = dict.fromkeys((*eos_token_ids, *(params.stop_token_ids or ())))
    allowed = params.allowed_token_ids
    return RowExtras(
        bias_ids=np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
        bias_values=np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
        bad_words=tuple(np.asarray(word, dtype=np.int64) for word in words if word),
        stop_ids=np.asarray(list(stop_ids), dtype=np.int64),
        allowed_ids=None if allowed is None else np.asarray(allowed, dtype=np.int64),
        processors=tuple(processors),
        warpers=tuple(warpers),
    )
