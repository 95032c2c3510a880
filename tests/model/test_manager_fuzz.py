"""The random programs reach what they are for: hits, duplicates, copies, evictions, decode steps behind one another."""

from __future__ import annotations

import random

from pagedkv.testing.generators import OperationGenerator, random_config
from pagedkv.testing.manager_driver import ManagerDriver


def test_manager_random_programs_reach_what_they_are_for() -> None:
    reached = {"num_hit_tokens": 0, "num_deduplicated": 0, "num_copies": 0, "evicted": 0, "decode steps behind one another": 0}
    for seed in range(24):
        rng = random.Random(seed)
        config = random_config(rng)
        driver, operations = ManagerDriver(config), OperationGenerator(rng, config)
        while driver.num_operations < 250:
            driver.run(operations.draw(driver))
        driver.close()
        account = driver.manager.statistics()
        for name in ("num_hit_tokens", "num_deduplicated", "num_copies"):
            reached[name] += getattr(account, name)
        reached["evicted"] += sum(group.num_evicted for group in account.groups)
        reached["decode steps behind one another"] += driver.num_decodes_on
    assert min(reached.values()) > 50, f"the programs do not reach what they are for: {reached}"
