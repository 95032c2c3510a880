"""A recorded trace through the real scheduler and manager: block hit rates one request at a time, and a loaded replay with checks.

Without ``--trace``, a generated trace with the statistics of Mooncake's synthetic one. The hit rates are compared with a cache simulation
of a few lines that shares no code with the manager.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from common import Report, arguments

from pagedkv.testing.trace_files import FORMATS, read_trace
from pagedkv.testing.trace_generator import KINDS, generate_trace
from pagedkv.testing.trace_replay import StepCost, TraceReport, replay_one_by_one, replay_trace
from pagedkv.testing.traces import Trace

POOLS = (None, 2_000, 8_000, 32_000)  # blocks; at 512 tokens 1.024, 4.096 and 16.384 million tokens
POOLS_QUICK = (None, 400)
NUM_REQUESTS, NUM_REQUESTS_QUICK = 3_993, 100
LOADED_BLOCK_SIZE = 4
LOADED_FACTOR = 128  # a hash id of 512 tokens becomes one block of 4
LOADED_BLOCKS = (2_000, 8_000)
AUDITED_REQUESTS = 400  # an audit after every command costs hundreds of times what the command does
LOADED_COST = StepCost(step_s=0.02, token_s=0.004)
NOTES = (
    "One at a time, whole blocks: every hash id stands for a block of 2 tokens, one token follows the prompt and one is generated, so that"
    " all blocks of a prompt can be found. Pools count the blocks that can stay cached.",
    "One at a time, true lengths: prompts as long as recorded, blocks of the trace's own size. A last block that is not full is never"
    " shared, so it takes no room in the cache either: fewer hits in an endless one, more in a small one. The last token of a prompt is"
    " always computed anew, with its block where it fills one. Full blocks of outputs are cached as well. The simulation knows all three.",
    "The simulation: an ordered dictionary of block ids; a prompt's prefix is looked up, then all its blocks are used, the tail the"
    " longest ago.",
    "Loaded: every length divided by 128, rounded up, and blocks of 4, so that block counts are those of 512 tokens; requests come when"
    " the trace says so, on a virtual clock on which a step takes 20 ms and 4 ms for each of these tokens (32,000 whole ones a second)."
    f" 'audit' is every invariant of manager and scheduler after every command, for the first {AUDITED_REQUESTS} requests.",
)


def main() -> None:
    """Replay, print, write."""
    args = _options()
    trace = _trace(args)
    report = Report("traces: requests through scheduler and manager without a model", args.json)
    _describe(report, trace, source="read from a file" if args.trace else f"generated, seed {args.seed}")
    if trace.hash_block_size:
        _one_by_one(report, trace, POOLS_QUICK if args.quick else POOLS, true_lengths=args.true_lengths)
    _loaded(report, trace, (400,) if args.quick else LOADED_BLOCKS)
    for note in NOTES:
        report.note(note)
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, metavar="PATH", help=f"a file of the format {', '.join(FORMATS)}")
    parser.add_argument("--kind", choices=KINDS, default="mooncake", help="what to generate without --trace")
    parser.add_argument("--true-lengths", action="store_true", help="one at a time at the recorded lengths as well; minutes")
    parser.add_argument("--requests", type=int, metavar="N", help="read or generate so many")
    return parser.parse_args()


def _trace(args: argparse.Namespace) -> Trace:
    if args.trace is not None:
        return read_trace(args.trace, max_requests=args.requests or (NUM_REQUESTS_QUICK if args.quick else None))
    return generate_trace(args.kind, args.requests or (NUM_REQUESTS_QUICK if args.quick else NUM_REQUESTS), args.seed)


def _describe(report: Report, trace: Trace, source: str) -> None:
    found = trace.statistics()
    rows = [
        ("requests", found.num_requests),
        ("duration, s", found.duration_s),
        ("requests a second", found.requests_per_s),
        ("prompt tokens, mean", found.mean_prompt_len),
        ("prompt tokens at 10, 50, 90, 99 %", " ".join(map(str, found.prompt_lens))),
        ("output tokens, mean", found.mean_output_len),
        ("output tokens at 10, 50, 90, 99 %", " ".join(map(str, found.output_lens))),
        ("blocks of all prompts", found.num_hash_ids),
        ("of them seen before, %", 100 * found.reuse),
    ]
    report.table(f"The trace: {trace.kind}, {source}", ("what", "value"), rows)
    for name, value in rows:
        report.figure(f"trace, {name}", value)


def _one_by_one(report: Report, trace: Trace, pools: tuple[int | None, ...], *, true_lengths: bool) -> None:
    whole = trace.as_whole_blocks()
    rows = []
    for size in pools:
        name = f"{size:,} blocks" if size else "endless"
        began = perf_counter()
        found = replay_one_by_one(whole, num_blocks=size)
        seconds = perf_counter() - began
        pool = size or sys.maxsize
        simulated = 100 * simulated_hit_rate(trace, pool)
        true = 100 * replay_one_by_one(trace, num_blocks=size).block_hit_rate if true_lengths else None
        simulated_true = 100 * simulated_hit_rate(trace, pool, true_lengths=True)
        rows.append((name, 100 * found.block_hit_rate, simulated, true, simulated_true, found.num_evicted_blocks, seconds))
        for what, value in zip(
            ("block hit rate %", "simulated %", "true lengths %", "true lengths simulated %", "evicted", "s"), rows[-1][1:], strict=True
        ):
            report.figure(f"one by one, {name}, {what}", value)
    shown = [(row[0], *(None if rate is None else f"{rate:.2f}" for rate in row[1:5]), *row[5:]) for row in rows]
    columns = ("cache", "block hit rate %", "simulated %", "at true lengths %", "simulated at true lengths %", "blocks evicted", "s")
    report.table("One request at a time", columns, shown)


def simulated_hit_rate(trace: Trace, num_blocks: int, *, true_lengths: bool = False) -> float:
    """Share of the hash ids that a least-recently-used cache of so many blocks finds.

    Args:
        trace: with hash ids.
        num_blocks: that the cache can hold.
        true_lengths: whether only full blocks are kept, those that the output fills included, and the last prompt token is never looked up.
    """
    cache: OrderedDict[object, None] = OrderedDict()
    hits = touched = 0
    for index, request in enumerate(trace.requests):
        touched += len(request.hash_ids)
        looked_up: list[object] = [*request.hash_ids]
        kept = looked_up
        if true_lengths:
            length, size = request.num_prompt_tokens, trace.hash_block_size
            num_full = (length + request.num_output_tokens - 1) // size  # the last token that is generated is never computed
            kept = [*looked_up[: length // size], *((index, place) for place in range(length // size, num_full))]
            looked_up = looked_up[: (length - 1) // size]
        for number in looked_up:
            if number not in cache:
                break
            hits += 1
        for number in reversed(kept):
            cache[number] = None
            cache.move_to_end(number)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits / touched


def _loaded(report: Report, trace: Trace, pools: tuple[int, ...]) -> None:
    """Requests as they come; without hash ids there is nothing to keep whole, and lengths are divided all the same."""
    small = trace.shrink(LOADED_FACTOR)
    rows = []
    for num_blocks in pools:
        for check in ("off", "step", "audit"):
            began = perf_counter()
            served = replace(small, requests=small.requests[:AUDITED_REQUESTS]) if check == "audit" else small
            found = replay_trace(
                served, num_blocks=num_blocks, block_size=LOADED_BLOCK_SIZE, max_num_batched_tokens=512, cost=LOADED_COST, check=check
            )
            seconds = perf_counter() - began
            rows.append((f"{num_blocks:,} blocks, {check}", *_row(found), seconds))
            name = f"loaded, {num_blocks} blocks, {check}"
            for what, value in zip(COLUMNS[1:], rows[-1][1:], strict=True):
                report.figure(f"{name}, {what}", value)
    report.table("As they come", COLUMNS, rows)


COLUMNS = (
    "pool, check",
    "finished",
    "refused",
    "steps",
    "hit rate %",
    "preemptions",
    "evicted",
    "peak running",
    "peak waiting",
    "checks",
    "s",
)


def _row(found: TraceReport) -> tuple[object, ...]:
    peaks = (found.peak_running, found.peak_waiting)
    return (
        found.num_finished,
        found.num_refused,
        found.num_steps,
        100 * found.hit_rate,
        found.num_preemptions,
        found.num_evicted_blocks,
        *peaks,
        found.num_checks,
    )


if __name__ == "__main__":
    main()
