"""``pagedkv stress --replay``: what a failure has left, run again step by step, with all tables shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pagedkv.cli.stress_phases import manager_factory
from pagedkv.testing.lives import FORMAT as LIFE
from pagedkv.testing.lives import Life
from pagedkv.testing.programs import Program
from pagedkv.testing.replay import replay
from pagedkv.testing.violations import ViolationError


def replay_file(path: Path, *, faults: bool) -> int:
    """Run a saved program or life again, every check on, and print the tables after each step.

    Args:
        path: the file.
        faults: whether allocations fail, for a program; a life says it itself.

    Returns:
        the exit status.

    Raises:
        InvalidRequestError: the file holds neither.
        ConfigError: a model that is unknown or not there.
        OSError: it cannot be read.
    """
    saved = _read(path.read_text(encoding="utf-8"))
    try:
        if isinstance(saved, Life):
            from pagedkv.cli.stress_models import life_runner

            print(saved)
            print(life_runner(saved.model, saved.block_size)(saved, watch=print))
        else:
            replay(saved, manager_factory=manager_factory(faults=faults))
    except ViolationError as error:
        print("\n".join([f"VIOLATED: {error}", *(f"  {note}" for note in getattr(error, "__notes__", ()))]), file=sys.stderr)
        return 1
    print("nothing was violated")
    return 0


def _read(text: str) -> Program | Life:
    try:
        data: Any = json.loads(text)
    except ValueError:
        data = None  # the program's reader says what is wrong
    is_life = isinstance(data, dict) and data.get("format") == LIFE
    return Life.from_json(text) if is_life else Program.from_json(text)
