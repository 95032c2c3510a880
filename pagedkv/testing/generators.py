"""Random operations that bite: few tokens, small blocks, pools at the edge of full, prompts cut from live sequences.

Every session has habits of its own (some operations come often, some never), since what all sessions do alike hides what they never do.
"""

from __future__ import annotations

import random

from pagedkv.testing.manager_driver import ManagerDriver
from pagedkv.testing.programs import (
    Append,
    Cancel,
    Complete,
    Decode,
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

_PICKS = 64  # places are counted modulo what is alive
_WEIGHTS = {
    "open": 16,
    "extend": 18,
    "decode": 18,
    "append": 3,
    "fork": 7,
    "truncate": 6,
    "release": 7,
    "burst": 1,
    "pin": 2,
    "unpin": 2,
    "purge": 1,
    "match": 3,
    "misuse": 2,
}


def random_config(rng: random.Random, *, num_blocks: int | None = None, block_size: int | None = None) -> ManagerConfig:
    """Sizes for one session: 2 to 8 tokens in the vocabulary, blocks of 1 to 4, one or two layer groups; what is given is kept."""
    usual = rng.randint(3, 20) if num_blocks is None else num_blocks
    pools = rng.choice([(usual,), (usual,), (usual, usual), (usual, usual + 3), (usual + 3, usual)])
    return ManagerConfig(
        pools,
        block_size=rng.choice([1, 2, 3, 4]) if block_size is None else block_size,
        max_num_seqs=rng.randint(2, 6),
        prefix_caching=rng.random() < 0.92,
        vocabulary=rng.choice([2, 2, 3, 8]),
    )


class OperationGenerator:
    """Draws the next operation for a driver, from one generator of random numbers and nothing else."""

    def __init__(self, rng: random.Random, config: ManagerConfig) -> None:
        self._rng = rng
        self._config = config
        self._kinds = list(_WEIGHTS)
        self._weights = [weight * rng.choice([0.2, 1, 1, 3]) for weight in _WEIGHTS.values()]
        self._decodes_left = 0

    def draw(self, driver: ManagerDriver) -> Operation:
        """An operation that is likely to mean something in the driver's state."""
        rng = self._rng
        if driver.has_step and rng.random() < 0.7:
            return self._end_step()
        if self._decodes_left and not driver.has_step:
            self._decodes_left -= 1
            return Decode(self._tokens(0.03))
        if not driver.num_live:
            return self._open()
        return self._make(rng.choices(self._kinds, self._weights)[0])

    def _make(self, kind: str) -> Operation:
        rng = self._rng
        pick = rng.randrange(_PICKS)
        match kind:
            case "open":
                return self._open()
            case "extend":
                counts = (0,) if rng.random() < 0.4 else tuple(rng.randrange(_PICKS) for _ in range(3))
                return Extend(self._picks(), counts)
            case "decode":
                self._decodes_left = rng.randint(0, 3 * self._config.block_size)
                return Decode(self._tokens(0.03))
            case "append":
                return Append(pick, rng.randrange(self._config.vocabulary))
            case "fork":
                return Fork(pick, rng.choice([1, 1, 2]))
            case "truncate":
                return Truncate(pick, rng.randrange(_PICKS))
            case "release":
                return Release(self._picks())
            case "burst":
                return Release(tuple(range(_PICKS)))
            case "pin":
                return Pin(pick, self._namespace())
            case "unpin":
                return Unpin(pick)
            case "purge":
                return Purge(self._namespace())
            case "match":
                return MatchPrefix(self._prompt())
            case _:
                return Misuse(rng.randrange(_PICKS), pick)

    def _open(self) -> Open:
        return Open(tuple(self._prompt() for _ in range(self._rng.choice([1, 1, 1, 2]))))

    def _prompt(self) -> Prompt:
        rng = self._rng
        fresh = tuple(rng.randrange(self._config.vocabulary) for _ in range(rng.randint(1, 3 * self._config.block_size)))
        keep = rng.randrange(_PICKS) if rng.random() < 0.6 else 0
        return Prompt(fresh, rng.randrange(_PICKS), keep, self._namespace())

    def _namespace(self) -> int:
        return self._rng.randrange(2)

    def _picks(self) -> tuple[int, ...]:
        return tuple(self._rng.randrange(_PICKS) for _ in range(self._rng.randint(1, self._config.max_num_seqs)))

    def _tokens(self, none: float) -> tuple[int, ...]:
        rng = self._rng
        return tuple(-1 if rng.random() < none else rng.randrange(self._config.vocabulary) for _ in range(3))

    def _end_step(self) -> Operation:
        kind = self._rng.random()
        if kind < 0.15:
            return Cancel(copies_made=kind < 0.07)
        return Complete(self._tokens(0.2), None if kind < 0.9 else self._rng.randrange(_PICKS))
