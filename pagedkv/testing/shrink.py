"""Cutting a failing program down to what fails, under a bounded number of runs. Method: delta debugging (Zeller and Hildebrandt, 2002)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from pagedkv.testing.programs import Operation, Program


def shrink(program: Program, fails: Callable[[Program], bool], *, max_runs: int = 500) -> Program:
    """The shortest program found that still fails.

    Args:
        program: one that fails.
        fails: runs a program and says whether it fails in the same way; must always give the same answer.
        max_runs: how often ``fails`` may be called.

    Returns:
        a program of which no single operation can be left out, unless the runs were used up before.
    """
    left = [max_runs]

    def still_fails(candidate: Program) -> bool:
        left[0] -= 1
        return left[0] >= 0 and fails(candidate)

    size = len(program.operations) // 2
    while size >= 1 and left[0] > 0:
        shorter = _without_pieces(program, size, still_fails)
        if size == 1 and len(shorter.operations) == len(program.operations):
            break
        program, size = shorter, max(size // 2, 1)
    for place in range(len(program.operations)):
        for simpler in _simpler(program.operations[place]):
            candidate = replace(program, operations=(*program.operations[:place], simpler, *program.operations[place + 1 :]))
            if still_fails(candidate):
                program = candidate
                break
    return program


def _without_pieces(program: Program, size: int, fails: Callable[[Program], bool]) -> Program:
    """Leave out every piece of so many operations that is not needed, from the end."""
    for start in range((len(program.operations) - 1) // size * size, -1, -size):
        candidate = replace(program, operations=program.operations[:start] + program.operations[start + size :])
        if candidate.operations and fails(candidate):
            program = candidate
    return program


def _simpler(operation: Operation) -> Iterator[Operation]:
    """The same operation with one field made smaller, the boldest first."""
    for field in fields(operation):
        value = getattr(operation, field.name)
        if isinstance(value, tuple) and len(value) > 1:
            yield replace(operation, **{field.name: value[:1]})  # type: ignore[arg-type]
        elif isinstance(value, int) and value > 1:
            yield replace(operation, **{field.name: 0 if field.name != "count" else 1})  # type: ignore[arg-type]
