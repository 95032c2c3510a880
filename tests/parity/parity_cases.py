"""The grid of the parity suite and the sample of it that every run takes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, product

from pagedkv.testing.models import TINY_MODELS

BLOCK_SIZES = (1, 4, 16, 64)
PRESSURES = ("roomy", "tight", "smallest")
LARGE = 512
SAMPLE_SEED = 20260201


@dataclass(frozen=True)
class Case:
    """One cell: which model, tokens in a block, tokens in a step, and how little memory."""

    model: str
    block_size: int
    budget: int
    pressure: str

    def __str__(self) -> str:
        return f"{self.model}-block{self.block_size}-budget{self.budget}-{self.pressure}"

    @property
    def seed(self) -> int:
        """Of everything that the cell leaves open: a function of its own name alone."""
        return random.Random(str(self)).getrandbits(32)


def budgets(block_size: int) -> tuple[int, ...]:
    """1, 7, one less than a block, a block, one more, and everything at once; without repeats."""
    return tuple(sorted({1, 7, block_size, block_size + 1, LARGE} | {block_size - 1} - {0}))


def all_cases() -> list[Case]:
    """The full product."""
    return [
        Case(model, block_size, budget, pressure)
        for model, block_size in product(TINY_MODELS, BLOCK_SIZES)
        for budget, pressure in product(budgets(block_size), PRESSURES)
    ]


def sampled_cases() -> list[Case]:
    """A fixed part of the product in which every pair of settings that the product knows occurs."""
    cases = all_cases()
    random.Random(SAMPLE_SEED).shuffle(cases)
    open_pairs = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while open_pairs:
        best = max(cases, key=lambda case: len(_pairs(case) & open_pairs))
        chosen.append(best)
        open_pairs -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
    settings = (("model", case.model), ("block size", case.block_size), ("budget", _kind(case)), ("pressure", case.pressure))
    return set(combinations(settings, 2))


def _kind(case: Case) -> object:
    """The budget by its relation to the block size, which is what matters, where it has one."""
    return {case.block_size - 1: "block - 1", case.block_size: "block", case.block_size + 1: "block + 1"}.get(case.budget, case.budget)
