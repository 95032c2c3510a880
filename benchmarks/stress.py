"""Random operations on the manager, audited after each one: how many, how fast at each check level, and whether anything was violated.

A violation ends the run with exit code 1 and is in the JSON file, with the shortest program that was found.

A long run can be taken in pieces: ``--resume FILE`` keeps one line for each chunk of operations as it is done, and a later run with the
same file goes on with the chunks that are missing. When none is missing, it only adds up what the file holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import process_time

from common import Report, arguments

from pagedkv.testing.stress import stress_manager
from pagedkv.testing.violations import ViolationError

CHUNK = 50_000
SEEDS_APART = 1_000_000  # far more than the sessions of a chunk
LEVELS = ("off", "step", "audit")


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one process did at a stretch; ``number`` decides its seeds."""

    number: int
    seeds: tuple[int, int]
    commit: str = ""
    operations: int = 0
    checks: int = 0
    refusals: int = 0
    cpu_s: float = 0.0
    by_operation: Mapping[str, int] = field(default_factory=dict)
    violation: str | None = None

    @property
    def speed(self) -> float:
        """Operations in a second of a processor, so that others on the machine count for little; 0 after a violation."""
        return self.operations / self.cpu_s if self.cpu_s else 0.0


class Record:
    """The chunks that are done, one line of JSON each; kept in memory alone where no file is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.chunks: list[Chunk] = []
        if path is not None and path.exists():
            self.chunks = [Chunk(**json.loads(line)) for line in path.read_text().splitlines()]

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk, at once: an interrupted run loses only the chunks that were under way."""
        self.chunks.append(chunk)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(chunk)) + "\n")


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--operations", type=int, default=1_000_000, help="audited operations in all")
    parser.add_argument("--processes", type=int, default=1, help="processes side by side")
    parser.add_argument("--sample", type=int, default=20_000, help="operations to measure each check level's speed with; 0: do not")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep finished chunks here, and go on with those that are missing")
    options = parser.parse_args()
    total, size, sample = (4_000, 1_000, 1_000) if options.quick else (options.operations, CHUNK, options.sample)
    report = Report("Audited random operations on the manager", options.json)
    samples = [(level, run_chunk(options.seed, -1, sample, level, "")) for level in LEVELS if sample]
    if samples:
        report.table("Speed of one process", ["check", "operations/s of a processor"], [(level, each.speed) for level, each in samples])
    for level, chunk in samples:
        report.figure(f"operations_per_cpu_s_{level}", chunk.speed)
    record = Record(options.resume)
    run_audited(record, options.seed, total, size, options.processes)
    violations = [chunk.violation for chunk in [*(chunk for _, chunk in samples), *record.chunks] if chunk.violation is not None]
    tell(report, record.chunks, violations)
    return 1 if violations else 0


def run_chunk(seed: int, number: int, num_operations: int, check: str, commit: str) -> Chunk:
    """Run one chunk, from seeds of its own."""
    first, began = seed + SEEDS_APART * (number + 1), process_time()
    try:
        done = stress_manager(seed=first, num_operations=num_operations, check=check)
    except ViolationError as error:
        program = error.program.to_json() if error.program is not None else ""
        return Chunk(number, (first, first), commit, violation="\n".join([str(error), *error.__notes__, program]))
    return Chunk(number, done.seeds, commit, done.operations, done.checks, done.refusals, process_time() - began, done.by_operation)


def run_audited(record: Record, seed: int, total: int, size: int, processes: int) -> None:
    """Run the chunks that are not in the record yet, until it holds ``total`` operations; say now and then how far they are."""
    done = {chunk.number for chunk in record.chunks}
    sizes = {number: min(size, total - start) for number, start in enumerate(range(0, total, size)) if number not in done}
    commit = current_commit()
    with ProcessPoolExecutor(processes) as pool:
        waiting = [pool.submit(run_chunk, seed, number, count, "audit", commit) for number, count in sizes.items()]
        for future in as_completed(waiting):
            record.add(future.result())
            operations = sum(chunk.operations for chunk in record.chunks)
            print(f"{operations:,} of {total:,} audited operations", file=sys.stderr, flush=True)
            if record.chunks[-1].violation is not None:
                pool.shutdown(cancel_futures=True)
                break


def tell(report: Report, chunks: list[Chunk], violations: list[str]) -> None:
    """Add the chunks up and write the report."""
    figures = {
        "operations": sum(chunk.operations for chunk in chunks),
        "checks": sum(chunk.checks for chunk in chunks),
        "refusals": sum(chunk.refusals for chunk in chunks),
        "sessions": sum(chunk.seeds[1] - chunk.seeds[0] + 1 for chunk in chunks),
        "first_seed": min(chunk.seeds[0] for chunk in chunks),
        "last_seed": max(chunk.seeds[1] for chunk in chunks),
        "cpu_s": round(sum(chunk.cpu_s for chunk in chunks)),
        "violations": len(violations),
    }
    report.table("Audited run", list(figures), [list(figures.values())])
    for name, value in figures.items():
        report.figure(name, value)
    kinds, commits = Counter[str](), Counter[str]()
    for chunk in chunks:
        kinds.update(chunk.by_operation)
        commits[chunk.commit] += chunk.operations
    for title, counts in (("operation", kinds), ("commit", commits)):
        report.table(f"By {title}", [title, "operations"], sorted(counts.items()))
        for name, count in sorted(counts.items()):
            report.figure(f"operations_{title}_{name}", count)
    for violation in violations:
        report.note(violation)
    report.finish()


def current_commit() -> str:
    """The commit that this file is checked out from, marked where something is changed; ``unknown`` outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
