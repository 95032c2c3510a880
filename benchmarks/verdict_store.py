"""Verdicts kept on disk as they come, so that a run that was stopped goes on where it was.

A store knows nothing of the code that gave a verdict: begin a new one when that has changed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matrix_trials import Verdict

from pagedkv.testing.parity import MixReport


class VerdictStore:
    """Verdicts by the trial and its arguments, one line of JSON each.

    Args:
        path: the file; made when it is not there. None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Verdict] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._known[entry["key"]] = _verdict(entry["verdict"])

    def get(self, *key: object) -> Verdict | None:
        """What is known of a trial."""
        return self._known.get(json.dumps(key))

    def keep(self, verdict: Verdict, *key: object) -> None:
        """Write one verdict down."""
        self._known[json.dumps(key)] = verdict
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": json.dumps(key), "verdict": asdict(verdict)}) + "\n")


def _verdict(fields: dict[str, Any]) -> Verdict:
    mixes = tuple(MixReport(**mix) for mix in fields.pop("mixes"))
    expected = tuple((tuple(prompt), tuple(tokens)) for prompt, tokens in fields.pop("expected"))
    return Verdict(mixes=mixes, expected=expected, **fields)
