"""Running a program step by step, with all tables shown after each operation."""

from __future__ import annotations

from collections.abc import Callable

from pagedkv.core import KVCacheManager, Snapshot
from pagedkv.testing.manager_driver import ManagerDriver
from pagedkv.testing.programs import Program
from pagedkv.testing.violations import ViolationError


def replay(
    program: Program, out: Callable[[str], object] = print, *, manager_factory: Callable[..., KVCacheManager] = KVCacheManager
) -> None:
    """Run a program with every check on, and say after each operation what the manager's tables hold.

    Args:
        program: what to run.
        out: takes one text after the other.
        manager_factory: makes the subject; see ``ManagerDriver``.

    Raises:
        ViolationError: a promise was broken; the tables were shown before.
    """
    driver = ManagerDriver(program.config, manager_factory=manager_factory)
    out(f"{program.config}")
    for number, operation in enumerate(program.operations):
        out(f"--- {number}: {operation}")
        try:
            performed = driver.run(operation)
        except ViolationError as error:
            out(tables(driver.manager.snapshot()))
            out(f"violation: {error}")
            error.add_note(f"operation {number} of {len(program.operations)}")
            raise
        out(tables(driver.manager.snapshot()) if performed else "passed over: it means nothing here")
    driver.close()
    out("--- all sequences and pins released: no block is held")


def tables(snapshot: Snapshot) -> str:
    """All tables of a manager in words: the blocks of each group with their references, then the sequences."""
    lines = []
    for index, group in enumerate(snapshot.statistics.groups):
        held = " ".join(f"{block}x{count}" for block, count in snapshot.references[index])
        lines.append(f"group {index}: {group.num_free} free, {group.num_evictable} evictable, {group.num_in_use} in use: {held or '-'}")
    return "\n".join([*lines, *map(str, snapshot.sequences)])
