"""Stress for an engine: simulated lives, one after the other, every one from a seed of its own, until a budget is used up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pagedkv.testing.lives import Life, shrink_life
from pagedkv.testing.simulated_load import SimulationReport
from pagedkv.testing.stress_report import Budget, Report, Tally
from pagedkv.testing.violations import ViolationError


def stress_engine(
    live: Callable[[Life], SimulationReport],
    life: Life,
    *,
    num_steps: int | None = None,
    seconds: float | None = None,
    on_progress: Callable[[Report], object] | None = None,
    max_shrink_runs: int = 100,
) -> Report:
    """Run lives until a budget is used up.

    Args:
        live: runs one: ``simulate_life``, or a partial of it with a model.
        life: the first; the others are the same from the seeds that count on from there.
        num_steps: stop behind the life that reaches so many; 1,000 when neither budget is given.
        seconds: stop after so many, between lives.
        on_progress: called after each life with the account so far.
        max_shrink_runs: runs that may be spent on making a failing life smaller.

    Returns:
        the account, with an engine's steps for operations; reaching the end means that nothing was violated.

    Raises:
        InvalidRequestError: a budget or a size that cannot work.
        ViolationError: a promise was broken; ``life`` is the smallest life found that ends in it.
    """
    budget, tally = Budget.of(num_steps, seconds, usual=1_000), Tally(life.seed)
    while True:
        try:
            _add(tally, live(replace(life, seed=tally.next_seed())))
        except ViolationError as error:
            _shrink(error, live, max_shrink_runs)
            raise
        report = tally.report()
        if on_progress is not None:
            on_progress(report)
        if budget.used_up(report):
            return report


def _add(tally: Tally, lived: SimulationReport) -> None:
    tally.operations += lived.num_steps
    tally.checks += lived.num_steps + lived.num_ended
    tally.refusals += lived.num_refused
    tally.faults += lived.num_failed_steps + lived.num_spoilt
    tally.by_operation.update(
        {
            "steps": lived.num_steps,
            "requests ended": lived.num_ended,
            "requests refused": lived.num_refused,
            "requests aborted": lived.num_aborted,
            "preemptions": lived.num_preemptions,
            "purges": lived.num_purges,
            "failed steps": lived.num_failed_steps,
            "spoilt logits": lived.num_spoilt,
        }
    )
    tally.peak_blocks = max(tally.peak_blocks, lived.peak_blocks)
    tally.hit_tokens += lived.num_hit_tokens
    tally.evictions += lived.num_evicted
    tally.copies += lived.num_copies


def _shrink(error: ViolationError, live: Callable[[Life], SimulationReport], max_runs: int) -> None:
    if error.life is None:
        return
    whole, message = error.life, str(error)

    def fails(candidate: Life) -> bool:
        nonlocal message
        try:
            live(candidate)
        except ViolationError as again:
            message = str(again) if again.kind == error.kind else message
            return again.kind == error.kind
        return False

    error.life = shrink_life(whole, fails, max_runs=max_runs)
    needed = (
        f"{len(error.life.requests)} of {len(whole.requests)} requests and {len(error.life.turns or ())} of {len(whole.turns or ())} events"
    )
    error.add_note(f"{needed} are enough: {message}")
