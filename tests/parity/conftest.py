"""Oracles made once, and the count of what was compared, printed at the end of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from parity_cases import all_cases
from parity_support import Oracle, make_oracle
from parity_workload import Sum

_SUM = pytest.StashKey[Sum]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUM] = Sum()


@pytest.fixture(scope="session")
def grid(pytestconfig: pytest.Config) -> Sum:
    return pytestconfig.stash[_SUM]


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[str], Oracle]:
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(name)
        return made[name]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash[_SUM].tally
    if tally.cases:
        terminalreporter.write_line(
            f"parity: {tally.cases} of {len(all_cases())} cases (model x block size x chunk x pressure), {tally.compared} greedy outputs "
            f"equal to generate's; {tally.steps} steps, {tally.preempted} preemptions, {tally.hits} tokens from the prefix cache, "
            f"{tally.copies} blocks copied before a write"
        )
