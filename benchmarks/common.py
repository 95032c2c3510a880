"""What every benchmark script shares: its options, the machine it ran on, medians with spread, tables, and the JSON file.

A script measures and hands its figures over; nothing here measures anything but the clock in ``timed``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

PACKAGES = ("pagedkv", "numpy", "torch", "transformers")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing: the median, and how far the others lie from it."""

    median: float
    mean: float
    low: float
    high: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], *, scale: float = 1.0) -> Spread:
        """Summarise at least one value; ``low`` and ``high`` are the 5th and the 95th percentile.

        Args:
            values: measurements.
            scale: factor to bring them to the unit that is printed, for example 1e6 from seconds to microseconds.
        """
        ordered = sorted(value * scale for value in values)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            mean=statistics.fmean(ordered),
            low=ordered[round(0.05 * last)],
            high=ordered[round(0.95 * last)],
            minimum=ordered[0],
            maximum=ordered[-1],
            count=len(ordered),
        )

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}..{_short(self.high)})"


Figure = Spread | float | int | str | list[float] | None


def timed(call: Callable[[], object], repeats: int, *, warmup: int = 1, prepare: Callable[[], object] | None = None) -> list[float]:
    """Seconds of each of ``repeats`` calls.

    Args:
        call: what is timed; its result is dropped outside the timed part.
        repeats: timed calls.
        warmup: calls before, not timed.
        prepare: run before each call, not timed.
    """
    seconds = []
    for number in range(warmup + repeats):
        if prepare is not None:
            prepare()
        began = perf_counter()
        result = call()
        ended = perf_counter()
        del result
        if number >= warmup:
            seconds.append(ended - began)
    return seconds


def machine() -> dict[str, Any]:
    """The machine and the versions, without anything that identifies it or its user."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has; a script adds its own and parses."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a bounded run that shows that the script works; quote no figure of it")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn at random")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to this file")
    return parser


def numbers(text: str) -> tuple[int, ...]:
    """``1,2`` to ``(1, 2)``."""
    return tuple(int(word) for word in text.split(","))


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """``1x2,3x4`` to ``((1, 2), (3, 4))``."""
    words = (word.split("x") for word in text.split(","))
    return tuple((int(first), int(second)) for first, second in words)


class Report:
    """Prints tables as they come and keeps them for the JSON file.

    Args:
        title: what the script claims to measure.
        path: where ``finish`` writes JSON; nowhere when None.
    """

    def __init__(self, title: str, path: Path | None) -> None:
        self._path = path
        self._began = perf_counter()
        self._content: dict[str, Any] = {
            "title": title,
            "command": command_line(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "load_average_before": _load(),
            "tables": [],
            "figures": {},
            "notes": [],
        }
        facts = self._content["machine"]
        self._text: list[str] = []
        self._say(f"# {title}", "", f"{self._content['command']}  ({self._content['date']})")
        self._say(", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, {})))
        self._say(f"load average {self._content['load_average_before']}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print one table, in Markdown, columns aligned; the first column to the left, all others to the right."""
        cells = [[_cell(value) for value in row] for row in rows]
        widths = [max(len(line[index]) for line in [list(columns), *cells]) for index in range(len(columns))]
        rule = "|" + "|".join("-" * (width + 2) if not index else "-" * (width + 1) + ":" for index, width in enumerate(widths)) + "|"
        self._say("", f"## {title}", "", _line(columns, widths), rule, *(_line(row, widths) for row in cells))
        self._content["tables"].append({"title": title, "columns": list(columns), "rows": cells})

    def listing(self, title: str, entries: Sequence[tuple[str, str]]) -> None:
        """Print names with a sentence or more on each, too long for a table."""
        self._say("", f"## {title}", "", *(f"- {name}: {text}" for name, text in entries))
        self._content["tables"].append({"title": title, "columns": ["", ""], "rows": [list(entry) for entry in entries]})

    def figure(self, name: str, value: Figure) -> None:
        """Keep one figure, unrounded, or the figures of each round, under a name for the JSON file."""
        self._content["figures"][name] = asdict(value) if isinstance(value, Spread) else value

    def note(self, text: str) -> None:
        """Print a sentence that belongs to the figures, and keep it."""
        self._say("", text)
        self._content["notes"].append(text)

    def markdown(self) -> str:
        """All that was printed so far."""
        return "\n".join(self._text) + "\n"

    def _say(self, *lines: str) -> None:
        print("\n".join(lines), flush=True)
        self._text += lines

    def finish(self) -> None:
        """Say how the machine was at the end and write the JSON file."""
        self._content["load_average_after"] = _load()
        self._content["wall_s"] = round(perf_counter() - self._began, 1)
        print(f"\nload average {self._content['load_average_after']}, {self._content['wall_s']} s in all")
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._content, indent=1) + "\n")
            print(f"written: {self._path}")


def command_line() -> str:
    """The command as typed, with every path but the script's own replaced: results are published."""
    words = [word if os.sep not in word else "PATH" for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def without_paths(text: str) -> str:
    """A message, an error's for example, with every path replaced: results are published."""
    return re.sub(r"[^\s'\"(=]*/[^\s'\":,)]*", lambda match: match[0] if match[0].count("/") == 1 and match[0][0] != "/" else "PATH", text)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) if not index else cell.rjust(width) for index, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(padded) + " |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return _short(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(value: float) -> str:
    """Three figures that mean something, and never an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _load() -> str:
    try:
        return " ".join(f"{value:.2f}" for value in os.getloadavg())
    except OSError:
        return "unknown"
