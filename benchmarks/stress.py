"""Random operations on the manager, audited after each one: how many, how fast at each check level, and whether anything was violated.

A violation ends the run with exit code 1 and is in the JSON file, with the shortest program that was found.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from common import Report, arguments

from pagedkv.testing.stress import stress_manager
from pagedkv.testing.violations import ViolationError

CHUNK = 20_000
SEEDS_APART = 1_000_000  # far more than the sessions of a chunk
LEVELS = ("off", "step", "audit")


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one process did at a stretch."""

    operations: int
    checks: int
    refusals: int
    seconds: float
    seeds: tuple[int, int]
    violation: str | None = None

    @property
    def speed(self) -> float:
        """Operations in a second; 0 where the run was cut short by a violation."""
        return self.operations / self.seconds if self.seconds else 0.0


def run_chunk(seed: int, num_operations: int, check: str) -> Chunk:
    try:
        report = stress_manager(seed=seed, num_operations=num_operations, check=check)
    except ViolationError as error:
        program = error.program.to_json() if error.program is not None else ""
        return Chunk(0, 0, 0, 0.0, (seed, seed), "\n".join([str(error), *error.__notes__, program]))
    return Chunk(report.operations, report.checks, report.refusals, report.seconds, report.seeds)


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--operations", type=int, default=1_000_000, help="audited operations in all")
    parser.add_argument("--processes", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    total = 4_000 if options.quick else options.operations
    size = min(CHUNK, 1_000 if options.quick else CHUNK)
    report = Report("Audited random operations on the manager", options.json)
    speeds = [(level, run_chunk(options.seed, size, level)) for level in LEVELS]
    report.table("Speed of one process", ["check", "operations/s"], [(level, chunk.speed) for level, chunk in speeds])
    for level, chunk in speeds:
        report.figure(f"operations_per_s_{level}", chunk.speed)
    chunks = run_audited(options.seed, total, size, options.processes)
    violations = [chunk.violation for chunk in [*(chunk for _, chunk in speeds), *chunks] if chunk.violation is not None]
    figures = {
        "operations": sum(chunk.operations for chunk in chunks),
        "checks": sum(chunk.checks for chunk in chunks),
        "refusals": sum(chunk.refusals for chunk in chunks),
        "sessions": sum(chunk.seeds[1] - chunk.seeds[0] + 1 for chunk in chunks),
        "first_seed": min(chunk.seeds[0] for chunk in chunks),
        "last_seed": max(chunk.seeds[1] for chunk in chunks),
        "seconds_of_all_processes": round(sum(chunk.seconds for chunk in chunks)),
        "violations": len(violations),
    }
    report.table("Audited run", list(figures), [list(figures.values())])
    for name, value in figures.items():
        report.figure(name, value)
    for violation in violations:
        report.note(violation)
    report.finish()
    return 1 if violations else 0


def run_audited(seed: int, total: int, size: int, processes: int) -> list[Chunk]:
    """Run all chunks, each from seeds of its own, and say now and then how far they are."""
    chunks: list[Chunk] = []
    done = 0
    with ProcessPoolExecutor(processes) as pool:
        sizes = [min(size, total - start) for start in range(0, total, size)]
        waiting = [pool.submit(run_chunk, seed + SEEDS_APART * (place + 1), count, "audit") for place, count in enumerate(sizes)]
        for future in as_completed(waiting):
            chunks.append(future.result())
            done += chunks[-1].operations
            if len(chunks) % max(len(waiting) // 100, 1) == 0:
                print(f"{done:,} of {total:,} audited operations", file=sys.stderr, flush=True)
            if chunks[-1].violation is not None:
                pool.shutdown(cancel_futures=True)
                break
    return chunks


if __name__ == "__main__":
    sys.exit(main())
