"""The account of a stress run and how long it may go on. Owns the counts; who adds to them is a driver's business."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic

from pagedkv.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Report:
    """What a stress run did; at the end of a run it is there only if nothing was violated.

    Attributes:
        operations: performed on managers, or steps of engines.
        checks: rounds of the oracles.
        refusals: calls or requests that had to be refused, and were, without a trace.
        faults: injected faults.
        seconds: of wall clock.
        by_operation: how often each kind of thing was done.
        peak_blocks: most blocks of one pool that were held at once.
        hit_tokens: prompt tokens found in a prefix cache.
        evictions: cached blocks given away.
        copies: blocks copied before a write.
        seeds: the first session's seed and the last one's; every number between them is a session's as well.
    """

    operations: int
    checks: int
    refusals: int
    faults: int
    seconds: float
    by_operation: Mapping[str, int]
    peak_blocks: int
    hit_tokens: int
    evictions: int
    copies: int
    seeds: tuple[int, int]


@dataclass(slots=True)
class Tally:
    """The running account of sessions that start at ``first_seed``; attributes as for ``Report``."""

    first_seed: int
    operations: int = 0
    checks: int = 0
    refusals: int = 0
    faults: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    peak_blocks: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    copies: int = 0
    num_sessions: int = 0
    _began: float = field(default_factory=monotonic)

    def next_seed(self) -> int:
        """Begin a session and tell its seed."""
        self.num_sessions += 1
        return self.first_seed + self.num_sessions - 1

    def report(self) -> Report:
        """A frozen copy."""
        return Report(
            operations=self.operations,
            checks=self.checks,
            refusals=self.refusals,
            faults=self.faults,
            seconds=monotonic() - self._began,
            by_operation=dict(sorted(self.by_operation.items())),
            peak_blocks=self.peak_blocks,
            hit_tokens=self.hit_tokens,
            evictions=self.evictions,
            copies=self.copies,
            seeds=(self.first_seed, self.first_seed + max(self.num_sessions, 1) - 1),
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """When a run is over: after so many operations or seconds, whichever comes first. Looked at between sessions, it decides nothing else.

    Raises:
        InvalidRequestError: no operations at all, or seconds that are no time.
    """

    operations: int | None
    seconds: float | None

    def __post_init__(self) -> None:
        if self.operations is not None and self.operations < 1:
            raise InvalidRequestError(f"num_operations is {self.operations}: it must be at least 1")
        if self.seconds is not None and not 0 <= self.seconds < float("inf"):
            raise InvalidRequestError(f"seconds is {self.seconds}: it must be a finite number from 0")

    @classmethod
    def of(cls, operations: int | None, seconds: float | None, *, usual: int) -> Budget:
        """The budget asked for; ``usual`` operations where none was."""
        return cls(usual if operations is None and seconds is None else operations, seconds)

    def used_up(self, report: Report) -> bool:
        """Whether the run is over."""
        return (self.operations is not None and report.operations >= self.operations) or (
            self.seconds is not None and report.seconds >= self.seconds
        )
