"""A model without weights: its next token is a hash of the K/V history that it reads back through the block tables.

Each slot holds one integer, the stamp of (namespace, position, token). A stale, missing, moved or foreign slot changes the stamps that are
read, and so the token. Owns no bookkeeping; torch is imported only where the ``Engine`` wants tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pagedkv.core import Window
from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int32Array, Int64Array, StepPlan

if TYPE_CHECKING:
    import torch

    from pagedkv.storage import StepBatch

_UInt64Array = npt.NDArray[np.uint64]
_NUM_CANDIDATES = 4
_POISON = np.uint64(2**64 - 1)
_FIELD = 2**24


def _mix(values: _UInt64Array) -> _UInt64Array:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the input changes half of the output's."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def stamps(namespaces: Int64Array, positions: Int32Array | Int64Array, token_ids: Int32Array | Int64Array) -> _UInt64Array:
    """``[n]`` one number for each (namespace number, position, token); each of them below 2**24."""
    wide = (namespaces.astype(np.int64) * _FIELD + positions) * 2**16 + token_ids
    return _mix(wide.astype(np.uint64))


def next_candidates(history: _UInt64Array, vocab_size: int) -> list[int]:
    """Token ids that may follow these stamps, the likeliest first; all of them depend on every stamp and its place."""
    places = np.arange(1, len(history) + 1, dtype=np.uint64)
    state = _mix(history ^ _mix(places)).sum(dtype=np.uint64)
    found = _mix(state + np.arange(_NUM_CANDIDATES, dtype=np.uint64)) % np.uint64(vocab_size)
    return [int(token) for token in found]


def first_seen(window: Window | None, position: int) -> int:
    """The first position that one sees through a window."""
    if window is None:
        return 0
    return max(position - window.size + 1, 0) if window.kind == "sliding" else position - position % window.size


def continuation(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    vocab_size: int,
    namespace: int = 0,
    windows: Sequence[Window | None] = (None,),
    stops: Sequence[int] = (),
    min_tokens: int = 0,
) -> list[int]:
    """The greedy tokens behind a prompt by the prompt alone, no blocks, no tables; none of the first ``min_tokens`` is one of the stops.

    >>> continuation([1, 2, 3], 4, vocab_size=61) == continuation([1, 2, 3], 4, vocab_size=61)
    True
    >>> continuation([1, 2, 3], 4, vocab_size=61) == continuation([1, 2, 3], 4, vocab_size=61, namespace=1)
    False
    """
    tokens = list(prompt)
    for count in range(max_tokens):
        known = np.array(tokens, dtype=np.int64)
        history = stamps(np.full(len(known), namespace), np.arange(len(known)), known)
        seen = np.concatenate([history[first_seen(window, len(known) - 1) :] for window in windows])
        banned = stops if count < min_tokens else ()
        tokens.append(next(token for token in (*next_candidates(seen, vocab_size), *range(vocab_size)) if token not in banned))
    return tokens[len(prompt) :]


class HashStorage:
    """One stamp a slot, for each layer group ``[num_blocks, block_size]``; fresh and filled blocks hold what no token has for a stamp."""

    def __init__(self, num_blocks: Sequence[int], block_size: int) -> None:
        self.state: None = None  # stamps are all there is
        self.slots: list[_UInt64Array] = [np.full((count, block_size), _POISON, dtype=np.uint64) for count in num_blocks]

    @property
    def nbytes(self) -> int:
        """Bytes of the stamps."""
        return sum(slots.nbytes for slots in self.slots)

    def copy_blocks(self, copies: Sequence[Int32Array]) -> None:
        """As ``KVStorage.copy_blocks``."""
        for slots, pairs in zip(self.slots, copies, strict=True):
            slots[pairs[:, 1]] = slots[pairs[:, 0]]

    def fill(self, block_ids: Sequence[int] | Int32Array, value: float, *, group: int = 0) -> None:
        """Make whole blocks unreadable, whatever the value."""
        self.slots[group][np.asarray(block_ids, dtype=np.int64)] = _POISON

    def close(self) -> None:
        """Nothing to give back."""


class HashModel:
    """What an ``Engine`` needs of a ``ModelRunner``, over stamps.

    The logits of a token are finite: 3.0, 2.5, 2.0 and 1.5 for the four candidates that its history gives, and -10,000 for all others.

    Args:
        block_size: tokens in a block.
        vocab_size: token ids; many make it likely that a wrong history shows at once.
        max_positions: longest sequence.
        namespaces_of: ``[S]`` int64 namespace numbers of a plan's sequences; all 0 when not given.
        windows: how far back each of its layer groups looks; the first one always sees everything.

    Raises:
        InvalidRequestError: a vocabulary or a length that stamps do not cover.
    """

    def __init__(
        self,
        *,
        block_size: int = 4,
        vocab_size: int = 61,
        max_positions: int = 4096,
        namespaces_of: Callable[[StepPlan], Int64Array] | None = None,
        windows: Sequence[Window | None] = (None,),
    ) -> None:
        if not 1 <= vocab_size <= 2**16 or not 1 <= max_positions < _FIELD:
            raise InvalidRequestError(
                f"vocab_size {vocab_size} must be from 1 to 2**16, max_positions {max_positions} from 1 to below 2**24"
            )
        self.block_size = block_size
        self.vocab_size = self.num_token_ids = vocab_size
        self.max_positions = max_positions
        self.max_positions_reason: str | None = None
        self.far_positions: int | None = None
        self.encoder = None
        self.eos_token_ids: tuple[int, ...] = ()
        self.recurrent_state = "none"
        self.windows = tuple(windows)
        self.group_nbytes = (8 * block_size,) * len(self.windows)
        self.device = "cpu"
        self.namespaces_of = namespaces_of

    def new_storage(self, num_blocks: int | Sequence[int], *, num_rows: int | None = None) -> HashStorage:
        """Stamps for so many blocks, in each group or of each group."""
        return HashStorage([num_blocks] * len(self.windows) if isinstance(num_blocks, int) else num_blocks, self.block_size)

    def altered(self) -> bool:
        """Never."""
        return False

    def write(self, plan: StepPlan, storage: HashStorage) -> None:
        """Stamp the step's tokens into their slots; ``O(T)``."""
        names = np.zeros(plan.num_seqs, dtype=np.int64) if self.namespaces_of is None else self.namespaces_of(plan)
        owners = np.repeat(names, plan.query_lens)
        for slots, places in zip(storage.slots, plan.slot_mapping, strict=True):
            slots.reshape(-1)[places] = stamps(owners, plan.positions, plan.token_ids)

    def candidates(self, plan: StepPlan, storage: HashStorage) -> list[list[int]]:
        """For each wanted logit the candidates by the history up to its token, read through the block tables; ``O(history)`` each."""
        ends = np.repeat(plan.cu_seqlens_q[1:], plan.query_lens)
        owners = np.repeat(np.arange(plan.num_seqs), plan.query_lens)
        found = []
        for token in plan.logits_indices.tolist():
            seq = int(owners[token])
            length = int(plan.seq_lens[seq]) - (int(ends[token]) - 1 - token)
            tables = plan.block_tables[:, plan.rows[seq], : -(-length // self.block_size)]
            seen = [
                slots[table].reshape(-1)[first_seen(window, length - 1) : length]
                for slots, table, window in zip(storage.slots, tables, self.windows, strict=True)
            ]
            found.append(next_candidates(np.concatenate(seen), self.vocab_size))
        return found

    def forward(self, batch: StepBatch, storage: HashStorage) -> torch.Tensor:
        """As ``ModelRunner.forward``: ``[K, V]`` float32."""
        import torch

        self.write(batch.plan, storage)
        logits = np.full((len(batch.plan.logits_indices), self.vocab_size), -1e4, dtype=np.float32)
        for row, tokens in zip(logits, self.candidates(batch.plan, storage), strict=True):
            for rank in reversed(range(len(tokens))):  # of equal candidates, the likelier counts
                row[tokens[rank]] = 3.0 - 0.5 * rank
        return torch.from_numpy(logits)
