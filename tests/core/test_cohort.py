"""Sequences that decode together, told by one frozen array of handles: the same figures as when each step is looked up anew."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv.core import Extension, KVCacheManager, LeastRecentlyUsed
from pagedkv.errors import InvalidRequestError, InvariantError, OutOfBlocksError
from pagedkv.plan import Int32Array, Int64Array

PROMPTS = ([1, 2, 3, 4, 5], [1, 2, 3], [9], [1, 2, 3, 4, 5, 6, 7])


class Twins:
    """Two managers with the same sequences; one always gets the same frozen array, the other a new list each time."""

    def __init__(self, num_blocks: int | list[int] = 64, *, caching: bool = True, max_seq_len: int = 40) -> None:
        self.managers = [
            KVCacheManager(num_blocks=num_blocks, block_size=4, max_num_seqs=8, max_seq_len=max_seq_len, enable_prefix_caching=caching)
            for _ in range(2)
        ]
        for manager in self.managers:
            seqs = manager.open(PROMPTS, ["", "", "other", ""]).seqs
            manager.extend(seqs, [len(prompt) for prompt in PROMPTS])
            manager.complete(seqs, [7, 7, 7, 7])
        self.frozen: Int64Array = seqs
        self.frozen.flags.writeable = False

    @property
    def arguments(self) -> list[tuple[KVCacheManager, Int64Array | list[int]]]:
        return list(zip(self.managers, (self.frozen, self.frozen.tolist()), strict=True))

    def extend(self) -> Extension:
        one, other = (manager.extend(seqs, 1) for manager, seqs in self.arguments)
        assert one.slot_mapping.tolist() == other.slot_mapping.tolist()
        assert one.positions.tolist() == other.positions.tolist()
        assert one.seq_lens.tolist() == other.seq_lens.tolist()
        assert [copies.tolist() for copies in one.copies] == [copies.tolist() for copies in other.copies]
        self.compare()
        return one

    def complete(self, *tokens: int) -> None:
        for manager, seqs in self.arguments:
            manager.complete(seqs, np.array(tokens, dtype=np.int32))
        self.compare()

    def steps(self, count: int, *tokens: int) -> None:
        for _ in range(count):
            self.extend()
            self.complete(*tokens)

    def compare(self) -> None:
        one, other = self.managers
        one.check()
        assert one.snapshot() == other.snapshot()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_blocks", [64, [64, 70]])
def test_cohort_over_many_blocks_equals_single_steps(num_blocks: int | list[int], caching: bool) -> None:
    twins = Twins(num_blocks, caching=caching)
    twins.steps(25, 3, 4, 5, 6)
    assert (twins.managers[0].match([1, 2, 3, 4, 5, 7, *[3] * 12]).num_tokens >= 16) == caching


def test_cohort_of_twins_shares_the_blocks_they_fill() -> None:
    twins = Twins()
    for manager, seqs in twins.arguments:
        manager.truncate(seqs, [1, 1, 1, 1])
        manager.append(seqs, [2, 2, 2, 2])
    before = twins.managers[0].statistics().num_deduplicated
    twins.steps(12, 3, 3, 3, 3)
    assert twins.managers[0].statistics().num_deduplicated > before


def test_cohort_with_a_token_that_could_not_be_sampled_goes_on_without_it() -> None:
    twins = Twins()
    twins.steps(3, 3, 4, 5, 6)
    twins.extend()
    twins.complete(3, -1, 5, 6)
    for manager, seqs in twins.arguments:
        with pytest.raises(InvalidRequestError, match="cannot reserve 1 tokens"):
            manager.extend(seqs, 1)
        manager.append(seqs[1:2], [8])
    twins.steps(4, 3, 4, 5, 6)


def test_cohort_with_a_token_out_of_range_is_refused_and_changes_nothing() -> None:
    twins = Twins()
    twins.steps(3, 3, 4, 5, 6)
    twins.extend()
    for manager, seqs in twins.arguments:
        with pytest.raises(InvalidRequestError, match=r"^next_token_ids: expected 4 integers, one for each sequence, got 3$"):
            manager.complete(seqs, [3, 5, 6])
        with pytest.raises(InvalidRequestError, match="token id -2 is below 0"):
            manager.complete(seqs, [3, -2, 5, 6])
    twins.compare()
    twins.complete(3, 4, 5, 6)
    twins.steps(4, 3, 4, 5, 6)


def test_cohort_extended_twice_is_refused_and_changes_nothing() -> None:
    twins = Twins()
    twins.steps(3, 3, 4, 5, 6)
    twins.extend()
    for manager, seqs in twins.arguments:
        with pytest.raises(InvalidRequestError, match="cannot reserve 1 tokens"):
            manager.extend(seqs, 1)
    twins.compare()
    twins.complete(3, 4, 5, 6)


def test_cohort_up_to_the_longest_sequence_is_refused_as_any_other() -> None:
    twins = Twins(max_seq_len=14)
    twins.steps(6, 3, 4, 5, 6)
    twins.extend()
    for manager, seqs in twins.arguments:
        with pytest.raises(InvalidRequestError, match="has reached max_seq_len, 14 tokens"):
            manager.complete(seqs, [3, 4, 5, 6])
        manager.complete(seqs, [3, 4, 5, -1])
    twins.compare()


def test_cohort_that_outgrows_the_tables_columns_goes_on() -> None:
    twins = Twins(400, max_seq_len=300)
    twins.steps(150, 3, 4, 5, 6)


@pytest.mark.parametrize("num_blocks", [12, [12, 64], [64, 12]])
def test_cohort_without_enough_blocks_is_refused_whole(num_blocks: int | list[int]) -> None:
    twins = Twins(num_blocks)
    with pytest.raises(OutOfBlocksError):
        twins.steps(20, 3, 4, 5, 6)
    for manager, seqs in twins.arguments[1:]:
        with pytest.raises(OutOfBlocksError):
            manager.extend(seqs, 1)
    twins.compare()


def test_cohort_cancelled_forked_or_purged_between_steps_is_looked_up_anew() -> None:
    twins = Twins()
    twins.steps(3, 3, 4, 5, 6)
    twins.extend()
    for manager, seqs in twins.arguments:
        manager.cancel(seqs)
    twins.compare()
    twins.steps(5, 3, 4, 5, 6)
    for manager, seqs in twins.arguments:
        manager.fork(int(seqs[0]), 2)
    twins.steps(5, 3, 4, 5, 6)
    for manager, _ in twins.arguments:
        assert manager.purge("") > 0
    twins.steps(9, 3, 4, 5, 6)
    assert twins.managers[0].match([1, 2, 3, 4, 5]).num_tokens == 0


@pytest.mark.parametrize("prompts", [[[1, 2], [4, 5]], [[1, 2, 3], [4, 5, 6, 7]]], ids=["alike", "of different lengths"])
def test_frozen_handles_of_sequences_that_know_tokens_ahead_keep_them(prompts: list[list[int]]) -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, max_num_seqs=2)
    seqs = manager.open(prompts).seqs
    seqs.flags.writeable = False
    for number in range(1, 4):
        manager.rows_of(seqs)
        assert manager.extend(seqs, 1).seq_lens.tolist() == [number, number]
        manager.complete(seqs, [8, 9])
        manager.check()
    expected = [(*prompt, *[token] * 3) for prompt, token in zip(prompts, (8, 9), strict=True)]
    assert [each.token_ids for each in manager.snapshot().sequences] == expected


def test_extension_of_a_cohort_stays_as_it_was_given() -> None:
    twins = Twins()
    twins.steps(2, 3, 4, 5, 6)
    extension = twins.extend()
    taken = [extension.slot_mapping.tolist(), extension.positions.tolist(), extension.seq_lens.tolist()]
    twins.complete(3, 4, 5, 6)
    twins.steps(6, 3, 4, 5, 6)
    assert [extension.slot_mapping.tolist(), extension.positions.tolist(), extension.seq_lens.tolist()] == taken
    assert not any(array.flags.writeable for array in (extension.slot_mapping, extension.positions, extension.seq_lens))


def test_table_of_a_single_cell_decodes() -> None:
    manager = KVCacheManager(num_blocks=2, block_size=2, max_num_seqs=1)
    seqs = manager.open([[0]]).seqs
    manager.extend(seqs, 1)
    manager.cancel(seqs)
    seqs.flags.writeable = False
    manager.rows_of(seqs)  # recognised from now on
    assert manager.extend(seqs, 1).slot_mapping.tolist() == [[2]]
    manager.complete(seqs, [1])
    assert manager.extend(seqs, 1).slot_mapping.tolist() == [[3]]
    manager.check()


class Stopping(LeastRecentlyUsed):
    """A policy that raises at its next change when told to: the command is stopped in the middle."""

    stops = False

    def insert(self, block_ids: Int32Array) -> None:
        self._stop()
        super().insert(block_ids)

    def remove(self, block_ids: Int32Array) -> None:
        self._stop()
        super().remove(block_ids)

    def _stop(self) -> None:
        if Stopping.stops:
            raise RuntimeError("not today")


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_cohort_of_a_manager_that_was_stopped_in_the_middle_is_refused_as_well(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, max_num_seqs=2, policy=Stopping)
    seqs = manager.open([[1, 2, 3, 4, 5], [6]]).seqs
    manager.extend(seqs, [5, 1])
    manager.complete(seqs, [7, 7])
    manager.release(seqs[:1])
    pin, _ = manager.pin([1, 2, 3, 4]) if command == "unpin" else (0, 0)
    frozen = seqs[1:].copy()
    frozen.flags.writeable = False
    for _ in range(2):
        manager.rows_of(frozen)
        manager.extend(frozen, 1)
        manager.complete(frozen, [8])
    manager.extend(frozen, 1)
    monkeypatch.setattr(Stopping, "stops", True)
    with pytest.raises(RuntimeError, match="not today"):
        manager.pin([1, 2, 3, 4]) if command == "pin" else manager.unpin(pin)
    for refused in (lambda: manager.complete(frozen, [8]), manager.check):
        with pytest.raises(InvariantError, match=r"^the manager was stopped in the middle .* cannot be trusted, make a new one$"):
            refused()
