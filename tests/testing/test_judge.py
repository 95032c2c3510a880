"""What the judge says of managers that are wrong in ways that no oracle but it can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pagedkv.core import KVCacheManager, Snapshot
from pagedkv.plan import Int32Array, Int64Array
from pagedkv.testing.manager_driver import ManagerDriver, run_program
from pagedkv.testing.misuse import misuse
from pagedkv.testing.programs import ManagerConfig, Misuse, Open, Program, Prompt
from pagedkv.testing.violations import ViolationError

CONFIG = ManagerConfig((9,), 2, 4)
OPENING = Open((Prompt((1, 0, 1)),))
TRUNCATE_TO_NOTHING = 8


class ChangesBeforeItRefuses(KVCacheManager):
    """A token is gone by the time that the command is refused."""

    def truncate(self, seqs: Sequence[int] | Int64Array, num_tokens: Sequence[int] | Int32Array) -> None:
        super().append(seqs, [0])
        super().truncate(seqs, num_tokens)


class HidesASequence(KVCacheManager):
    """The account is one sequence short."""

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        return replace(snapshot, sequences=snapshot.sequences[1:])


@pytest.mark.parametrize("check", ["off", "step", "audit"])
def test_refusal_after_a_change_is_seen_at_every_level(check: str) -> None:
    program = Program(CONFIG, (OPENING, OPENING, Misuse(TRUNCATE_TO_NOTHING, 0)))
    run_program(program, check=check)
    with pytest.raises(ViolationError, match="refusal: InvalidRequestError was raised after a change"):
        run_program(program, manager_factory=ChangesBeforeItRefuses, check=check)


def test_sequence_missing_from_the_account_is_seen() -> None:
    with pytest.raises(ViolationError, match="reference: live sequences"):
        run_program(Program(CONFIG, (OPENING,)), manager_factory=HidesASequence)


def test_every_misuse_is_refused_without_a_trace() -> None:
    driver = ManagerDriver(CONFIG)
    manager = driver.manager
    gone, live = manager.open([[1], [2]]).seqs.tolist()
    manager.release([gone])
    before = manager.snapshot()
    seen = set()
    for kind in range(24):
        for pick in range(6):
            error, call = misuse(manager, kind, pick, live=[live], released=[gone])
            seen.add((kind % 12, error))
            with pytest.raises(error):
                call()
            assert manager.snapshot() == before
    assert len({kind for kind, _ in seen}) == 12
    assert len({error for _, error in seen}) == 3
