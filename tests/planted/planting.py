"""How a bug is planted, and how many operations or steps the kit takes to find it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest

from pagedkv.models import ModelRunner
from pagedkv.testing.alone import GenerateAlone
from pagedkv.testing.generators import OperationGenerator, random_config
from pagedkv.testing.manager_driver import ORACLES, ManagerDriver
from pagedkv.testing.models import tiny_model
from pagedkv.testing.simulation import simulate_engine
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError

Plant = Callable[[pytest.MonkeyPatch], None]
MAX_PROGRAMS, PROGRAM_LENGTH = 25, 250
MAX_LIVES = 25


@dataclass(frozen=True)
class Kill:
    """How many operations (steps, where an engine was simulated) it took, and which oracle spoke."""

    operations: int
    kind: str


def changed(owner: type, name: str, make: Callable[..., object]) -> Plant:
    """Replace a method; ``make`` gets the right one and its arguments."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **options: make(right, *arguments, **options))

    return plant


def kill_with_programs(
    oracles: Sequence[str] = ORACLES, *, storage: Callable[[Sequence[int], int], TokenOracle] = TokenOracle, least_block_size: int = 1
) -> Kill | None:
    """Run random programs on the manager, one after the other, until the driver objects; None when it never does."""
    total = 0
    for seed in range(MAX_PROGRAMS):
        rng = random.Random(seed)
        config = random_config(rng)
        config = replace(config, block_size=max(config.block_size, least_block_size))
        driver, operations = ManagerDriver(config, oracles=oracles, storage_factory=storage), OperationGenerator(rng, config)
        try:
            while driver.num_operations < PROGRAM_LENGTH:
                driver.run(operations.draw(driver))
            driver.close()
        except ViolationError as error:
            return Kill(total + driver.num_operations + 1, error.kind)
        total += driver.num_operations
    return None


@cache
def transformer() -> tuple[ModelRunner, GenerateAlone]:
    """A tiny transformer, ready to be served, and what it generates alone."""
    model = tiny_model("llama", num_hidden_layers=1)
    return ModelRunner(model, block_size=4), GenerateAlone(model)


def kill_with_lives() -> Kill | None:
    """Simulate an engine over a tiny transformer, life after life, until a token is wrong or the books do not agree."""
    runner, alone = transformer()
    steps = 0
    for seed in range(MAX_LIVES):
        try:
            steps += simulate_engine(seed, runner, alone).num_steps
        except ViolationError as error:
            return Kill(steps + int(error.__notes__[-1].split("step ")[1].split(",")[0]), error.kind)
    return None
