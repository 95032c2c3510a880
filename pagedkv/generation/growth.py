"""What one forward adds to the rows of a cache, as values. Owns nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagedkv.core import Extension
from pagedkv.plan import BoolArray, Int32Array, Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class NewColumns:
    """What one forward adds to a batch of ``R`` rows with ``C`` columns.

    Attributes:
        seen: ``[R, Q]`` bool, the new columns that are tokens; the others are padding and are not stored.
        token_ids: ``[R, Q]`` int64 from 0; None when tokens do not determine K and V (embeddings as input, say): nothing is shared then.
        may_skip: whether new rows may start behind a prefix that the manager has cached.
    """

    seen: BoolArray
    token_ids: Int64Array | None
    may_skip: bool


@dataclass(slots=True, eq=False)
class Growth:
    """Reserved slots for the new columns, until ``Rows.commit`` or ``Rows.cancel``; ``U`` sequences.

    Attributes:
        owner: ``[R]`` int64 each row's sequence.
        seqs: ``[U]`` int64 handles; 0 for a sequence without a token.
        leaders: ``[U]`` int64 a row of each sequence, which stands for all of its rows.
        stored: ``[U, C + Q]`` bool columns that have a place.
        lengths: ``[U]`` int64 stored tokens after the step.
        active: ``[A]`` int64 sequences that get tokens; those that compute one come first.
        computed: ``[A]`` int32 tokens that have to be computed and written.
        extension: slots of the ``T = computed.sum()`` tokens, sequence after sequence.
        token_rows: ``[T]`` int64 the row of each of them.
        token_columns: ``[T]`` int64 its new column.
    """

    owner: Int64Array
    seqs: Int64Array
    leaders: Int64Array
    stored: BoolArray
    lengths: Int64Array
    active: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    computed: Int32Array = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    extension: Extension | None = None
    token_rows: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    token_columns: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    added: list[int] = field(default_factory=list)
    before: dict[int, int] = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        """Columns after the step."""
        return int(self.stored.shape[1])
