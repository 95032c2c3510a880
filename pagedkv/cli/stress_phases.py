"""What ``pagedkv stress`` runs: sessions of the manager alone, or lives of an engine over a model; and again, what a failure has left.

torch is imported only where a model is asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedkv.cli.stress_output import Failure, Outcome, Progress
from pagedkv.testing.lives import FORMAT as LIFE
from pagedkv.testing.lives import Life
from pagedkv.testing.programs import Program
from pagedkv.testing.replay import replay
from pagedkv.testing.stress import stress_manager
from pagedkv.testing.stress_report import Report
from pagedkv.testing.violations import ViolationError

if TYPE_CHECKING:
    from pagedkv.testing.simulated_load import SimulationReport

MODELS = ("hash", "tiny", "smol")
_OPERATIONS = {"manager": 10_000, "hash": 1_000, "tiny": 300, "smol": 60}  # when no budget is given: some tens of seconds
_REQUESTS = 10


def run_phase(options: argparse.Namespace) -> Outcome:
    """Run what the options ask for, with a progress bar.

    Raises:
        PagedKVError: a size that cannot work, or a model that is not there.
    """
    phase = options.model or "manager"
    operations = options.ops if options.ops or options.seconds else _OPERATIONS[phase]
    run = _manager(options) if phase == "manager" else _engine(options)
    failure, interrupted = None, False
    with Progress(phase, options.seed, operations, options.seconds) as progress:
        try:
            run(operations, progress)
        except ViolationError as error:
            failure = _failure(error, phase, progress.next_seed)
        except KeyboardInterrupt:
            interrupted = True
    return Outcome(phase, progress.report, tuple(progress.cases), failure, interrupted)


_Run = Callable[[int | None, Callable[[Report], object]], Report]


def _manager(options: argparse.Namespace) -> _Run:
    def run(operations: int | None, progress: Callable[[Report], object]) -> Report:
        return stress_manager(
            seed=options.seed,
            num_operations=operations,
            seconds=options.seconds,
            num_blocks=options.blocks,
            block_size=options.block_size,
            on_progress=progress,
        )

    return run


def _engine(options: argparse.Namespace) -> _Run:
    from pagedkv.testing.stress_engine import stress_engine

    life = Life(
        options.seed,
        tuple(range(_REQUESTS)),
        num_blocks=options.blocks,
        block_size=options.block_size,
        faults=options.faults,
        model=options.model,
    )
    live = _liver(life)

    def run(operations: int | None, progress: Callable[[Report], object]) -> Report:
        return stress_engine(live, life, num_steps=operations, seconds=options.seconds, on_progress=progress)

    return run


def _liver(life: Life) -> Callable[..., SimulationReport]:
    """What runs lives over the model that this one names."""
    from pagedkv.cli.stress_models import life_runner

    return life_runner(life.model, life.block_size)


def _failure(error: ViolationError, phase: str, seed: int) -> Failure:
    """Keep what failed in a file; where none can be written, the message is all that is left, and says why."""
    saved: Program | Life | None = error.program or error.life
    notes = tuple(getattr(error, "__notes__", ()))
    if saved is None:
        return Failure(error.kind, str(error), notes, seed, None)
    path = Path(f"pagedkv-stress-{phase}-{seed}.json")
    try:
        path.write_text(saved.to_json(), encoding="utf-8")
    except OSError as refusal:
        return Failure(error.kind, str(error), (*notes, f"not saved: {refusal}", saved.to_json()), seed, None)
    return Failure(error.kind, str(error), notes, seed, path)


def replay_file(path: Path) -> int:
    """Run a saved program or life again, every check on, and print the tables after each step; gives the exit status.

    Raises:
        InvalidRequestError: the file holds neither.
        OSError: it cannot be read.
    """
    saved = _read(path.read_text(encoding="utf-8"))
    try:
        if isinstance(saved, Life):
            print(saved)
            print(_liver(saved)(saved, watch=print))
        else:
            replay(saved)
    except ViolationError as error:
        print("\n".join([f"VIOLATED: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1
    print("nothing was violated")
    return 0


def _read(text: str) -> Program | Life:
    try:
        data: Any = json.loads(text)
    except ValueError:
        data = None
    is_life = isinstance(data, dict) and data.get("format") == LIFE
    return Life.from_json(text) if is_life else Program.from_json(text)
