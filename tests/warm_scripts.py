"""Scripts in processes of their own that need not import torch and transformers first: each is forked from a clean one that has."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

IMPORTED = ["pagedkv.llm", "pagedkv.testing.models", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a script ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def run_script(
    path: Path,
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    warnings_are_errors: bool = False,
) -> Ended:
    """Run a Python file as ``python path arguments`` in ``folder`` does, but for the time of the imports.

    The return code is None where it was stopped after ``timeout_s``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with TemporaryDirectory() as printed:
        files = [Path(printed, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(path, arguments, folder, dict(environment), files, warnings_are_errors))
        process.start()
        process.join(timeout_s)
        returncode = process.exitcode
        process.kill()
        process.join()
        return Ended(returncode, *(file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in files))


def _run(
    path: Path, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], files: Sequence[Path], warnings_are_errors: bool
) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), stream.fileno())
        stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    gc.freeze()  # what the server imported is never garbage
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    if warnings_are_errors:
        warnings.simplefilter("error")
    main = ModuleType("__main__")
    main.__file__ = str(path)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # the second: what processes of its own send back is of that name
    exec(compile(path.read_bytes(), str(path), "exec"), main.__dict__)
