"""Model x block size x chunk x pressure: greedy tokens equal transformers' own. ``-m "slow or not slow"`` runs the whole grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from parity_cases import BLOCK_SIZES, LARGE, PRESSURES, SAMPLE_SEED, Case, all_cases, budgets, sampled_cases
from parity_support import Oracle
from parity_workload import Sum, can_preempt, run_case

from pagedkv.testing.models import TINY_MODELS

SAMPLE = sampled_cases()


def _param(case: Case) -> object:
    return pytest.param(case, id=str(case), marks=() if case in SAMPLE else pytest.mark.slow)


@pytest.mark.parametrize("case", [_param(case) for case in all_cases()])
def test_greedy_tokens_in_a_cell_of_the_grid_equal_generate(case: Case, oracle_of: Callable[[str], Oracle], grid: Sum) -> None:
    tally = run_case(case, oracle_of(case.model))
    grid.tally += tally
    assert tally.compared >= 6
    if can_preempt(case):
        assert tally.preempted, f"{case} (seed {case.seed}): nothing was preempted, the case has lost its power"


def test_grid_has_every_combination_once() -> None:
    cases = all_cases()
    assert len(cases) == len(set(cases)) == 726
    assert len(cases) == len(TINY_MODELS) * len(PRESSURES) * sum(len(budgets(size)) for size in BLOCK_SIZES)
    assert [budgets(size) for size in BLOCK_SIZES] == [
        (1, 2, 7, LARGE),
        (1, 3, 4, 5, 7, LARGE),
        (1, 7, 15, 16, 17, LARGE),
        (1, 7, 63, 64, 65, LARGE),
    ]


def test_sample_takes_every_setting_often_enough() -> None:
    assert len(set(SAMPLE)) == len(SAMPLE) >= 60, f"seed {SAMPLE_SEED}"
    for setting, values, least in (("model", TINY_MODELS, 5), ("block_size", BLOCK_SIZES, 10), ("pressure", PRESSURES, 15)):
        counts = Counter(getattr(case, setting) for case in SAMPLE)
        assert all(counts[value] >= least for value in values), f"seed {SAMPLE_SEED}: {setting} {counts}"
    taken = {(case.block_size, case.budget) for case in SAMPLE}
    assert taken >= {(size, budget) for size in BLOCK_SIZES for budget in budgets(size)}, f"seed {SAMPLE_SEED}: {sorted(taken)}"
    assert sum(can_preempt(case) for case in SAMPLE) >= 30
