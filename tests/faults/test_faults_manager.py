"""An exception at every line of the core while a manager lives: the state is before or after, or the manager says that it is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from faults_support import COMMANDS, Life, State, is_broken, state_of, undisturbed, until

import pagedkv.core
from pagedkv.core import BlockPool, KVCacheManager
from pagedkv.core.reservations import Reservations
from pagedkv.errors import InvariantError, OutOfBlocksError
from pagedkv.testing.faults import Fault, InjectedFaultError, Site, failing_calls, failing_lines

CORE = (pagedkv.core,)


def lines_of(number: int) -> list[Site]:
    """The lines that a command executes, in order."""
    life, fault = until(number), Fault()
    with failing_lines(CORE, fault):
        COMMANDS[number](life)
    return fault.sites


def points(*, every: bool) -> Iterator[tuple[int, int]]:
    """A command and which of its lines; every one, or each line of the code once in the command that reaches it first."""
    seen: set[Site] = set()
    for number in range(len(COMMANDS)):
        for index, site in enumerate(lines_of(number)):
            if every or site not in seen:
                seen.add(site)
                yield number, index


def strike(life: Life, number: int, index: int, before: State, *, persistent: bool) -> None:
    """Run a command into an exception at one of its lines; once more when it persists and nothing has changed."""
    for again in range(2 if persistent else 1):
        if again and (life.manager.table.change.depth or state_of(life.manager) != before):
            return
        with pytest.raises(InjectedFaultError), failing_lines(CORE, Fault(index)):
            COMMANDS[number](life)


def live_on(life: Life, number: int, want: Life, states: list[State]) -> str:
    """What came of a command that was struck; the rest of the life must be as it should be."""
    manager = life.manager
    if is_broken(manager.check):
        for refused in (lambda: manager.open([[1]]), lambda: manager.extend([], 1), lambda: manager.release([]), lambda: manager.purge()):
            with pytest.raises(InvariantError, match="was stopped in the middle of a command"):
                refused()
        return "declared broken"
    now = state_of(manager)
    assert now in (states[number], states[number + 1]), f"command {number}: neither before nor after"
    after = now != states[number]
    life.results += want.results[number : number + 1] if after else [COMMANDS[number](life)]
    for later in range(number + 1, len(COMMANDS)):
        life.results.append(COMMANDS[later](life))
    manager.check()
    assert state_of(manager) == states[-1]
    assert all(group.num_in_use == group.num_cached == 0 for group in manager.statistics().groups)
    return "after" if after else "before"


def live_until(life: Life, error: type[Exception]) -> int:
    """Run all commands, up to the one that raises; returns which that was."""
    for number, command in enumerate(COMMANDS):
        try:
            life.results.append(command(life))
        except error:
            return number
    return len(COMMANDS)


def try_all(*, every: bool, persistent: bool, stride: int = 1) -> Counter[str]:
    want, states = undisturbed()
    outcomes: Counter[str] = Counter()
    for number, index in islice(points(every=every), 0, None, stride):
        life = until(number)
        strike(life, number, index, states[number], persistent=persistent)
        try:
            outcomes[live_on(life, number, want, states)] += 1
        except AssertionError as error:
            error.add_note(f"exception at line {index} of command {number}: {lines_of(number)[index]}")
            raise
    return outcomes


def test_exception_at_every_third_line_of_the_core_leaves_a_state_before_or_after_or_a_manager_that_refuses() -> None:
    outcomes = try_all(every=False, persistent=False, stride=3)
    assert outcomes["before"] > 50
    assert outcomes["declared broken"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_exception_at_every_executed_line_of_the_core(persistent: bool) -> None:
    outcomes = try_all(every=True, persistent=persistent)
    print(f"\n{sum(outcomes.values())} points: {dict(outcomes)}")
    assert set(outcomes) <= {"before", "after", "declared broken"}


@pytest.mark.parametrize("persistent", [False, True])
def test_refused_allocation_changes_nothing(persistent: bool) -> None:
    want, states = undisturbed()
    tried = 0
    for at in range(1000):
        life = Life()
        fault = Fault(at, persistent=persistent, error=lambda: OutOfBlocksError(needed=1, available=0))
        with failing_calls(Reservations, "check_available", fault):
            number = live_until(life, OutOfBlocksError)
        if not fault.num_struck:
            break
        tried += 1
        assert live_on(life, number, want, states) == "before"
    assert tried > 5


def test_allocation_that_fails_after_it_was_promised_breaks_the_manager() -> None:
    want, states = undisturbed()
    tried = 0
    for at in range(1000):
        life, fault = Life(), Fault(at, error=lambda: MemoryError("no memory"))
        with failing_calls(BlockPool, "take", fault):
            number = live_until(life, MemoryError)
        if not fault.num_struck:
            break
        tried += 1
        assert live_on(life, number, want, states) == "declared broken"
    assert tried > 10


def test_broken_manager_refuses_every_command_and_a_new_one_works() -> None:
    life = until(5)
    with pytest.raises(MemoryError), failing_calls(BlockPool, "take", Fault(0, error=MemoryError)):
        COMMANDS[5](life)
    seq = int(life.opened(0)[0])
    manager = life.manager
    for command in (
        lambda: manager.open([[1]]),
        lambda: manager.extend([seq], 1),
        lambda: manager.extend([seq], [1]),
        lambda: manager.complete([seq]),
        lambda: manager.append([seq], [1]),
        lambda: manager.cancel([seq]),
        lambda: manager.fork(seq, 1),
        lambda: manager.truncate([seq], [1]),
        lambda: manager.release([seq]),
        lambda: manager.pin([1, 2]),
        lambda: manager.unpin(1),
        lambda: manager.purge(),
        lambda: manager.distrust([seq]),
        manager.check,
    ):
        with pytest.raises(InvariantError, match="the manager was stopped in the middle of a command"):
            command()
    fresh = KVCacheManager(num_blocks=10, block_size=2)
    assert fresh.extend(fresh.open([[1, 2, 3]]).seqs, [3]).slot_mapping.tolist() == [[2, 3, 4]]
