"""Testing somebody's own block manager: random sessions that bite, oracles that need no knowledge of it, and failures in a few words.

``check_manager`` takes an adapter (``pagedkv.testing.adapters``) and draws what finds bugs: two tokens in the vocabulary, blocks of 1 to 4
tokens, pools at the edge of full, prompts cut from live sequences, sequences that end before their tokens are stored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pagedkv.errors import InvalidRequestError
from pagedkv.testing.adapter_driver import MISUSES, AdapterDriver, AdapterFactory, run_on_adapter
from pagedkv.testing.programs import Append, Complete, Fork, ManagerConfig, Misuse, Open, Operation, Program, Prompt, Release
from pagedkv.testing.shrink import shrink
from pagedkv.testing.violations import ViolationError

_SESSION_LENGTH = 200
_PICKS = 64  # places are counted modulo what is alive
_WEIGHTS = {"open": 16, "complete": 4, "append": 30, "fork": 4, "release": 8, "burst": 1, "misuse": 3}


@dataclass(frozen=True, slots=True)
class ManagerReport:
    """What a manager went through; it is there only if it broke no promise.

    Attributes:
        operations: performed.
        sessions: fresh managers.
        refusals: calls that were refused, each without a change.
        found_tokens: prompt tokens that were found in the cache: 0 means that sharing was never tested.
        seeds: of the first session and the last.
    """

    operations: int
    sessions: int
    refusals: int
    found_tokens: int
    seeds: tuple[int, int]


def check_manager(
    factory: AdapterFactory,
    *,
    seed: int = 0,
    num_operations: int = 10_000,
    namespaces: bool = False,
    block_sizes: Sequence[int] = (1, 2, 3, 4),
    max_num_blocks: int = 20,
    max_shrink_runs: int = 500,
) -> ManagerReport:
    """Run random sessions on fresh managers until so many operations were performed.

    After every operation: free and held blocks sum to the pool, no table holds a block twice, and every sequence reads through its table
    exactly what was stored for its own tokens in its own namespace.

    Args:
        factory: called with ``num_blocks`` and ``block_size`` for a fresh manager behind a ``ManagerAdapter``; forks are tried where it has
            ``fork`` and ``take_copies``.
        seed: of the first session; session ``i`` has ``seed + i``.
        num_operations: at least 1.
        namespaces: whether the manager keeps namespaces apart; one is used when not.
        block_sizes: to draw from.
        max_num_blocks: of the pools that are drawn, at least 4.
        max_shrink_runs: runs that may be spent on making a failure shorter.

    Raises:
        ViolationError: a promise was broken. ``program`` is the shortest sequence found; the notes tell it in words, with the seed.
        InvalidRequestError: a limit that cannot work.

    Cost: about 400 microseconds an operation, and what the manager takes.

    >>> from pagedkv.testing.adapters import PagedKVAdapter
    >>> report = check_manager(PagedKVAdapter, num_operations=300, namespaces=True)
    >>> report.refusals > 0 and report.found_tokens > 0
    True
    """
    if num_operations < 1 or max_num_blocks < 4 or not block_sizes or min(block_sizes) < 1:
        raise InvalidRequestError(
            f"num_operations {num_operations}, max_num_blocks {max_num_blocks} and block_sizes {tuple(block_sizes)}: at least 1, 4 and (1,)"
        )
    operations = refusals = found = number = 0
    while operations < num_operations:
        rng = random.Random(seed + number)
        config = ManagerConfig((rng.randint(4, max_num_blocks),), rng.choice(list(block_sizes)), rng.randint(2, 6))
        driver = _session(config, factory, _Drawer(rng, config, namespaces), seed + number, max_shrink_runs)
        operations += driver.num_operations
        refusals += driver.num_refusals
        found += driver.num_found_tokens
        number += 1
    return ManagerReport(operations, number, refusals, found, (seed, seed + number - 1))


def _session(config: ManagerConfig, factory: AdapterFactory, drawer: _Drawer, seed: int, max_shrink_runs: int) -> AdapterDriver:
    done: list[Operation] = []
    try:
        driver = AdapterDriver(config, factory)
        for _ in range(_SESSION_LENGTH):
            done.append(drawer.draw(driver))
            driver.run(done[-1])
        driver.close()
    except ViolationError as violation:
        raise _shortest(Program(config, tuple(done)), violation, factory, seed, max_shrink_runs) from violation.__cause__
    return driver


def _shortest(program: Program, violation: ViolationError, factory: AdapterFactory, seed: int, max_runs: int) -> ViolationError:
    """The same kind of violation from as few operations as were found, told in words."""

    def fails(candidate: Program) -> bool:
        found = run_on_adapter(candidate.config, candidate.operations, factory)[1]
        return found is not None and found.kind == violation.kind

    if fails(program):
        program = shrink(program, fails, max_runs=max_runs)
        words, again = run_on_adapter(program.config, program.operations, factory)
        violation = again if again is not None else violation
        violation.add_note("\n".join(words))
    else:
        violation.add_note("the same operations do not fail on a second manager: it depends on something outside")
    violation.add_note(f"seed {seed}")
    violation.program = program
    return violation


class _Drawer:
    """Draws operations for a session, which has habits of its own."""

    def __init__(self, rng: random.Random, config: ManagerConfig, namespaces: bool) -> None:
        self._rng, self._config, self._namespaces = rng, config, namespaces
        self._weights = [weight * rng.choice([0.2, 1, 1, 3]) for weight in _WEIGHTS.values()]

    def draw(self, driver: AdapterDriver) -> Operation:
        rng = self._rng
        if driver.has_pending and rng.random() < 0.6:
            return Complete((-1,))
        pick, vocabulary = rng.randrange(_PICKS), self._config.vocabulary
        match rng.choices(list(_WEIGHTS), self._weights)[0] if driver.num_live else "open":
            case "open":
                return Open((self._prompt(),))
            case "complete":
                return Complete((-1,))
            case "append":
                return Append(pick, rng.randrange(vocabulary))
            case "fork":
                return Fork(pick, 1)
            case "release":
                return Release((pick,))
            case "burst":
                return Release(tuple(range(_PICKS)))
            case _:
                return Misuse(rng.randrange(len(MISUSES)), pick)

    def _prompt(self) -> Prompt:
        rng = self._rng
        fresh = tuple(rng.randrange(self._config.vocabulary) for _ in range(rng.randint(1, 3 * self._config.block_size)))
        keep = rng.randrange(_PICKS) if rng.random() < 0.6 else 0
        return Prompt(fresh, rng.randrange(_PICKS), keep, rng.randrange(2) if self._namespaces else 0)
