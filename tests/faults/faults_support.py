"""Small fixed scenarios in which everything can be made to fail, and what may be left of them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagedkv.core import KVCacheManager, Snapshot
from pagedkv.errors import InvariantError

LONG = [9] * 13
PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7]]


@dataclass
class Life:
    """A manager, and what its commands have returned so far."""

    manager: KVCacheManager = field(
        default_factory=lambda: KVCacheManager(num_blocks=[13, 12], block_size=2, max_num_seqs=4, max_seq_len=14)
    )
    results: list[Any] = field(default_factory=list)

    def opened(self, command: int) -> np.ndarray[Any, Any]:
        seqs: np.ndarray[Any, Any] = self.results[command].seqs
        return seqs


def _frozen(seqs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    seqs.flags.writeable = False
    return seqs


# Each command takes what it needs from the results of those before it.
COMMANDS: list[Callable[[Life], Any]] = [
    lambda life: life.manager.open(PROMPTS),
    lambda life: life.manager.extend(life.opened(0), [5, 6]),
    lambda life: life.manager.complete(life.opened(0), [7, 8]),
    lambda life: life.manager.fork(int(life.opened(0)[0]), 1),
    lambda life: life.manager.append(life.results[3], [9]),
    lambda life: life.manager.extend(_frozen(life.opened(0)), 1),  # copies the block that the fork shares
    lambda life: life.manager.cancel(life.opened(0)),
    lambda life: life.manager.extend(life.opened(0), [2, 1]),
    lambda life: life.manager.complete(life.opened(0), [3, 4]),
    *(
        # Steps of the same sequences: the short way, over a block's edge.
        command
        for token in (5, 6, 7)
        for command in (
            lambda life: life.manager.extend(life.opened(0), 1),
            lambda life, token=token: life.manager.complete(life.opened(0), [token, token + 1]),
        )
    ),
    lambda life: life.manager.pin(PROMPTS[1][:4]),
    lambda life: life.manager.truncate(life.opened(0)[1:], [3]),
    lambda life: life.manager.release(life.results[3]),
    lambda life: life.manager.release(life.opened(0)),
    lambda life: life.manager.open([LONG], ["other"]),
    lambda life: life.manager.extend(life.opened(19), 13),  # evicts
    lambda life: life.manager.complete(life.opened(19), [9]),
    lambda life: life.manager.open([LONG[:4]], ["other"]),
    lambda life: life.manager.distrust(life.opened(22)),
    lambda life: life.manager.purge("other"),
    lambda life: life.manager.release(life.opened(22)),
    lambda life: life.manager.unpin(life.results[15][0]),
    lambda life: life.manager.release(life.opened(19)),
    lambda life: life.manager.purge(),
]


@dataclass(frozen=True)
class State:
    """What can be told of a manager from outside."""

    snapshot: Snapshot
    matches: tuple[object, ...]
    free: tuple[tuple[int, ...], ...]
    num_free_seqs: int


def state_of(manager: KVCacheManager) -> State:
    matches = tuple(manager.match(prompt, name) for prompt in (*PROMPTS, LONG) for name in ("", "other"))
    return State(manager.snapshot(), matches, tuple(tuple(ids.tolist()) for ids in manager.free_block_ids()), manager.num_free_seqs)


def undisturbed() -> tuple[Life, list[State]]:
    """The life as it should be, and the states before each command and after the last."""
    life = Life()
    states = [state_of(life.manager)]
    for command in COMMANDS:
        life.results.append(command(life))
        life.manager.check()
        states.append(state_of(life.manager))
    assert life.manager.statistics().num_copies > 0
    assert any(group.num_evicted for group in life.manager.statistics().groups)
    return life, states


def until(number: int) -> Life:
    """The life up to before one of the commands."""
    life = Life()
    for command in COMMANDS[:number]:
        life.results.append(command(life))
    return life


def is_broken(check: Callable[[], object]) -> bool:
    """Whether an object says that it was stopped in the middle of a command; any other complaint is a failure."""
    try:
        check()
    except InvariantError as error:
        if "was stopped in the middle of a command" in str(error):
            return True
        raise
    return False
