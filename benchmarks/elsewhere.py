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
from collections.abc import Mapping
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


class FailedError(Exception):
    """A contestant has no answer; the text says why, without any path."""


class Elsewhere:
    """A process that runs one module of ``generators/``; started when it is first needed, and again after it died.

    Args:
        module: file name in ``generators/`` without its ending.
        setup: what it loads.
        python: interpreter; this one where not given, and only then with this one's ``PYTHONPATH``.
        timeout_s: longest wait for one answer.
        environment: variables to set besides the number of threads.
    """

    def __init__(
        self, module: str, setup: Setup, *, python: str | None = None, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = [python or sys.executable, str(FOLDER / f"{module}.py")]
        self._setup, self._timeout_s = setup, timeout_s
        self._environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(setup.threads)), "HF_HUB_OFFLINE": "1"}
        self._environment.update(environment or {})
        if python is not None:
            self._environment.pop("PYTHONPATH", None)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._buffer = b""

    def variants(self) -> list[Variant]:
        """Start it; one contestant for each way in which it can answer.

        Raises:
            FailedError: it cannot load here.
        """
        return [Variant(self, number, label) for number, label in enumerate(self._start())]

    def answer(self, workload: Workload, *, variant: int) -> Answer:
        """Generate everything there.

        Raises:
            FailedError: it failed, died or took too long.
        """
        if self._process is None:
            self._start()
        self._send({"variant": variant, **asdict(workload)})
        message = self._receive(self._timeout_s)
        if "error" in message:
            raise FailedError(without_paths(message["error"]))
        return Answer(Times(**message["times"]), message["tokens"], message["facts"])

    def close(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _start(self) -> list[str]:
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
            raise FailedError(f"the interpreter did not start: {error.strerror}") from error
        self._send(asdict(self._setup))
        message = self._receive(LOADING_S)
        if "missing" in message:
            self.close()
            raise FailedError(without_paths(message["missing"]))
        labels: list[str] = message["labels"]
        return labels

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._dead() from error

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        stream, deadline = self._process.stdout.fileno(), monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - monotonic()))
            if not ready:
                self.close()
                raise FailedError(f"no answer within {timeout_s:,.0f} s")
            part = os.read(stream, 1 << 20)
            if not part:
                raise self._dead()
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _dead(self) -> FailedError:
        assert self._process is not None
        assert self._errors is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.poll()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
        self.close()
        return FailedError(without_paths(f"it ended with status {status}: {telling[-1].strip()}"))


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
