"""The outer side of the pipe: a contestant that answers from a process of its own, which loads once and waits between answers.

Owns the process, its end and the deadline. Does not own what runs in it (``generators/``).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Any

from common import THREAD_VARIABLES, without_paths
from contest import Answer, Times
from generators.loop import Setup
from workloads import Workload

FOLDER = Path(__file__).resolve().parent / "generators"
LOADING_S = 900.0
ENDING_S = 5.0


class FailedError(Exception):
    """A contestant has no answer; the text says why, without any path."""


class Pipe:
    """A process that answers JSON objects, one a line; ended with all that it started.

    Args:
        command: what to run.
        threads: that it may compute with.
        own: whether it is of this project and interpreter; others do not get this one's ``PYTHONPATH``.
    """

    def __init__(self, command: Sequence[str], *, threads: int, own: bool) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "HF_HUB_OFFLINE": "1"}
        if not own:
            self._environment.pop("PYTHONPATH", None)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._buffer = b""

    @property
    def running(self) -> bool:
        """Whether it was started and has not been ended."""
        return self._process is not None

    def start(self, setup: Mapping[str, Any]) -> dict[str, Any]:
        """Start it and return what it greets with; raises ``FailedError`` with its reason."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the process
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=self._environment,
                start_new_session=True,  # so that all it starts can be ended with it
            )
        except OSError as error:
            raise FailedError(f"it did not start: {error.strerror}") from error
        try:
            return self.ask(setup, timeout_s=LOADING_S)
        except FailedError:
            self.close()
            raise

    def ask(self, message: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send one object and return the answer.

        Raises:
            FailedError: it failed, died or took too long; in the last two cases it has been ended.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise FailedError("it is not running")
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise self._dead(process) from error
        answer = self._receive(process, process.stdout.fileno(), timeout_s)
        if "error" in answer and len(answer) == 1:
            raise FailedError(without_paths(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _receive(self, process: subprocess.Popen[bytes], stream: int, timeout_s: float) -> dict[str, Any]:
        deadline = monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - monotonic()))
            if not ready:
                self.close()
                raise FailedError(f"no answer within {timeout_s:,.0f} s")
            part = os.read(stream, 1 << 20)
            if not part:
                raise self._dead(process)
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _dead(self, process: subprocess.Popen[bytes]) -> FailedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S)
        lines = []
        if self._errors is not None:
            self._errors.seek(0)
            lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
        status = process.poll()
        self.close()
        return FailedError(without_paths(f"it ended with status {status}: {telling[-1].strip()}"))


class Elsewhere:
    """Contestants in a process that runs one module of ``generators/``; started when first needed, and again after it died.

    Args:
        module: file name in ``generators/`` without its ending.
        setup: what it loads.
        python: interpreter; this one where not given.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, module: str, setup: Setup, *, python: str | None = None, timeout_s: float) -> None:
        command = [python or sys.executable, str(FOLDER / f"{module}.py")]
        self._pipe = Pipe(command, threads=setup.threads, own=python is None)
        self._setup, self._timeout_s = setup, timeout_s

    def variants(self) -> list[Variant]:
        """Start it; one contestant for each way in which it can answer. Raises ``FailedError`` when it cannot load here."""
        labels = self._pipe.start(asdict(self._setup))["labels"]
        return [Variant(self, number, label) for number, label in enumerate(labels)]

    def answer(self, workload: Workload, *, variant: int) -> Answer:
        """Generate everything there; raises ``FailedError``."""
        if not self._pipe.running:
            self._pipe.start(asdict(self._setup))
        message = self._pipe.ask({"variant": variant, **asdict(workload)}, timeout_s=self._timeout_s)
        return Answer(Times(**message["times"]), message["tokens"], message["facts"])

    def close(self) -> None:
        """End the process and all that it started."""
        self._pipe.close()


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a process answers; a ``Contestant``."""

    process: Elsewhere
    number: int
    label: str

    def answer(self, workload: Workload) -> Answer:
        """Generate everything there, timed there; raises ``FailedError``."""
        return self.process.answer(workload, variant=self.number)

    def close(self) -> None:
        """End the process; the other variants' too."""
        self.process.close()
