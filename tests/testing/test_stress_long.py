"""200,000 audited operations, which CI runs whole."""

from __future__ import annotations

import pytest

from pagedkv.testing.stress import stress_manager

PARTS, OPERATIONS = 10, 20_000


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_manager_survives_audited_operations(part: int) -> None:
    report = stress_manager(seed=1_000_000 * (part + 1), num_operations=OPERATIONS)
    print(f"{report.operations:,} audited operations, {report.checks:,} checks, {report.refusals:,} refusals, seeds {report.seeds}")
    assert report.operations == OPERATIONS
    assert report.checks >= OPERATIONS
