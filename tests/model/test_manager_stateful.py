"""The manager as a Hypothesis state machine: shorter programs than the random ones, but a failing one is shrunk to its essence."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from manager_driver import NAMES, ManagerDriver, Shape

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=7)
PICK = st.integers(0, 5)

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

    @initialize(num_blocks=st.lists(st.integers(2, 8), min_size=1, max_size=2), block_size=st.integers(1, 3), num_seqs=st.integers(1, 4))
    def start(self, num_blocks: list[int], block_size: int, num_seqs: int) -> None:
        self.driver = ManagerDriver(Shape(tuple(num_blocks), block_size, num_seqs))

    def seq(self, pick: int) -> int:
        return self.driver.live[pick % len(self.driver.live)]

    def has_live(self) -> bool:
        return bool(self.driver.live)

    def has_step(self) -> bool:
        return self.driver.step is not None

    @rule(prompt=TOKENS, name=st.sampled_from(NAMES))
    def open(self, prompt: list[int], name: str) -> None:
        self.driver.open([prompt], [name])

    @precondition(has_live)
    @rule(pick=PICK, length=st.integers(0, 7), rest=TOKENS, name=st.sampled_from(NAMES))
    def open_like(self, pick: int, length: int, rest: list[int], name: str) -> None:
        self.driver.open([self.driver.tokens(self.seq(pick))[:length] + rest], [name])

    @precondition(lambda self: self.has_live() and not self.has_step())
    @rule(first=PICK, width=st.integers(1, 4), count=st.integers(1, 7))
    def extend(self, first: int, width: int, count: int) -> None:
        live = self.driver.live
        around = [live[(first + place) % len(live)] for place in range(min(width, len(live)))]
        handles = [handle for handle in around if self.driver.unreserved(handle)]
        if handles:
            self.driver.begin(handles, [min(count, self.driver.unreserved(handle)) for handle in handles])

    @precondition(has_step)
    @rule(tokens=st.lists(st.integers(-1, 1), min_size=4, max_size=4), completing=st.none() | st.integers(0, 3))
    def run(self, tokens: list[int], completing: int | None) -> None:
        self.driver.run(tokens, completing=completing)

    @precondition(lambda self: self.has_live() and not self.has_step())
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4), steps=st.integers(1, 6))
    def decode(self, tokens: list[int], steps: int) -> None:
        for _ in range(steps):
            self.driver.decode(tokens)
            self.driver.verify()

    @precondition(has_step)
    @rule(copies_made=st.booleans())
    def fail(self, copies_made: bool) -> None:
        self.driver.fail(copies_made=copies_made)

    @precondition(has_live)
    @rule(pick=PICK, token=st.integers(0, 1))
    def append(self, pick: int, token: int) -> None:
        self.driver.append(self.seq(pick), token)

    @precondition(has_live)
    @rule(pick=PICK, count=st.integers(1, 2))
    def fork(self, pick: int, count: int) -> None:
        self.driver.fork(self.seq(pick), count)

    @precondition(has_live)
    @rule(pick=PICK, length=st.integers(1, 7))
    def truncate(self, pick: int, length: int) -> None:
        handle = self.seq(pick)
        self.driver.truncate(handle, min(length, len(self.driver.tokens(handle))))

    @precondition(has_live)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        self.driver.release([self.seq(pick)])

    @precondition(lambda self: len(self.driver.released) > 0)
    @rule(pick=PICK)
    def misuse(self, pick: int) -> None:
        self.driver.misuse(self.driver.released[-1 - pick % len(self.driver.released)])

    @precondition(has_live)
    @rule(pick=PICK, name=st.sampled_from(NAMES))
    def pin(self, pick: int, name: str) -> None:
        self.driver.pin(self.driver.tokens(self.seq(pick)), name)

    @precondition(lambda self: len(self.driver.model.pins) > 0)
    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        pins = list(self.driver.model.pins)
        self.driver.unpin(pins[pick % len(pins)])

    @rule(name=st.sampled_from(NAMES))
    def purge(self, name: str) -> None:
        self.driver.purge(name)

    @invariant()
    def agrees(self) -> None:
        self.driver.verify()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.close()


def test_manager_state_machine_agrees_with_reference() -> None:
    run_state_machine_as_test(ManagerMachine, settings=settings(COMMON, max_examples=60, stateful_step_count=30))


@pytest.mark.slow
def test_manager_long_state_machine_agrees_with_reference() -> None:
    run_state_machine_as_test(ManagerMachine, settings=settings(COMMON, max_examples=500, stateful_step_count=60))
