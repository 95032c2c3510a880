"""mutmut over ``pagedkv.core`` and ``pagedkv.scheduling``, with two changes that make a run of thousands of mutants affordable.

The tests are collected once, and each mutant runs in a fork of that process: mutmut starts pytest anew for each, which takes longer than
most of the tests. And the mutants run in an order drawn from a seed: wherever a run is stopped, what it has done is a random sample of all
mutants, and a later run goes on from there. Settings are in ``pyproject.toml``; mutmut is not among the test requirements.

    pip install mutmut==3.8.1
    python benchmarks/mutation.py run --max-children 1     # any other command line of mutmut works as well
    python benchmarks/mutation.py report FILE              # scores and survivors; reasons written into FILE before are kept
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import mutmut.__main__ as program
import pytest
from _pytest.config import _prepareconfig
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.runners.harness import PytestRunner
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.workers.isolation import ForkRunner

SEED = 20261129
DETECTED = {"killed", "timeout", "segfault"}
UNKNOWN_TEST = 99  # exit code of a fork that was to run a test which was not collected: an exception would count as a killed mutant


def place(mutant: str) -> str:
    """Where a mutant stands in the order: mutmut sorts by this instead of by the time that it expects."""
    return hashlib.sha256(f"{SEED} {mutant}".encode()).hexdigest()


def plain(test: str) -> str:
    """A test's id as in its source: pytest doubles the backslashes in it each time that a process collects it."""
    return re.sub(r"\\+", r"\\", test)


class CollectedTests(PytestRunner):
    """Collects in the parent, and in each fork runs the tests that reach the mutant, the fastest first, until one fails."""

    def collect(self) -> None:
        arguments = ["--rootdir=.", "--tb=no", "-q", "-s", *self._pytest_add_cli_args, *self._pytest_add_cli_args_test_selection]
        with change_cwd("mutants"):
            settings = _prepareconfig(arguments)
            self._session = pytest.Session.from_config(settings)
            settings._do_configure()
            settings.hook.pytest_sessionstart(session=self._session)
            settings.hook.pytest_collection(session=self._session)
        self._items = {plain(item.nodeid): item for item in self._session.items}

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        if mutant_name is None:  # the clean run, of all tests: pytest cannot be given every name that it gives
            return super().run_tests(mutant_name=None, tests=[])
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with change_cwd("mutants"):
            names = [plain(test) for test in tests]
            if not self._items.keys() >= set(names):
                return UNKNOWN_TEST
            for name in names:
                item = self._items[name]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if self._session.testsfailed:
                    return 1
        return 0


class CollectedRunner(ForkRunner):
    """mutmut's runner of forks, which collects before the first of them."""

    def startup(self) -> None:
        self.test_runner.collect()
        super().startup()


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share that was found in a random sample."""
    z, share = 1.96, count / of
    middle, spread = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - spread) / (1 + z * z / of), (middle + spread) / (1 + z * z / of)


def account(statuses: Iterable[str]) -> dict[str, object]:
    """Mutants by what became of them, and the share that was detected among those that were run."""
    counts = Counter(statuses)
    mutants = counts.total()
    run = mutants - counts.pop("not checked", 0)
    detected = sum(count for status, count in counts.items() if status in DETECTED)
    figures: dict[str, object] = {"mutants": mutants, "run": run, **dict(sorted(counts.items()))}
    if run:
        figures["score_percent"] = round(100 * detected / run, 1)
        figures["interval_95_percent"] = [round(100 * bound, 1) for bound in wilson(detected, run)]
    return figures


def change_of(mutant: str, path: Path) -> list[str]:
    """The lines that a mutant takes out and puts in."""
    lines = get_diff_for_mutant(mutant, path=path).splitlines()
    return [line[0] + " " + line[1:].strip() for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def report(target: Path) -> None:
    """Write scores by module and package, and all survivors with the reasons that ``target`` gives for the same change already."""
    old = json.loads(target.read_text()) if target.exists() else {}
    reasons = {tuple(each["change"]): each["reason"] for each in old.get("survivors", [])}
    modules: dict[str, dict[str, str]] = {}
    survivors = []
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        statuses = {mutant: status_by_exit_code[code] for mutant, code in data.exit_code_by_key.items()}
        if not statuses:
            continue
        modules[".".join(path.with_suffix("").parts)] = statuses
        for mutant, status in statuses.items():
            if status not in DETECTED and status != "not checked":
                change = change_of(mutant, path)
                survivors.append({"mutant": mutant, "status": status, "change": change, "reason": reasons.get(tuple(change), "")})
    packages = sorted({name.rpartition(".")[0] for name in modules})
    result = {
        "benchmark": "mutation",
        "command": "python benchmarks/mutation.py run --max-children 1",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip(),
        "versions": {name: version(name) for name in ("mutmut", "pytest", "numpy")} | {"python": platform.python_version()},
        "seed": SEED,
        "tests": config().pytest_add_cli_args_test_selection,
        "left_out": config().do_not_mutate,
        "total": account(status for statuses in modules.values() for status in statuses.values()),
        "packages": {
            package: account(status for name, statuses in modules.items() if name.startswith(package + ".") for status in statuses.values())
            for package in packages
        },
        "modules": {name: account(statuses.values()) for name, statuses in modules.items()},
        "survivors": survivors,
    }
    target.write_text(json.dumps({**{"note": old.get("note", "")}, **result}, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({"total": result["total"], "packages": result["packages"]}, indent=1))


def main(arguments: list[str]) -> None:
    if not Path("pyproject.toml").exists():
        sys.exit("run this in the folder that holds pyproject.toml")
    if arguments[:1] == ["report"]:
        report(Path(arguments[1]))
        return
    tests = CollectedTests()
    program.estimated_worst_case_time = place
    program.get_mutant_runner = lambda max_children: CollectedRunner(max_workers=max_children, test_runner=tests)
    program.cli(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
