"""Bugs of the scheduler that need what the simulation of an engine does not draw: the scheduler's own driver finds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scheduler_driver import run_seed

from pagedkv.scheduling import Branch, Scheduler
from pagedkv.scheduling.admission import Admission
from pagedkv.scheduling.running import RunningSet

MAX_LOADS = 400


def stop_too_early(running: RunningSet, branch: Branch) -> None:
    ADD(running, branch)
    running.minimums[branch.row] = 0


ADD = RunningSet.add
BUGS: dict[str, tuple[type, str, Callable[..., object]]] = {
    "preempted requests are admitted as if they were new": (Admission, "_must_be_sure", lambda *_: False),
    "min_tokens is ignored": (RunningSet, "add", stop_too_early),
    "an abort during a step is forgotten": (Scheduler, "_end_doomed", lambda *_: None),
}


@pytest.mark.parametrize("name", BUGS)
def test_scheduler_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> None:
    monkeypatch.setattr(*BUGS[name])
    for seed in range(MAX_LOADS):
        try:
            run_seed(seed)
        except Exception:
            record_property("loads", seed + 1)
            return
    pytest.fail(f"{name!r} survived {MAX_LOADS} loads")
