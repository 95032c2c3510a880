"""What ``pagedkv stress`` runs: sessions of the manager alone, lives of an engine over a model, or a trace.

torch is imported only where a model is asked for.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from pagedkv.cli.stress_output import Bar, Case, Failure, Outcome, rate
from pagedkv.core import KVCacheManager
from pagedkv.errors import ConfigError
from pagedkv.testing.allocation_faults import FailingAllocations
from pagedkv.testing.lives import Life
from pagedkv.testing.programs import Program
from pagedkv.testing.stress import stress_manager
from pagedkv.testing.stress_report import Report, Tally
from pagedkv.testing.trace_files import read_trace
from pagedkv.testing.trace_replay import TraceReport, replay_trace
from pagedkv.testing.traces import Trace
from pagedkv.testing.violations import ViolationError

MODELS = ("hash", "tiny", "smol")
_OPERATIONS = {"manager": 10_000, "hash": 1_000, "tiny": 300, "smol": 60}  # where no budget is given: seconds, with smol about a minute
_SHRINK_RUNS = {"hash": 100, "tiny": 60, "smol": 10}  # minutes at most, whatever a life takes
_REQUESTS = 10
_TRACE_BLOCK_SIZE = 16  # divides the hash blocks of every published trace
_TRACE_POOL = 4  # times the blocks of the longest request, where no size is given: room for some, never for all


def run_phase(options: argparse.Namespace) -> Outcome:
    """Run what the options ask for, with a progress bar.

    Raises:
        PagedKVError: a size that cannot work, a model that is not there, a trace that is none.
        OSError: a trace that cannot be read.
    """
    if options.trace is not None:
        return _run_trace(options, read_trace(options.trace, max_requests=options.ops))
    return _run_seeds(options)


# Seeds: sessions of the manager, lives of an engine.


class _Watch:
    """Follows a run's reports: a bar, and what each seed took."""

    def __init__(self, bar: Bar, seed: int, operations: int | None, seconds: float | None) -> None:
        self.report = Tally(seed).report()
        self.cases: list[Case] = []
        self.next_seed = seed
        self._bar, self._operations, self._seconds = bar, operations, seconds

    def __call__(self, report: Report) -> None:
        seed = report.seeds[1]
        self.cases.append(Case(f"seed {seed}", report.seconds - (self.report.seconds if self.cases else 0.0)))
        self.report, self.next_seed = report, seed + 1
        done = report.operations / self._operations if self._operations else 0.0
        past = report.seconds / self._seconds if self._seconds else 0.0
        counts = (("operations", report.operations), ("faults", report.faults), ("checks", report.checks))
        self._bar.show(max(done, past), ", ".join(f"{rate(count, report.seconds)} {name}/s" for name, count in counts))


def _run_seeds(options: argparse.Namespace) -> Outcome:
    phase = options.model or "manager"
    operations = options.ops if options.ops or options.seconds else _OPERATIONS[phase]
    run = _manager(options) if options.model is None else _engine(options)
    bar = Bar(phase)
    watch = _Watch(bar, options.seed, operations, options.seconds)
    failure, interrupted = None, False
    try:
        run(operations, watch)
    except ViolationError as error:
        failure = _save(error, phase, watch.next_seed, options)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    return Outcome(phase, watch.report, tuple(watch.cases), watch.report.seconds, failure, interrupted)


def manager_factory(*, faults: bool) -> Callable[..., KVCacheManager]:
    """What makes the managers under test."""
    return FailingAllocations if faults else KVCacheManager


def _manager(options: argparse.Namespace) -> Callable[[int | None, _Watch], object]:
    def run(operations: int | None, watch: _Watch) -> object:
        return stress_manager(
            seed=options.seed,
            num_operations=operations,
            seconds=options.seconds,
            num_blocks=options.blocks,
            block_size=options.block_size,
            on_progress=watch,
            manager_factory=manager_factory(faults=options.faults),
        )

    return run


def _engine(options: argparse.Namespace) -> Callable[[int | None, _Watch], object]:
    from pagedkv.cli.stress_models import life_runner
    from pagedkv.testing.stress_engine import stress_engine

    life = Life(
        options.seed,
        tuple(range(_REQUESTS)),
        num_blocks=options.blocks,
        block_size=options.block_size,
        faults=options.faults,
        model=options.model,
    )
    live = life_runner(life.model, life.block_size)

    def run(operations: int | None, watch: _Watch) -> object:
        return stress_engine(
            live, life, num_steps=operations, seconds=options.seconds, on_progress=watch, max_shrink_runs=_SHRINK_RUNS[life.model]
        )

    return run


def _save(error: ViolationError, phase: str, seed: int, options: argparse.Namespace) -> Failure:
    """Keep what failed in a file; where none can be written, the notes hold it instead."""
    notes, case = tuple(getattr(error, "__notes__", ())), f"seed {seed}"
    saved: Program | Life | None = error.program or error.life
    path = f"pagedkv-stress-{phase}-{seed}.json"
    if saved is not None:
        try:
            Path(path).write_text(saved.to_json(), encoding="utf-8")
        except OSError as refusal:
            notes = (*notes, f"not saved: {refusal}", saved.to_json())
        else:
            faults = " --faults" if options.faults and isinstance(saved, Program) else ""
            return Failure(error.kind, str(error), notes, case, path, f"pagedkv stress --replay {path}{faults}")
    return Failure(error.kind, str(error), notes, case, None, _command(options, "--seed", str(seed)))


# Traces.


def _run_trace(options: argparse.Namespace, trace: Trace) -> Outcome:
    size = options.block_size or _TRACE_BLOCK_SIZE
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace.requests)
    num_blocks = options.blocks or 1 + _TRACE_POOL * -(-longest // size)
    name, began, bar = f"{trace.kind} trace {options.trace.name}", monotonic(), Bar("trace")
    report, failure, interrupted = None, None, False

    def progress(num_ended: int, num_steps: int) -> None:
        seconds = monotonic() - began
        bar.show(num_ended / len(trace.requests), f"{rate(num_steps, seconds)} operations/s, {rate(num_steps, seconds)} checks/s")

    try:
        report = _replayed(trace, num_blocks, size, progress)
    except ViolationError as error:
        again = _command(options, "--trace", str(options.trace))
        failure = Failure(error.kind, str(error), tuple(getattr(error, "__notes__", ())), name, None, again)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    seconds = monotonic() - began
    cases = () if report is None else (Case(name, seconds),)
    return Outcome("trace", report, cases, seconds, failure, interrupted)


def _replayed(trace: Trace, num_blocks: int, block_size: int, progress: Callable[[int, int], object]) -> TraceReport:
    try:
        return replay_trace(trace, num_blocks=num_blocks, block_size=block_size, check="step", on_step=progress)
    except (ViolationError, ConfigError):
        raise
    except Exception as error:
        raise ViolationError("crash", f"{type(error).__name__}: {error}") from error


def _command(options: argparse.Namespace, *first: str) -> str:
    """The words that run the same again, from these on."""
    words = ["pagedkv", "stress", *first]
    for name in ("model", "ops", "blocks", "block_size"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return shlex.join([*words, *(["--faults"] if options.faults else [])])
