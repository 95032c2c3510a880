"""Random operations that bite: few tokens, small blocks, pools at the edge of full, prompts cut from live sequences.

Every session has habits of its own (some operations come often, some never), since what all sessions do alike hides what they never do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

from pagedkv.testing.manager_driver import ManagerDriver
from pagedkv.testing.programs import (
    NAMESPACES,
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
from pagedkv.testing.reference_sequence import Twin

_PICKS = 64  # places are counted modulo what is alive
_WEIGHTS = {
    "open": 14,
    "extend": 16,
    "decode": 18,
    "append": 4,
    "fork": 9,
    "truncate": 7,
    "release": 4,
    "burst": 1,
    "pin": 2,
    "unpin": 2,
    "purge": 1,
    "distrust": 1,
    "match": 3,
    "misuse": 2,
}
_MAKING_ROOM = ("release", "truncate", "unpin")


def random_config(rng: random.Random, *, num_blocks: int | None = None, block_size: int | None = None) -> ManagerConfig:
    """Sizes for one session: 2 to 8 tokens in the vocabulary, blocks of 1 to 4, one to three layer groups, of which some have windows;
    what is given is kept."""
    usual = rng.randint(3, 20) if num_blocks is None else num_blocks
    pools = rng.choice([(usual,), (usual,), (usual, usual), (usual, usual + 3), (usual + 3, usual)])
    config = ManagerConfig(
        pools,
        block_size=rng.choice([1, 2, 2, 3, 4]) if block_size is None else block_size,
        max_num_seqs=rng.randint(2, 6),
        prefix_caching=rng.random() < 0.92,
        vocabulary=rng.choice([2, 2, 3, 8]),
    )
    return _with_windows(config, rng, tight=num_blocks is None) if len(pools) > 1 and rng.random() < 0.7 else config


def _with_windows(config: ManagerConfig, rng: random.Random, *, tight: bool) -> ManagerConfig:
    """The same with windows for all groups but the first; their pools may be smaller, as their sequences hold less."""
    count = rng.choice([1, 1, 2])
    windows = [rng.choice([1, -1]) * rng.randint(1, 3 * config.block_size + 1) for _ in range(count)]
    pools = [max(3, config.num_blocks[1] // rng.choice([1, 2])) if tight else config.num_blocks[1] for _ in range(count)]
    return replace(config, num_blocks=(config.num_blocks[0], *pools), windows=(0, *windows))


class OperationGenerator:
    """Draws the next operation for a driver, from one generator of random numbers and nothing else.

    Three habits make sessions go deep: behind a command that was refused, room is likely to be made, so that a pool stays at the edge of
    full; decode steps come in runs, with other commands in between that the run may have to notice; and commands are aimed at the sequences
    that they mean most to, as forks are at those whose last block is half full.
    """

    def __init__(self, rng: random.Random, config: ManagerConfig) -> None:
        self._rng = rng
        self._config = config
        self._kinds = list(_WEIGHTS)
        self._cum_weights = list(accumulate(weight * rng.choice([0.2, 1, 1, 3]) for weight in _WEIGHTS.values()))
        self._twins: list[Twin] = []
        self._num_refusals = 0
        self._decodes_left, self._joining = 0, True

    def draw(self, driver: ManagerDriver) -> Operation:
        """An operation that is likely to mean something in the driver's state."""
        rng = self._rng
        self._twins = list(driver.reference.seqs.values())
        was_refused, self._num_refusals = driver.num_refusals > self._num_refusals, driver.num_refusals
        if driver.has_step and rng.random() < 0.7:
            return self._end_step()
        if not self._twins:
            return self._open()
        if was_refused and rng.random() < 0.5:
            return self._make(rng.choice(_MAKING_ROOM))
        if self._decodes_left and not driver.has_step:
            self._decodes_left -= 1
            if any(map(_is_idle, self._twins)) and rng.random() < 0.4:
                return self._make("append")
            if rng.random() < 0.7:
                return Decode(self._tokens(0.03), self._joining)
        return self._make(rng.choices(self._kinds, cum_weights=self._cum_weights)[0])

    def _make(self, kind: str) -> Operation:
        rng = self._rng
        pick = rng.randrange(_PICKS)
        match kind:
            case "open":
                return self._open()
            case "extend":
                counts = (0,) if rng.random() < 0.4 else tuple(rng.randrange(_PICKS) for _ in range(3))
                return Extend((self._aim(self._has_half_full_block), *self._picks()), counts)
            case "decode":
                self._decodes_left = rng.randint(0, 4 * self._config.block_size)
                self._joining = rng.random() < 0.5
                return Decode(self._tokens(0.03), self._joining)
            case "append":
                return Append(self._aim(_is_idle), rng.randrange(self._config.vocabulary))
            case "fork":
                return Fork(self._aim(self._has_half_full_block), rng.choice([1, 1, 2]))
            case "truncate":
                few = rng.randint(1, self._config.block_size)
                return Truncate(pick, -1 - few if rng.random() < 0.5 else rng.randrange(_PICKS))
            case "release":
                return Release((pick, *self._picks()))
            case "burst":
                return Release(tuple(range(_PICKS)))
            case "pin":
                return Pin(pick, self._namespace())
            case "unpin":
                return Unpin(pick)
            case "purge":
                return Purge(self._namespace())
            case "distrust":
                return Distrust((pick, *self._picks()))
            case "match":
                return MatchPrefix(self._prompt())
            case _:
                return Misuse(rng.randrange(_PICKS), pick)

    def _open(self) -> Open:
        return Open(tuple(self._prompt() for _ in range(self._rng.choice([1, 1, 1, 2]))))

    def _prompt(self) -> Prompt:
        rng, size = self._rng, self._config.block_size
        fresh = tuple(rng.randrange(self._config.vocabulary) for _ in range(rng.randint(1, 2 * size)))
        if not self._twins or rng.random() < 0.3:
            return Prompt(fresh, namespace=self._namespace())
        place = self._aim(lambda twin: twin.computed >= size) % len(self._twins)
        namespace = NAMESPACES.index(self._twins[place].name) if rng.random() < 0.7 else self._namespace()
        return Prompt(fresh, place, rng.choice([-1, rng.randrange(_PICKS)]), namespace)

    def _namespace(self) -> int:
        return self._rng.randrange(2)

    def _aim(self, fits: Callable[[Twin], bool]) -> int:
        """A live sequence, one that fits if there is any; now and then any."""
        places = [place for place, twin in enumerate(self._twins) if fits(twin)]
        return self._rng.choice(places) if places and self._rng.random() < 0.8 else self._rng.randrange(_PICKS)

    def _has_half_full_block(self, twin: Twin) -> bool:
        return twin.computed == twin.reserved and twin.computed % self._config.block_size > 0

    def _picks(self) -> tuple[int, ...]:
        return tuple(self._rng.randrange(_PICKS) for _ in range(self._rng.randrange(self._config.max_num_seqs)))

    def _tokens(self, none: float) -> tuple[int, ...]:
        rng = self._rng
        return tuple(-1 if rng.random() < none else rng.randrange(self._config.vocabulary) for _ in range(3))

    def _end_step(self) -> Operation:
        kind = self._rng.random()
        if kind < 0.2:
            return Cancel(copies_made=kind < 0.1)
        return Complete(self._tokens(0.2), None if kind < 0.9 else self._rng.randrange(_PICKS))


def _is_idle(twin: Twin) -> bool:
    return twin.computed == len(twin.tokens)
