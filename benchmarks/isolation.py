"""Calls in processes of their own, so that one that hangs, dies or changes global state does no harm to the others.

Children are forked from a clean server that has imported what they need: a call costs milliseconds, not the import of torch.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any


@dataclass(frozen=True, slots=True)
class Lost:
    """A call that gave no answer; ``reason`` is ``"hangs (stopped after 60 s)"`` or ``"dies (exit code -11)"``."""

    reason: str


@dataclass
class _Running:
    index: int
    process: BaseProcess
    answer: Connection
    deadline: float


def run_isolated(
    function: Callable[..., object], calls: Sequence[tuple[object, ...]], *, jobs: int, timeout_s: float, preload: Sequence[str] = ()
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of several arguments, each in its own process, and yield ``(index, answer)`` as answers come.

    Args:
        function: of a module that can be imported by its name.
        calls: arguments of each call; they and the answers are pickled.
        jobs: calls at once.
        timeout_s: a call is stopped after so many seconds, and its answer is ``Lost``.
        preload: modules that the server imports once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, function.__module__])
    waiting = list(enumerate(calls))[::-1]
    running: dict[Connection, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            index, arguments = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
            process.start()
            theirs.close()
            running[mine] = _Running(index, process, mine, monotonic() + timeout_s)
        wait(list(running), timeout=0.2)
        for each in list(running.values()):
            if each.answer.poll():
                yield each.index, _received(each)
            elif monotonic() > each.deadline:
                yield each.index, Lost(f"hangs (stopped after {timeout_s:.0f} s)")
            else:
                continue
            each.process.join(timeout=1.0)
            each.process.kill()
            each.process.join()
            del running[each.answer]


def _answer(to: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    to.send(function(*arguments))
    to.close()
    sys.stdout.flush()


def _received(running: _Running) -> object:
    try:
        return running.answer.recv()
    except EOFError:  # the pipe was closed by its death
        running.process.join()
        return Lost(f"dies (exit code {running.process.exitcode})")
