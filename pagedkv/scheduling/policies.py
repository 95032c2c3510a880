"""Which waiting request is admitted next: the policy protocol and three policies. Policies hold no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pagedkv.checks import integer, shown
from pagedkv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy may know of a waiting request.

    Attributes:
        arrival: running number of submission.
        priority: as submitted; lower goes first.
        num_tokens: known tokens to compute, cached ones included.
        num_passed_over: how often another was admitted although this one ranks before it.
    """

    arrival: int
    priority: int
    num_tokens: int
    num_passed_over: int


class SchedulingPolicy(Protocol):
    """Orders waiting requests; also says who is preempted first: the running request that ranks last.

    Attributes:
        lookahead: how many of the best-ranked candidates ``choose`` sees; with 1 it is not asked.
    """

    @property
    def lookahead(self) -> int:
        """Candidates to choose from, at least 1."""

    def rank(self, candidate: Candidate) -> tuple[int, ...]:
        """Sort key, the smallest goes first; must not change while the request lives."""

    def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
        """Index of the candidate to admit, given how many tokens of each are cached now."""


def check_policy(policy: object) -> None:
    """Raise ``ConfigError`` for what cannot be asked as a ``SchedulingPolicy`` is; names what it lacks."""
    for name in ("rank", "choose"):
        if not callable(getattr(policy, name, None)):
            raise ConfigError(f"policy is {shown(policy)}: it has no {name}(), which a SchedulingPolicy has")
    integer("the policy's lookahead", getattr(policy, "lookahead", None), least=1)


@dataclass(frozen=True, slots=True)
class FirstComeFirstServed:
    """In order of submission."""

    lookahead: int = 1

    def rank(self, candidate: Candidate) -> tuple[int, ...]:
        """By arrival."""
        return (candidate.arrival,)

    def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
        """The first."""
        return 0


@dataclass(frozen=True, slots=True)
class Priority:
    """Lower ``priority`` first, then in order of submission; a steady stream of urgent requests starves the others, as asked."""

    lookahead: int = 1

    def rank(self, candidate: Candidate) -> tuple[int, ...]:
        """By priority, then arrival."""
        return (candidate.priority, candidate.arrival)

    def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
        """The first."""
        return 0


@dataclass(frozen=True, slots=True)
class LongestCachedPrefix:
    """Of the ``lookahead`` longest-waiting requests, the one with the most cached tokens (SGLang's cache-aware order, Zheng et al. 2024).

    A request that was passed over ``patience`` times goes first whatever is cached, so none starves.
    """

    lookahead: int = 64
    patience: int = 64

    def rank(self, candidate: Candidate) -> tuple[int, ...]:
        """By arrival."""
        return (candidate.arrival,)

    def choose(self, candidates: Sequence[Candidate], num_cached_tokens: Sequence[int]) -> int:
        """The most cached tokens; of equals, the first; before all, one that was passed over too often."""
        for index, candidate in enumerate(candidates):
            if candidate.num_passed_over >= self.patience:
                return index
        return max(range(len(candidates)), key=lambda index: (num_cached_tokens[index], -index))
