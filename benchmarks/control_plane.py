"""Microseconds of planning and bookkeeping: a decode step at 1 to 16,384 running sequences, and each command over pools of any size.

No model runs. nano-vLLM's and vLLM's schedulers do the same work beside ours, each in a process of its own, when they can be imported:
by this interpreter, by the one named with ``--vllm-python`` or ``--nano-vllm-python``, or from the folder named with ``--nano-vllm-path``.
What the figures compare is said by the notes that the script prints.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
from common import Report, Spread, arguments
from control_operations import OPERATIONS, measure_operations
from rivals import run_elsewhere
from rivals.workload import BLOCK_SIZE, VOCAB_SIZE, DecodeHarness, Workload, measure

from pagedkv.core import CheckLevel, KVCacheManager
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig

RUNNING = (1, 64, 256, 1_024, 4_096, 16_384)
RUNNING_QUICK = (1, 64, 256)
POOLS = (1_000, 10_000, 100_000, 1_000_000)
POOLS_QUICK = (1_000, 10_000)
FLAT_RUNNING = 1_024
FLAT_POOLS = (100_000, 1_000_000)
FLAT_ROUNDS = 3
LEVELS: tuple[CheckLevel, ...] = ("off", "step", "audit")
LEVELS_RUNNING = (64, 1_024)
LEVELS_RUNNING_QUICK = (64,)
AUDITED_STEPS = 32  # an audit looks at every sequence and block: fifty to a thousand times the price of a step
SEQUENCE_STEPS = 256_000  # steps x running sequences that are timed, within the limits below
FEWEST_STEPS, MOST_STEPS = 32, 512
NOTES = (
    "Spread: median (5th..95th percentile).",
    "Ours includes what a step's tensors are made from: token ids, positions, slots, lengths and tables as arrays. nano-vLLM and vLLM"
    " make those later, in their model runners, request by request; that time is not counted against them.",
    "All find prefixes by content: ours by exact tokens, nano-vLLM by a 64-bit hash with a comparison, vLLM by SHA-256. vLLM also serves"
    " what the others do not have here (LoRA, multi-modal input, speculative decoding, grammars); its loop asks for them at every request.",
)


class CoreHarness(DecodeHarness):
    """The bookkeeping alone: ``extend``, then ``complete``.

    Args:
        workload: what runs.
        num_blocks: size of the pool; the workload's own when not given.
    """

    def __init__(self, workload: Workload, *, num_blocks: int | None = None) -> None:
        self._workload = workload
        self._rng = np.random.default_rng(workload.seed + 1)
        self._manager = _manager(workload, num_blocks)

    def prefill(self) -> None:
        prompts = [np.array(prompt, dtype=np.int32) for prompt in self._workload.prompts()]
        self._seqs = self._manager.open(prompts).seqs
        self._seqs.flags.writeable = False  # the same frozen handles step after step need no second look
        self._manager.extend(self._seqs, np.array([len(prompt) for prompt in prompts], dtype=np.int32))
        self._manager.complete(self._seqs, self.answer(None))

    def plan(self) -> Any:
        return self._manager.extend(self._seqs, 1)

    def answer(self, plan: Any) -> Any:
        return self._rng.integers(0, VOCAB_SIZE, size=self._workload.num_running, dtype=np.int32)

    def complete(self, plan: Any, answer: Any) -> None:
        self._manager.complete(self._seqs, answer)

    def num_running(self, plan: Any) -> int:
        return int(plan.slot_mapping.shape[1])


class SchedulerHarness(DecodeHarness):
    """The scheduler, as the engine drives it: ``plan``, then ``complete``. Arguments as for ``CoreHarness``, and the check level."""

    def __init__(self, workload: Workload, *, num_blocks: int | None = None, check: CheckLevel = "off") -> None:
        self._workload = workload
        self._rng = np.random.default_rng(workload.seed + 1)
        config = SchedulerConfig(max_num_seqs=workload.num_running, max_num_batched_tokens=workload.num_prompt_tokens)
        self._scheduler = Scheduler(_manager(workload, num_blocks, check), config)

    def prefill(self) -> None:
        for number, prompt in enumerate(self._workload.prompts()):
            tokens = np.array(prompt, dtype=np.int32)
            self._scheduler.submit(Request(str(number), tokens, max_tokens=self._workload.max_new_tokens))
        plan = self.plan()
        self.complete(plan, self.answer(plan))

    def plan(self) -> Any:
        return self._scheduler.plan()

    def answer(self, plan: Any) -> Any:
        return self._rng.integers(0, VOCAB_SIZE, size=len(plan.sampling_seqs), dtype=np.int32)

    def complete(self, plan: Any, answer: Any) -> None:
        self._scheduler.complete(plan, answer)

    def num_running(self, plan: Any) -> int:
        return int(plan.num_decodes)


def main() -> None:
    """Measure, print, write."""
    args = _options()
    report = Report("control plane: microseconds to plan and to keep books", args.json)
    _steps(report, args)
    _levels(report, args)
    if not args.quick:
        _flatness(report, args)
    _operations(report, args)
    for note in NOTES:
        report.note(note)
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--nano-vllm-path", metavar="DIR", help="folder that holds nano-vLLM's package, where it is not installed")
    parser.add_argument("--nano-vllm-python", metavar="PATH", help="interpreter for nano-vLLM, which needs xxhash")
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter that has vLLM")
    parser.add_argument("--no-rivals", action="store_true", help="measure ours alone")
    return parser.parse_args()


def _manager(workload: Workload, num_blocks: int | None, check: CheckLevel = "off") -> KVCacheManager:
    return KVCacheManager(
        num_blocks=num_blocks or workload.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=workload.num_running,
        max_seq_len=workload.max_model_len,
        check=check,
    )


def _steps(report: Report, args: argparse.Namespace) -> None:
    rivals = {} if args.no_rivals else _rivals(report, args)
    columns = ["running sequences", "pagedkv", "pagedkv.core alone", *rivals, *(f"{name} / pagedkv" for name in rivals), "timed steps"]
    rows = []
    for num_running in RUNNING_QUICK if args.quick else RUNNING:
        workload = Workload(num_running, _num_steps(num_running, quick=args.quick), args.seed)
        ours = Spread.of(measure(workload, SchedulerHarness), scale=1e6)
        core = Spread.of(measure(workload, CoreHarness), scale=1e6)
        theirs = {name: _rival_step(report, name, options, workload) for name, options in rivals.items()}
        for name, spread in {"pagedkv": ours, "core": core, **theirs}.items():
            if spread is not None:
                report.figure(f"decode step, {name}, {num_running} running, us", spread)
        ratios = [None if spread is None else spread.median / ours.median for spread in theirs.values()]
        rows.append([num_running, ours, core, *theirs.values(), *ratios, workload.steps])
    report.table("Microseconds to plan and complete a decode step", columns, rows)


def _rivals(report: Report, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """How to run each rival that runs at all here; says why the others do not."""
    known: dict[str, dict[str, Any]] = {
        "nano-vLLM": {"module": "nano_vllm", "python": args.nano_vllm_python, "path": args.nano_vllm_path},
        "vLLM": {"module": "vllm", "python": args.vllm_python},
    }
    found = {}
    for name, options in known.items():
        probe = run_elsewhere(**options, num_running=1, steps=1, seed=args.seed)
        if probe.missing is None:
            found[name] = options
            report.figure(f"version, {name}", probe.version)
            print(f"{name}: {probe.version}", flush=True)
        else:
            report.note(f"{name}: left out, {probe.missing}")
    return found


def _rival_step(report: Report, name: str, options: dict[str, Any], workload: Workload) -> Spread | None:
    run = run_elsewhere(**options, num_running=workload.num_running, steps=workload.steps, seed=workload.seed)
    if run.missing is not None:
        report.note(f"{name}, {workload.num_running} running: not measured, {run.missing}")
        return None
    return Spread.of(run.seconds, scale=1e6)


def _num_steps(num_running: int, *, quick: bool) -> int:
    steps = min(max(SEQUENCE_STEPS // num_running, FEWEST_STEPS), MOST_STEPS) // BLOCK_SIZE * BLOCK_SIZE
    return min(steps, 64) if quick else steps


def _levels(report: Report, args: argparse.Namespace) -> None:
    rows = []
    for num_running in LEVELS_RUNNING_QUICK if args.quick else LEVELS_RUNNING:
        steps = _num_steps(num_running, quick=args.quick)
        spreads = []
        for level in LEVELS:
            workload = Workload(num_running, min(steps, AUDITED_STEPS) if level == "audit" else steps, args.seed)
            spreads.append(Spread.of(measure(workload, partial(SchedulerHarness, check=level)), scale=1e6))
            report.figure(f"decode step, check={level}, {num_running} running, us", spreads[-1])
        rows.append([num_running, *spreads, *(spread.median / spreads[0].median for spread in spreads[1:])])
    columns = ["running sequences", *(f'check="{level}"' for level in LEVELS), *(f"{level} / off" for level in LEVELS[1:])]
    report.table("Microseconds to plan and complete a decode step, by check level", columns, rows)


def _flatness(report: Report, args: argparse.Namespace) -> None:
    workload = Workload(FLAT_RUNNING, _num_steps(FLAT_RUNNING, quick=False), args.seed)
    seconds: dict[int, list[float]] = {num_blocks: [] for num_blocks in FLAT_POOLS}
    for _ in range(FLAT_ROUNDS):  # in turns, so that a machine that slows down for a while slows every pool
        for num_blocks in FLAT_POOLS:
            seconds[num_blocks] += measure(workload, partial(SchedulerHarness, num_blocks=num_blocks))
    spreads = {num_blocks: Spread.of(values, scale=1e6) for num_blocks, values in seconds.items()}
    for num_blocks, spread in spreads.items():
        report.figure(f"decode step, pagedkv, {FLAT_RUNNING} running, pool of {num_blocks} blocks, us", spread)
    title = f"Microseconds to plan and complete a decode step of {FLAT_RUNNING:,} sequences, by size of the pool"
    report.table(title, ["blocks", "pagedkv"], list(spreads.items()))


def _operations(report: Report, args: argparse.Namespace) -> None:
    sizes = POOLS_QUICK if args.quick else POOLS
    spreads = measure_operations(sizes, repeats=10 if args.quick else 100, seed=args.seed)
    rows = [[name, *(spreads[size][name] for size in sizes)] for name in OPERATIONS]
    for size in sizes:
        for name in OPERATIONS:
            report.figure(f"{name}, pool of {size} blocks, us", spreads[size][name])
    report.table("Microseconds of each command", ["command", *(f"{size:,} blocks" for size in sizes)], rows)


if __name__ == "__main__":
    main()
