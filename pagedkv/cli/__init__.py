"""The command line: one module per command, each with ``add_arguments`` and ``run``. It owns the list of commands and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pagedkv.cli import doctor
from pagedkv.errors import PagedKVError

_COMMANDS = {"doctor": doctor}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words behind the program's name; those of this process when None.

    Returns:
        the exit status: 0, 1 for what pagedkv refuses (the reason goes to standard error), 2 for a command line that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="pagedkv", description="A paged K/V cache to embed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    chosen = parser.parse_args(arguments)
    try:
        status: int = _COMMANDS[chosen.command].run(chosen)
    except PagedKVError as error:
        print(f"pagedkv: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return status
