"""Other projects' schedulers, measured under the load that ours is measured under.

One module per project. Each can be imported (lazily: nothing of the rival loads before it is asked for) and run as a script by another
interpreter, because the rivals' dependencies seldom fit into one environment; ``run_elsewhere`` does that and reads the JSON back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class RivalRun:
    """What a rival's process reported: the seconds of each step, or the reason why there are none."""

    seconds: tuple[float, ...]
    version: str
    missing: str | None


def run_elsewhere(module: str, *, num_running: int, steps: int, seed: int, python: str | None = None, path: str | None = None) -> RivalRun:
    """Measure one rival in a fresh process.

    Args:
        module: file name in this folder without its ending.
        num_running: running sequences while timing.
        steps: timed decode steps.
        seed: of the prompts and of the sampled tokens.
        python: interpreter that can import the rival; this one where not given.
        path: folder to import the rival from, for a project that is not installed.
    """
    command = [python or sys.executable, str(FOLDER / f"{module}.py")]
    command += ["--num-running", str(num_running), "--steps", str(steps), "--seed", str(seed)]
    if path is not None:
        command += ["--path", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except OSError as error:
        return RivalRun((), "", f"the interpreter did not start: {error}")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return RivalRun((), "", f"it failed with status {done.returncode}: {reason}")
    report = json.loads(lines[-1])
    return RivalRun(tuple(report["seconds"]), report["version"], report["missing"])
