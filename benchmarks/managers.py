"""Block managers of others and ours under ``check_manager``: the same random sessions and oracles, and in what operations a promise fails.

nano-vLLM's and vLLM's run in processes of their own, when they can be imported: by this interpreter, by the one named with
``--vllm-python`` or ``--nano-vllm-python``, or from the folder named with ``--nano-vllm-path``. No model runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Report, arguments, without_paths

SCRIPT = Path(__file__).resolve().parent / "rivals" / "check_adapter.py"
OPERATIONS, OPERATIONS_QUICK = 20_000, 500
TIMEOUT_S = 900
SUBJECTS = {
    "pagedkv": "pagedkv: KVCacheManager, with forks and namespaces",
    "nano-vllm": "nano-vLLM: BlockManager",
    "vllm": "vLLM: KVCacheManager, told to make blocks findable after their step (delay_cache_blocks); salts as namespaces",
    "vllm-at-once": "vLLM: KVCacheManager, called as its scheduler calls it",
    "vllm-pool": "vLLM: BlockPool alone, with get_new_blocks and free_blocks",
}
NOTES = (
    "Promises: free and held blocks sum to the pool; no table holds a block twice; each sequence reads through its table exactly its own"
    " tokens of its own namespace; what fits is not refused; a refusal, and freeing an ended sequence once more, change nothing.",
    "Sessions: blocks of 2 to 4 tokens, pools of 4 to 20 blocks, two different tokens, sequences that end before their tokens are stored.",
    "vLLM as its scheduler calls it: the full blocks of a step can be found once their slots are allocated, before the step has run. Its"
    " scheduler runs each step that it plans, and a sequence that finds such a block runs in the same step or a later one, so this is"
    " no fault of its engine; it is one for who plans steps that may not run.",
    "vLLM's BlockPool: free_blocks lowers reference counts without looking whether they are above zero. Blocks that were handed to"
    " somebody else in between become free while they are held. Its KVCacheManager forgets a request's blocks when it frees them, so that"
    " freeing the same request once more does nothing: the promise is kept there, one layer up.",
    "nano-vLLM's own configuration allows only blocks of a multiple of 256 tokens; the manager itself is made for any size from 2 on.",
)


def main() -> None:
    """Check each, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--operations", type=int, help="for each manager")
    parser.add_argument("--nano-vllm-python", metavar="PATH", help="interpreter that can import what nano-vLLM needs")
    parser.add_argument("--nano-vllm-path", metavar="PATH", help="folder with nano-vLLM's source")
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter that can import vLLM")
    args = parser.parse_args()
    num_operations = args.operations or (OPERATIONS_QUICK if args.quick else OPERATIONS)
    report = Report("managers: random sessions with oracles on block managers", args.json)
    rows, findings = [], []
    for subject, label in SUBJECTS.items():
        python = {"nano-vllm": args.nano_vllm_python, "pagedkv": None}.get(subject, args.vllm_python)
        verdict = check(subject, num_operations, args.seed, python=python, path=args.nano_vllm_path if subject == "nano-vllm" else None)
        rows.append((label, verdict.get("version"), verdict.get("operations"), verdict.get("refusals"), outcome(verdict), verdict.get("s")))
        report.figure(f"{subject}, version", verdict.get("version"))
        report.figure(f"{subject}, outcome", outcome(verdict))
        report.figure(f"{subject}, operations", verdict.get("operations"))
        if "kind" in verdict:
            findings.append(
                f"{label}, {verdict['version']}: {verdict['message']}. The shortest sequence found:\n" + "\n".join(verdict["notes"])
            )
            report.figure(f"{subject}, sequence", findings[-1])
    report.table("Managers", ("manager", "version", "operations", "refusals", "outcome", "s"), rows)
    for text in (*findings, *NOTES):
        report.note(text)
    report.finish()


def check(subject: str, num_operations: int, seed: int, *, python: str | None, path: str | None) -> dict[str, Any]:
    """The verdict of ``check_adapter.py``; ``missing`` says why there is none."""
    command = [python or sys.executable, str(SCRIPT), "--subject", subject, "--operations", str(num_operations), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if python is not None:
        environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [*command, *(["--path", path] if path else [])],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"missing": without_paths(f"it did not run: {error}")}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"missing": without_paths(f"it failed with status {done.returncode}: {reason}")}
    verdict: dict[str, Any] = json.loads(lines[-1])
    return verdict


def outcome(verdict: dict[str, Any]) -> str:
    """In a word or a few."""
    if "missing" in verdict:
        return f"not tried: {verdict['missing']}"
    return f"violation: {verdict['kind']}" if "kind" in verdict else "no violation"


if __name__ == "__main__":
    main()
