"""What ``pagedkv stress`` says: a bar while it runs, then lines, JSON or JUnit XML. It owns the words, and no run."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tqdm.auto import tqdm

from pagedkv.testing.stress_report import Report, Tally

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A violation in words: ``seed`` is the failing session's, ``saved`` the file that ``--replay`` takes, if one could be written."""

    kind: str
    message: str
    notes: tuple[str, ...]
    seed: int
    saved: Path | None

    @property
    def again(self) -> str:
        """The command that shows it step by step."""
        return f"pagedkv stress --replay {self.saved}" if self.saved is not None else f"pagedkv stress --seed {self.seed}"

    def __str__(self) -> str:
        return "\n".join([f"VIOLATED: {self.message}", *(f"  {note}" for note in self.notes), f"  step by step: {self.again}"])


@dataclass(frozen=True, slots=True)
class Case:
    """One session or life that went well, and how long it took."""

    seed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that there is to say of a run; ``report`` is of what went well."""

    phase: str
    report: Report
    cases: tuple[Case, ...]
    failure: Failure | None
    interrupted: bool


class Progress:
    """A bar on standard error, where that is a terminal; called with each report.

    Attributes:
        report: the last one.
        cases: what each seed took so far.
    """

    def __init__(self, phase: str, seed: int, operations: int | None, seconds: float | None) -> None:
        self.report = Tally(seed).report()
        self.cases: list[Case] = []
        self.next_seed = seed
        self._operations, self._seconds = operations, seconds
        self._bar = tqdm(total=1.0, desc=f"stress {phase}", disable=None, bar_format=_BAR, dynamic_ncols=True, leave=False)

    def __call__(self, report: Report) -> None:
        """Move the bar on."""
        seed = report.seeds[1]
        self.cases.append(Case(seed, report.seconds - (self.report.seconds if self.cases else 0.0)))
        self.report, self.next_seed = report, seed + 1
        shares = [
            report.operations / self._operations if self._operations else 0.0,
            report.seconds / self._seconds if self._seconds else 0.0,
        ]
        self._bar.set_postfix_str(
            ", ".join(f"{_rate(report, name)} {name}/s" for name in ("operations", "faults", "checks")), refresh=False
        )
        self._bar.update(min(max(shares), 1.0) - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()


def show(outcome: Outcome, *, as_json: bool) -> None:
    """Print the report, and a failure to standard error as well."""
    failure = outcome.failure
    if as_json:
        print(json.dumps({"phase": outcome.phase, "violation": _as_data(failure), **asdict(outcome.report)}, indent=1))
    else:
        print("\n".join(_lines(outcome)))
    if failure is not None:
        print(failure, file=sys.stderr)


def write_junit(outcome: Outcome, path: Path) -> None:
    """One test case for each seed; the failing one has the message, the notes and the file to replay."""
    failure, seconds = outcome.failure, outcome.report.seconds
    counts = {"tests": str(len(outcome.cases) + (failure is not None)), "failures": str(int(failure is not None)), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"pagedkv stress {outcome.phase}", **counts, "time": f"{seconds:.3f}"})
    place = f"pagedkv.stress.{outcome.phase}"
    for case in outcome.cases:
        ElementTree.SubElement(suite, "testcase", {"classname": place, "name": f"seed {case.seed}", "time": f"{case.seconds:.3f}"})
    if failure is not None:
        failed = ElementTree.SubElement(suite, "testcase", {"classname": place, "name": f"seed {failure.seed}", "time": "0"})
        ElementTree.SubElement(failed, "failure", {"type": failure.kind, "message": _printable(failure.message)}).text = _printable(
            str(failure)
        )
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _lines(outcome: Outcome) -> list[str]:
    report = outcome.report
    verdict = "VIOLATED" if outcome.failure is not None else "interrupted" if outcome.interrupted else "nothing violated"
    first, last = report.seeds
    done = ", ".join(f"{name} {count:,}" for name, count in sorted(report.by_operation.items(), key=lambda item: -item[1]))
    rows = [
        ("operations", report.operations, f"{_rate(report, 'operations')} a second"),
        ("checks", report.checks, f"{_rate(report, 'checks')} a second: rounds of all oracles"),
        ("refusals", report.refusals, "calls that had to be refused and were, without a trace"),
        ("faults", report.faults, f"{_rate(report, 'faults')} a second, injected"),
        ("peak blocks", report.peak_blocks, "of one pool, held at once"),
        ("hits", report.hit_tokens, "prompt tokens found in the prefix cache"),
        ("evictions", report.evictions, "cached blocks given away"),
        ("copies", report.copies, "blocks copied before a write"),
    ]
    return [
        f"{outcome.phase}: {verdict}; {len(outcome.cases):,} seeds from {first} to {last} in {report.seconds:.1f} s",
        *(f"  {name:<12}{count:>12,}  {meaning}" for name, count, meaning in rows),
        f"  of these: {done}",
    ]


def _as_data(failure: Failure | None) -> dict[str, object] | None:
    if failure is None:
        return None
    return {**asdict(failure), "saved": None if failure.saved is None else str(failure.saved), "again": failure.again}


def _rate(report: Report, name: str) -> str:
    count: int = getattr(report, name)
    return f"{count / report.seconds:,.0f}" if report.seconds else "0"


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)
