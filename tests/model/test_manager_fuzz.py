"""The manager under random programs: audited, read back and compared with the reference after every operation."""

from __future__ import annotations

import pytest
from manager_driver import RandomRun


def run_seed(seed: int, num_operations: int) -> RandomRun:
    run = RandomRun(seed)
    try:
        run.operate(num_operations)
        run.driver.close()
    except Exception as error:
        error.add_note(f"seed {seed}, operation {run.driver.num_operations}, {run.driver.shape}")
        raise
    return run


def test_manager_random_programs_agree_with_reference() -> None:
    total = {"num_hit_tokens": 0, "num_deduplicated": 0, "num_copies": 0}
    evicted = steps_on = 0
    for seed in range(24):
        driver = run_seed(seed, 250).driver
        account = driver.manager.statistics()
        steps_on += driver.num_steps_on
        total = {name: count + getattr(account, name) for name, count in total.items()}
        evicted += sum(group.num_evicted for group in account.groups)
    reached = {**total, "evicted": evicted, "decode steps behind one another": steps_on}
    assert min(reached.values()) > 50, f"the programs do not reach what they are for: {reached}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_manager_long_random_program_agrees_with_reference(seed: int) -> None:
    run_seed(seed, 1500)
