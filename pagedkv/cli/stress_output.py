"""What ``pagedkv stress`` says: a bar while it runs, then lines, JSON or JUnit XML. It owns the words, and no run."""

from __future__ import annotations

import json
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from pagedkv.testing.stress_report import Report
from pagedkv.testing.trace_replay import TraceReport

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A violation in words.

    Attributes:
        kind, message, notes: of the ``ViolationError``.
        case: what failed: a seed, or a trace.
        saved: the file that ``--replay`` takes, where there is something to save and it could be.
        again: the command that shows it again, step by step if it was saved.
    """

    kind: str
    message: str
    notes: tuple[str, ...]
    case: str
    saved: str | None
    again: str

    def __str__(self) -> str:
        return "\n".join([f"VIOLATED: {self.message}", *(f"  {note}" for note in self.notes), f"  again: {self.again}"])


@dataclass(frozen=True, slots=True)
class Case:
    """One session, life or trace that went well, and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that there is to say of a run; ``report`` is of what went well, None where a trace did not."""

    phase: str
    report: Report | TraceReport | None
    cases: tuple[Case, ...]
    seconds: float
    failure: Failure | None = None
    interrupted: bool = False


class Bar:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, phase: str) -> None:
        self._bar = tqdm(total=1.0, desc=f"stress {phase}", disable=None, bar_format=_BAR, dynamic_ncols=True, leave=False)

    def show(self, share: float, said: str) -> None:
        """Move on to this share of the whole, from 0 to 1."""
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(min(share, 1.0) - self._bar.n)

    def close(self) -> None:
        """Clear the line."""
        self._bar.close()


def show(outcome: Outcome, *, as_json: bool) -> None:
    """Print the report, and a failure on standard error."""
    failure, report = outcome.failure, outcome.report
    if as_json:
        head = {"phase": outcome.phase, "violation": failure and asdict(failure), "interrupted": outcome.interrupted}
        print(json.dumps({**head, **({} if report is None else asdict(report))}, indent=1))
    else:
        print(f"{outcome.phase}: {_verdict(outcome)}; {_extent(outcome)} went well in {outcome.seconds:.1f} s")
        if outcome.cases and report is not None:
            print(textwrap.indent(_table(report) if isinstance(report, Report) else str(report), "  "))
    if failure is not None:
        print(failure, file=sys.stderr)


def write_junit(outcome: Outcome, path: Path) -> None:
    """One test case for each seed or trace; the failing one has the message, the notes and how to see it again.

    Raises:
        OSError: the file cannot be written.
    """
    failure, place = outcome.failure, f"pagedkv.stress.{outcome.phase}"
    counts = {"tests": str(len(outcome.cases) + (failure is not None)), "failures": str(int(failure is not None)), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": f"pagedkv stress {outcome.phase}", **counts, "time": f"{outcome.seconds:.3f}"}
    )
    for case in outcome.cases:
        ElementTree.SubElement(suite, "testcase", {"classname": place, "name": _printable(case.name), "time": f"{case.seconds:.3f}"})
    if failure is not None:
        failed = ElementTree.SubElement(suite, "testcase", {"classname": place, "name": _printable(failure.case), "time": "0"})
        said = ElementTree.SubElement(failed, "failure", {"type": failure.kind, "message": _printable(failure.message)})
        said.text = _printable(str(failure))
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def rate(count: int, seconds: float) -> str:
    """So many a second, in words."""
    each = count / seconds if seconds else 0.0
    return f"{each:,.0f}" if each >= 10 or not count else f"{each:.2g}"


def _verdict(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"VIOLATED by {outcome.failure.case}"
    return "interrupted" if outcome.interrupted else "nothing violated"


def _extent(outcome: Outcome) -> str:
    names = [case.name for case in outcome.cases]
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{len(names):,} sessions, {names[0]} to {names[-1]},"


def _table(report: Report) -> str:
    rows = [
        ("operations", report.operations, f"{rate(report.operations, report.seconds)} a second"),
        ("checks", report.checks, f"{rate(report.checks, report.seconds)} a second, each by every oracle"),
        ("faults", report.faults, f"{rate(report.faults, report.seconds)} a second, injected"),
        ("refusals", report.refusals, "calls that had to be refused and were, without a trace"),
        ("peak blocks", report.peak_blocks, "of one pool, held at once"),
        ("hits", report.hit_tokens, "prompt tokens found in the prefix cache"),
        ("evictions", report.evictions, "cached blocks given away"),
        ("copies", report.copies, "blocks copied before a write"),
    ]
    counts = sorted(report.by_operation.items(), key=lambda item: -item[1])
    done = textwrap.wrap(", ".join(f"{name} {count:,}" for name, count in counts), 80) or ["nothing"]
    return "\n".join(
        [
            *(f"{name:<12}{count:>12,}  {meaning}" for name, count, meaning in rows),
            *(f"{title:<26}{line}" for title, line in zip(["by operation", *[""] * len(done)], done, strict=False)),
        ]
    )


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)
