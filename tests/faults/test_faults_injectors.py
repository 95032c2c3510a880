"""The injectors themselves: they strike where they are told to, and leave nothing behind."""

from __future__ import annotations

import doctest
import sys

import pytest

import pagedkv.core
from pagedkv.core import BlockPool
from pagedkv.testing import faults
from pagedkv.testing.faults import Fault, InjectedFaultError, failing_calls, failing_lines, fault_loop


def test_example_in_the_documentation_is_true() -> None:
    results = doctest.testmod(faults)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(("persistent", "want"), [(False, [1, "fault 1", 1]), (True, [1, "fault 1", "fault 1"])])
def test_calls_of_an_instance_fail_once_or_from_then_on_and_the_method_comes_back(persistent: bool, want: list[object]) -> None:
    pool, other, fault = BlockPool(9), BlockPool(9), Fault(1, persistent=persistent)
    got: list[object] = []
    with failing_calls(pool, "take", fault):
        for _ in range(3):
            try:
                got.append(len(pool.take(1).block_ids))
            except InjectedFaultError as error:
                got.append(str(error))
        other.take(1)
    assert got == want
    assert fault.count == 3, "another pool's calls are not counted"
    assert "take" not in vars(pool)
    pool.check()


def test_line_that_fails_does_not_run_and_tracing_is_as_before() -> None:
    pool, counting, before = BlockPool(9), Fault(), sys.gettrace()
    with failing_lines((pagedkv.core,), counting):
        pool.take(1)
    assert counting.count == len(counting.sites) > 5
    assert all("pagedkv/core" in file for file, _ in counting.sites)
    for at in range(counting.count):
        with pytest.raises(InjectedFaultError), failing_lines((pagedkv.core,), Fault(at)):
            pool.take(1)
    assert sys.gettrace() is before


def test_loop_without_an_end_is_told() -> None:
    def work(fault: Fault) -> None:
        fault.at = 0
        fault.event()

    with pytest.raises(RuntimeError, match="3 faults have struck"):
        list(fault_loop(work, most=3))
