"""How a process that runs vLLM on the CPU should begin: with Intel's OpenMP and tcmalloc loaded before all else, says its documentation."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path

VARIABLE = "LD_PRELOAD"


def load_first_what_vllm_wants(script: str) -> None:
    """Run a script again with those of the two that are installed, which only the start of a process can do; once.

    Args:
        script: its file.
    """
    openmp = Path(sys.prefix, "lib", "libiomp5.so")  # a dependency of vLLM's package
    libraries = [str(openmp)] if openmp.is_file() else []
    libraries += [name for name in (ctypes.util.find_library("tcmalloc_minimal"),) if name is not None]
    if libraries and VARIABLE not in os.environ:
        os.environ[VARIABLE] = ":".join(libraries)
        os.execv(sys.executable, [sys.executable, script])


def loaded_first() -> list[str]:
    """Their names."""
    return [Path(name).name.partition(".")[0] for name in os.environ.get(VARIABLE, "").split(":") if name]
