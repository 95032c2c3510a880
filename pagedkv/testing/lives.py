"""Lives: all that decides what a simulated engine goes through, as a small frozen value to be cut down, saved and run again.

Every request and every turn draws from a generator of its own, so that a life keeps its meaning when some of them are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from pagedkv.errors import InvalidRequestError

FORMAT = "pagedkv life 1"


@dataclass(frozen=True, slots=True)
class Life:
    """One life of an engine.

    Attributes:
        seed: of the sizes, the policy and the load.
        requests: numbers of the requests that come, at least one; who else comes decides only whose prompt theirs may begin like.
        turns: before which steps something may happen from outside (an abort, a preemption, a purge, a fault); all when None.
        num_blocks: of the pool, the null block included, at least 3: one token in and one out; drawn when None.
        block_size: tokens in a block; drawn, or the model's, when None.
        faults: whether steps fail and logits are spoilt.
        model: name of the model that it was found with; the simulation does not look at it.

    >>> life = Life(7, (0, 2), turns=(3,))
    >>> Life.from_json(life.to_json()) == life
    True
    """

    seed: int
    requests: tuple[int, ...]
    turns: tuple[int, ...] | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    faults: bool = True
    model: str = "hash"

    def __post_init__(self) -> None:
        for name, value, least in (("num_blocks", self.num_blocks, 3), ("block_size", self.block_size, 1)):
            if value is not None and value < least:
                raise InvalidRequestError(f"{name} is {value}: it must be at least {least}")
        if not self.requests:
            raise InvalidRequestError("not a life: it needs at least one request")

    @property
    def size(self) -> int:
        """Requests and turns that were kept."""
        return len(self.requests) + len(self.turns or ())

    def to_json(self) -> str:
        """The life as text."""
        return json.dumps({"format": FORMAT, **asdict(self)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Life:
        """Read ``to_json``'s text.

        Raises:
            InvalidRequestError: it is not a life; says what is wrong with it.
        """
        try:
            data = dict(json.loads(text))
            if data.pop("format") != FORMAT:
                raise InvalidRequestError(f"not a life: {FORMAT!r} is the format that can be read")
            values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
            life = cls(**values)  # checked below
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(f"not a life: {type(error).__name__} {error}") from error
        numbers = (life.seed, *life.requests, *(life.turns or ()), life.num_blocks or 0, life.block_size or 0)
        if not all(type(number) is int for number in numbers) or type(life.faults) is not bool or type(life.model) is not str:
            raise InvalidRequestError(f"not a life: numbers, a truth value and a name are needed, got {life}")
        return life


def save_life(life: Life, path: str | Path) -> None:
    """Write a life to a file as JSON."""
    Path(path).write_text(life.to_json(), encoding="utf-8")


def shrink_life(life: Life, fails: Callable[[Life], bool], *, max_runs: int = 100) -> Life:
    """The smallest life found that still fails: requests are left out one at a time, then turns, until none can be or the runs are used up.

    Args:
        life: one that fails, with ``turns`` that are told.
        fails: runs a life and says whether it fails in the same way; must always give the same answer.
        max_runs: how often ``fails`` may be called.
    """
    runs = count()

    def smaller_if_it_fails(life: Life, candidate: Life) -> Life:
        return candidate if next(runs) < max_runs and fails(candidate) else life

    before = life.size + 1
    while life.size < before:
        before = life.size
        for number in reversed(life.requests):
            if len(life.requests) > 1:
                kept = tuple(each for each in life.requests if each != number)
                life = smaller_if_it_fails(life, replace(life, requests=kept))
        for number in reversed(life.turns or ()):
            kept = tuple(each for each in life.turns or () if each != number)
            life = smaller_if_it_fails(life, replace(life, turns=kept))
    return life
