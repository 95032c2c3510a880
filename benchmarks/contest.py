"""What a contest is made of: an answer, who gives one, the watch that times it, and who runs after whom. Standard library only.

A contestant may live in another process and another environment (``generators/``), so nothing here needs more than Python.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Protocol

from workloads import Workload

PROC = Path("/proc")
BATCH_SIZES = (8, 16, 32, 64)  # of padded batches, that are tried
PAGES = ((256, 256), (256, 1024), (16, 256), (16, 1024))  # of continuous batching: page size, tokens a step


@dataclass(frozen=True, slots=True)
class Times:
    """What a watch read.

    Attributes:
        seconds: by the clock.
        cpu_seconds: that this process and those it started spent meanwhile, over all threads; what others took away is not in it.
        others: processor cores that everybody else took meanwhile, on average, the host of a virtual machine included; None where
            the system does not tell.
    """

    seconds: float
    cpu_seconds: float
    others: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a contestant made of a workload.

    Attributes:
        times: from the first request handed over to the last token.
        tokens: new token ids of each request, in the workload's order.
        facts: what else it says about itself, by name.
    """

    times: Times
    tokens: list[list[int]]
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """By the clock."""
        return self.times.seconds

    @property
    def cpu_seconds(self) -> float:
        """Of the processors."""
        return self.times.cpu_seconds


class Contestant(Protocol):
    """A way to generate."""

    @property
    def label(self) -> str:
        """Its name and settings, for a table."""

    def answer(self, workload: Workload) -> Answer:
        """Generate everything, timed."""

    def close(self) -> None:
        """Give back what was kept between answers."""


class Watch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._busy, self._cpu = _busy_seconds(), _own_seconds()
        self._wall = perf_counter()

    def read(self) -> Times:
        """The times so far."""
        wall = perf_counter() - self._wall
        cpu, busy = _own_seconds() - self._cpu, _busy_seconds()
        others = None if busy is None or self._busy is None else max(0.0, busy - self._busy - cpu) / wall
        return Times(wall, cpu, others)


def second_pass(call: Callable[[int], object], count: int) -> list[float]:
    """Seconds of each of so many calls in a row, the second time: the first wakes the threads, and finds what others left in the caches."""
    seconds: list[float] = []
    for is_measured in (False, True):
        for number in range(count):
            began = perf_counter()
            call(number)
            seconds += [perf_counter() - began] * is_measured
    return seconds


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of one round: each round begins one further, so that nobody always runs right after the same other."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def fastest(variants: Sequence[Contestant], work: Workload, tell: Callable[[Contestant, Answer], None]) -> Contestant:
    """Run each variant once, where there are several, and return the fastest.

    Args:
        variants: at least one; a single one does not run.
        work: what they answer.
        tell: given each variant's answer.
    """
    if len(variants) == 1:
        return variants[0]
    seconds = {}
    for contestant in variants:
        answer = contestant.answer(work)
        tell(contestant, answer)
        seconds[contestant] = answer.seconds
    return min(seconds, key=lambda contestant: seconds[contestant])


def _own_seconds() -> float:
    """Processor seconds of this process, those it started, and those that already ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + ended.ru_utime + ended.ru_stime + _descendant_seconds()


def _descendant_seconds() -> float:
    """Processor seconds of the living processes below this one, with those that they outlived."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
        except OSError:  # ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    below, found = {os.getpid()}, 0.0
    while fresh := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= fresh
        found += sum(seconds[pid] for pid in fresh)
    return found


def _busy_seconds() -> float | None:
    """Processor seconds that all processes, and the host of a virtual machine, have taken since the start; None if unknown."""
    try:
        words = (PROC / "stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft, steal = map(int, words[1:9])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
