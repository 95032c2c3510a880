"""Steps of a manager under test: begun, then completed or cancelled, on the manager, its reference and its storage alike.

Owns the step that waits for its forward pass; at most one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from pagedkv.core import Extension, KVCacheManager
from pagedkv.errors import OutOfBlocksError
from pagedkv.plan import Int64Array
from pagedkv.testing.judge import Judge
from pagedkv.testing.reference_manager import ReferenceManager
from pagedkv.testing.token_oracle import TokenOracle


@dataclass(slots=True)
class _Step:
    """An extension whose forward pass has not happened yet."""

    extension: Extension
    stamps: list[int]
    live: list[int]  # those that it may still complete


class Steps:
    """Begins and ends steps; answers are compared by the judge.

    Attributes:
        num_completed: steps completed.
        num_decodes_on: decode steps begun right behind one of the same sequences, which the manager takes its short way for.
    """

    def __init__(self, manager: KVCacheManager, reference: ReferenceManager, tokens: TokenOracle, judge: Judge) -> None:
        self.num_completed = self.num_decodes_on = 0
        self._manager, self._reference, self._tokens, self._judge = manager, reference, tokens, judge
        self._step: _Step | None = None
        # Decode steps pass one frozen array as long as they are of the same sequences, as a scheduler does: the manager recognises it.
        self._decoding: Int64Array = np.zeros(0, dtype=np.int64)

    @property
    def waiting(self) -> Sequence[int] | None:
        """Sequences of the waiting step, whose block copies may not have been made yet; None where no step waits."""
        return None if self._step is None else self._step.live

    def begin(self, handles: list[int], counts: list[int]) -> None:
        """Reserve slots for the next ``counts[i]`` tokens of each sequence; the step waits from now on, unless it was refused."""
        manager, seqs, agree = self._manager, self._reference.seqs, self._judge.agree
        starts = [seqs[handle].reserved for handle in handles]
        needed = manager.num_blocks_needed(handles, counts)
        try:
            expected = self._reference.extend(handles, counts)
        except OutOfBlocksError as refusal:
            error = self._judge.expect(OutOfBlocksError, lambda: manager.extend(handles, counts))
            agree("needed and available", vars(error), vars(refusal))
            return
        agree("blocks needed", needed, max(expected))
        extension = manager.extend(self._same_array(handles), 1) if set(counts) == {1} else manager.extend(handles, counts)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        stamps: list[int] = []
        positions: list[int] = []
        for handle, start, end in zip(handles, starts, ends, strict=True):
            stamps += self._tokens.stamps(seqs[handle].name, seqs[handle].tokens[:end])[start:]
            positions += range(start, end)
        agree("positions and lengths", [extension.positions.tolist(), extension.seq_lens.tolist()], [positions, ends])
        self._step = _Step(extension, stamps, list(handles))

    def complete(self, tokens: Sequence[int], only: int | None) -> bool:
        """Let the forward pass happen, and give its sequences their next tokens; False where no step waits."""
        step, self._step = self._step, None
        if step is None:
            return False
        self._tokens.copy_blocks(step.extension.copies)
        self._tokens.write(step.extension.slot_mapping.tolist(), step.stamps)
        done = step.live if only is None else step.live[: only % (len(step.live) + 1)]
        nexts = [self._admissible(handle, token) for handle, token in zip(done, cycle(tokens), strict=False)]
        self._manager.complete(self._decoding if done == self._decoding.tolist() else done, nexts)
        self._reference.complete(done, nexts)
        self.num_completed += 1
        if len(done) < len(step.live):
            self._undo(step.live[len(done) :])
        return True

    def decode(self, tokens: Sequence[int], *, joining: bool) -> bool:
        """A whole step of sequences that know just one token without a slot; False where there is none, or a step waits."""
        if self._step is not None:
            return False
        before = self._decoding.tolist()
        handles = [seq for seq, twin in self._reference.seqs.items() if twin.computed == twin.reserved == len(twin.tokens) - 1]
        if not joining and before and set(before) <= set(handles):
            handles = before
        if not handles:
            return False
        self.num_decodes_on += handles == before
        self.begin(handles, [1] * len(handles))
        self.complete(tokens, None)
        return True

    def cancel(self, *, copies_made: bool) -> bool:
        """Let the forward pass fail; False where no step waits."""
        step, self._step = self._step, None
        if step is None:
            return False
        if copies_made:
            self._tokens.copy_blocks(step.extension.copies)
        self._undo(step.live)
        return True

    def leave(self, handle: int) -> None:
        """A sequence is not completed with the waiting step any more."""
        if self._step is not None and handle in self._step.live:
            self._step.live.remove(handle)

    def _undo(self, handles: list[int]) -> None:
        self._manager.cancel(handles)
        self._reference.cancel(handles)

    def _admissible(self, handle: int, token: int) -> int:
        """A next token belongs behind the last known one only when all known ones are computed."""
        twin = self._reference.seqs[handle]
        return token if twin.reserved == len(twin.tokens) < self._manager.max_seq_len else -1

    def _same_array(self, handles: list[int]) -> Int64Array:
        if self._decoding.tolist() != handles:
            self._decoding = np.array(handles, dtype=np.int64)
            self._decoding.flags.writeable = False
        return self._decoding
