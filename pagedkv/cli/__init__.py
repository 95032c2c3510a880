"""The command line: one module per command, each with ``add_arguments`` and ``run``. It owns the list of commands and nothing else.

Only the chosen command's module is loaded: one that needs no torch does not wait for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from pagedkv.errors import PagedKVError

_COMMANDS = {
    "doctor": "What would run here, and why; and, given a model, what its self-check says.",
    "stress": "Random operations with every check on, until something breaks or the budget is used up.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words behind the program's name; those of this process when None.

    Returns:
        the exit status: 0, 1 for what pagedkv refuses (the reason goes to standard error), 2 for a command line that cannot be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="pagedkv", description="A paged K/V cache to embed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in words[:1]:
            import_module(f"pagedkv.cli.{name}").add_arguments(command)
    chosen = parser.parse_args(words)
    try:
        status: int = import_module(f"pagedkv.cli.{chosen.command}").run(chosen)
    except PagedKVError as error:
        print(f"pagedkv: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return status
