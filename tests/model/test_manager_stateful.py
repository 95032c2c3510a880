"""The manager as a Hypothesis state machine: shorter programs than the random ones, but a failing one is shrunk to its essence."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pagedkv.testing.manager_driver import ManagerDriver
from pagedkv.testing.programs import (
    Append,
    Cancel,
    Complete,
    Decode,
    Distrust,
    Extend,
    Fork,
    ManagerConfig,
    MatchPrefix,
    Misuse,
    Open,
    Operation,
    Pin,
    Prompt,
    Purge,
    Release,
    Truncate,
    Unpin,
)

PICK = st.integers(0, 7)
PICKS = st.lists(PICK, min_size=1, max_size=3).map(tuple)
TOKEN = st.integers(0, 1)
NEXT = st.lists(st.integers(-1, 1), min_size=1, max_size=3).map(tuple)
NAMESPACE = st.integers(0, 1)
PROMPT = st.builds(Prompt, st.lists(TOKEN, min_size=1, max_size=5).map(tuple), PICK, PICK, NAMESPACE)
BETWEEN = st.one_of(
    st.builds(Open, st.lists(PROMPT, min_size=1, max_size=2).map(tuple)),
    st.builds(Append, PICK, TOKEN),
    st.builds(Fork, PICK, st.integers(1, 2)),
    st.builds(Truncate, PICK, PICK),
    st.builds(Release, PICKS),
    st.builds(Pin, PICK, NAMESPACE),
    st.builds(Unpin, PICK),
    st.builds(Purge, NAMESPACE),
    st.builds(Distrust, PICKS),
    st.builds(MatchPrefix, PROMPT),
    st.builds(Misuse, st.integers(0, 11), PICK),
)

# Derandomised: the same programs in every run, so that a failure here is a change in the code.
COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    phases=[Phase.generate, Phase.shrink],
)


class ManagerMachine(RuleBasedStateMachine):
    """Opens, extends, forks and releases sequences of two tokens over a handful of blocks."""

    @initialize(
        num_blocks=st.lists(st.integers(2, 8), min_size=1, max_size=2),
        block_size=st.integers(1, 3),
        num_seqs=st.integers(1, 4),
        window=st.integers(-7, 9),
    )
    def start(self, num_blocks: list[int], block_size: int, num_seqs: int, window: int) -> None:
        """With two groups, the second may have a sliding window, or chunks where the number is below 0."""
        self.driver = ManagerDriver(ManagerConfig(tuple(num_blocks), block_size, num_seqs, windows=(0, window)[: len(num_blocks)]))

    @rule(operation=BETWEEN)
    def operate(self, operation: Operation) -> None:
        self.driver.run(operation)

    @precondition(lambda self: not self.driver.has_step)
    @rule(operation=st.one_of(st.builds(Extend, PICKS, PICKS), st.builds(Decode, NEXT, st.booleans())))
    def begin(self, operation: Operation) -> None:
        self.driver.run(operation)

    @precondition(lambda self: self.driver.has_step)
    @rule(operation=st.one_of(st.builds(Complete, NEXT, st.none() | PICK), st.builds(Cancel, st.booleans())))
    def end(self, operation: Operation) -> None:
        self.driver.run(operation)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.close()


def test_manager_state_machine_agrees_with_reference() -> None:
    run_state_machine_as_test(ManagerMachine, settings=settings(COMMON, max_examples=60, stateful_step_count=30))


@pytest.mark.slow
def test_manager_long_state_machine_agrees_with_reference() -> None:
    run_state_machine_as_test(ManagerMachine, settings=settings(COMMON, max_examples=500, stateful_step_count=60))
