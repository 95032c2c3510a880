"""``check_manager`` on one subject, in a process of its own that can import it; prints the verdict as one line of JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Subject: module, adapter, its package, whether it keeps namespaces apart.
SUBJECTS = {
    "pagedkv": ("pagedkv.testing.adapters", "PagedKVAdapter", "pagedkv", True),
    "nano-vllm": ("nano_vllm_adapter", "NanoAdapter", "nano-vllm", False),
    "vllm": ("vllm_adapter", "VllmAdapter", "vllm", True),
    "vllm-at-once": ("rivals.vllm_adapters", "VllmAtOnceAdapter", "vllm", True),
    "vllm-pool": ("rivals.vllm_adapters", "VllmPoolAdapter", "vllm", False),
}


def main() -> None:
    """Check one subject and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=SUBJECTS, required=True)
    parser.add_argument("--path", help="folder to import it from, where it is not installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operations", type=int, required=True)
    args = parser.parse_args()
    if args.path:
        sys.path.append(args.path)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):  # what a rival prints must not mix with the verdict
        try:
            verdict = _verdict(args.subject, args.seed, args.operations)
        except ImportError as error:
            verdict = {"missing": f"it cannot be imported: {error.name or error}"}
    print(json.dumps(verdict))


def _verdict(subject: str, seed: int, num_operations: int) -> dict[str, Any]:
    from pagedkv.testing.manager_check import check_manager
    from pagedkv.testing.violations import ViolationError

    module, name, package, namespaces = SUBJECTS[subject]
    factory = getattr(importlib.import_module(module), name)
    factory(4, 2)  # an import error belongs here, not into the verdict
    about = {"version": _version(package)}
    began = perf_counter()
    try:
        report = check_manager(factory, seed=seed, num_operations=num_operations, block_sizes=(2, 3, 4), namespaces=namespaces)
    except ViolationError as violation:
        found = {"kind": violation.kind, "message": str(violation), "notes": list(violation.__notes__)}
        return {**about, "s": perf_counter() - began, **found}
    return {**about, "s": perf_counter() - began, **asdict(report)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        from rivals import nano_vllm

        return nano_vllm.version() if package == "nano-vllm" else "source"


if __name__ == "__main__":
    sys.path[0] = str(ROOT / "benchmarks")  # where `rivals` is found; this folder would hide the real vllm
    sys.path[1:1] = [str(ROOT / "examples"), str(ROOT)]  # where the adapters are, and pagedkv for an interpreter that has not installed it
    main()
