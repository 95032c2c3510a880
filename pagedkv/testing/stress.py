"""Stress for a manager: random sessions, one after the other, every one from a seed of its own, until a budget is used up."""

from __future__ import annotations

import random
from collections.abc import Callable

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError
from pagedkv.testing.generators import OperationGenerator, random_config
from pagedkv.testing.manager_driver import ManagerDriver, run_program
from pagedkv.testing.programs import NAMES, Operation, Program
from pagedkv.testing.shrink import shrink
from pagedkv.testing.stress_report import Budget, Report, Tally
from pagedkv.testing.violations import ViolationError

SESSION_LENGTH = 300


def stress_manager(
    *,
    seed: int = 0,
    num_operations: int | None = None,
    seconds: float | None = None,
    num_blocks: int | None = None,
    block_size: int | None = None,
    check: str = "audit",
    on_progress: Callable[[Report], object] | None = None,
    manager_factory: Callable[..., KVCacheManager] = KVCacheManager,
    max_shrink_runs: int = 500,
) -> Report:
    """Run random sessions on fresh managers until a budget is used up.

    The time is looked at between sessions and decides nothing but when to stop: session ``i`` is the same for the same ``seed + i``.

    Args:
        seed: of the first session; the others count on from there.
        num_operations: stop after so many; 10,000 when neither budget is given.
        seconds: stop after so many.
        num_blocks: size of every pool, the null block included, at least 3; drawn for each session when not given.
        block_size: tokens in a block; drawn for each session when not given.
        check: how much is verified; see ``ManagerDriver``.
        on_progress: called after each session with the account so far.
        manager_factory: makes the managers; see ``ManagerDriver``.
        max_shrink_runs: runs that may be spent on making a failing program shorter.

    Returns:
        the account; reaching the end means that nothing was violated.

    Raises:
        InvalidRequestError: a budget or a size that cannot work.
        ViolationError: a promise was broken; ``program`` is the shortest program found, and notes name the seed and the operation.
    """
    for name, value, least in (("num_blocks", num_blocks, 3), ("block_size", block_size, 1)):
        if value is not None and value < least:
            raise InvalidRequestError(f"{name} is {value}: it must be at least {least}")
    budget, tally = Budget.of(num_operations, seconds, usual=10_000), Tally(seed)
    while True:
        left = SESSION_LENGTH if budget.operations is None else min(SESSION_LENGTH, budget.operations - tally.operations)
        _session(tally.next_seed(), left, tally, (num_blocks, block_size, check, manager_factory, max_shrink_runs))
        report = tally.report()
        if on_progress is not None:
            on_progress(report)
        if budget.used_up(report):
            return report


def _session(seed: int, length: int, tally: Tally, options: tuple[int | None, int | None, str, Callable[..., KVCacheManager], int]) -> None:
    num_blocks, block_size, check, factory, max_shrink_runs = options
    rng = random.Random(seed)
    config = random_config(rng, num_blocks=num_blocks, block_size=block_size)
    driver, operations = ManagerDriver(config, manager_factory=factory, check=check), OperationGenerator(rng, config)
    done: list[Operation] = []
    try:
        while driver.num_operations < length:
            operation = operations.draw(driver)
            done.append(operation)
            if driver.run(operation):
                tally.by_operation[NAMES[type(operation)]] += 1
                tally.peak_blocks = max(tally.peak_blocks, *(len(group.held) for group in driver.reference.groups))
        performed = driver.num_operations
        driver.close()
    except ViolationError as error:
        kind, message = error.kind, str(error)

        def fails(candidate: Program) -> bool:
            nonlocal message
            try:
                run_program(candidate, manager_factory=factory, check=check)
            except ViolationError as again:
                message = str(again) if again.kind == kind else message
                return again.kind == kind
            return False

        error.program = shrink(Program(config, tuple(done)), fails, max_runs=max_shrink_runs)
        error.add_note(f"seed {seed}, operation {driver.num_operations} of the session, {tally.operations + driver.num_operations} in all")
        error.add_note(f"{len(error.program.operations)} of {len(done)} operations are enough: {message}")
        raise
    tally.operations += performed
    tally.checks += driver.num_checks
    tally.refusals += driver.num_refusals
    tally.faults += getattr(driver.manager, "num_faults", 0)  # of ``FailingAllocations``
    account = driver.manager.statistics()
    tally.hit_tokens += account.num_hit_tokens
    tally.copies += account.num_copies
    tally.evictions += sum(group.num_evicted for group in account.groups)
