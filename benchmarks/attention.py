"""Attention alone: K/V bytes a second of decodes and operations a second of prefill, against what the machine can do at best.

Every backend of pagedkv that is registered, torch's own attention over contiguous K and V without pages as a yardstick, and vLLM's CPU
operator in a process of its own where ``--vllm-python`` names an interpreter that has it. One call is one layer; each call takes another
layer's K and V, of which there are so many that they come from memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import sleep
from typing import Any

import torch
import torch.nn.functional as F
from attention_work import Shape, Work, shapes
from common import Report, Spread, arguments
from contest import second_pass, turns
from elsewhere import FOLDER, FailedError, Pipe
from machine_limits import CHUNK_NBYTES, Limits, scattered_reads
from torch import Tensor

from pagedkv.attention import AttentionBackend
from pagedkv.attention.registry import BACKENDS, get_backend

YARDSTICK, VLLM, READS = "torch, contiguous", "vLLM operator", "scattered reads"
ORACLE = "reference"
OURS = "cpu"
LIMIT_NBYTES, LIMIT_NBYTES_QUICK = 512 << 20, 16 << 20
WORST_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}
REST_S = 0.5  # after a pass in another process
NOTES = (
    "Spread: median (5th..95th percentile) over calls, one call being one layer. All run in turns, two passes over all layers each, of"
    f" which the second is measured; the vLLM operator in its own process, after which {REST_S} seconds pass: its threads look for more"
    " work for a while.",
    "Decode: GB/s of the K and V that the sequences hold, read once; % is of reading as many bytes in chunks in random order, a chunk being"
    " what one head of a block holds, in turns with the others. Prefill: GFLOP/s of what the causal mask leaves; % is of a large product in"
    " that dtype.",
    "Not timed: writing K and V, and what is worked out once per step for all layers (pagedkv: plan and layout; vLLM: its scheduler"
    " metadata). Error: largest difference from the yardstick's first layer, for vLLM from torch's attention on its own numbers.",
)

Attend = Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each call, and how far the result is off; or the reason why there are none."""

    seconds: Sequence[float] = ()
    error: float | None = None
    reason: str | None = None


def main() -> None:
    """Measure, print, write."""
    args = _options()
    report = Report("attention: K/V bytes and operations a second, against the machine's best", args.json)
    pipe = None if args.vllm_python is None else _vllm(report, args)
    if args.vllm_python is None:
        report.note(f"{VLLM}: left out, no option says where it is")
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        limits = _limits(report, args, threads)
        for dtype in args.dtypes:
            rows: list[list[object]] = []
            for shape in _steps(dtype, args):
                results = _measure(shape, args, None if pipe is None else Elsewhere(pipe, shape, args, threads=threads))
                rows += [_row(report, shape, name, results, limits=limits, args=args) for name in results]
            columns = ["step", "who", "milliseconds", f"/ {OURS}'s", "GB/s or GFLOP/s", "% of best", "error"]
            report.table(f"{dtype}, {threads} thread{'s' if threads > 1 else ''}", columns, rows)
    if pipe is not None:
        pipe.close()
    for note in NOTES:
        report.note(note)
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    names = [name for name in BACKENDS if name != ORACLE]
    parser.add_argument("--backends", type=lambda text: text.split(","), default=names, help=f"of {', '.join(BACKENDS)}; {ORACLE} is slow")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"], help="of Q, K and V")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="beside 1")
    parser.add_argument("--block-size", type=int, default=16, help="of pagedkv; vLLM's operator wants 32")
    parser.add_argument("--passes", type=int, default=5, help="over all layers that are measured, after one that is not")
    parser.add_argument("--megabytes", type=int, default=192, help="of K and V in all layers: several times the caches")
    parser.add_argument(
        "--step", action="append", metavar="TEXT", help="only steps with this in their name, as in the table; may be repeated"
    )
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter that has vLLM")
    args = parser.parse_args()
    if args.quick:
        args.passes, args.megabytes = 1, 1
    return args


def _steps(dtype: str, args: argparse.Namespace) -> list[Shape]:
    every = shapes(dtype, seed=args.seed, quick=args.quick)
    some = [shape for shape in every if args.step is None or any(text in str(shape) for text in args.step)]
    if not some:
        raise SystemExit(f"--step {args.step}: no step's name has any of it; there are {'; '.join(map(str, every))}")
    return some


def _limits(report: Report, args: argparse.Namespace, threads: int) -> Limits:
    nbytes = LIMIT_NBYTES_QUICK if args.quick else LIMIT_NBYTES
    limits = Limits.measure(
        nbytes=nbytes, repeats=3 if args.quick else 7, dtypes=args.dtypes, generator=torch.Generator().manual_seed(args.seed)
    )
    rows: list[list[object]] = [["GB/s in order", limits.sequential / 1e9]]
    rows += [[f"GB/s in chunks of {size // 1024} KiB, in random order", limits.scattered[size] / 1e9] for size in CHUNK_NBYTES]
    rows += [[f"GFLOP/s of a {dtype} product", limits.multiply[dtype] / 1e9] for dtype in args.dtypes]
    for title, value in rows:
        report.figure(f"best, {threads} threads, {title}", value)  # type: ignore[arg-type]  # a float
    report.table(f"The machine at its best, {threads} thread{'s' if threads > 1 else ''}", ["what", "best of its repeats"], rows)
    return limits


class Elsewhere:
    """An operator in another process, over as many bytes as the work here.

    Attributes:
        error: how far its result is off; None where it failed.
        reason: why it failed; None where it did not.
    """

    def __init__(self, pipe: Pipe, shape: Shape, args: argparse.Namespace, *, threads: int) -> None:
        self._pipe = pipe
        self.reason: str | None = None
        self.error: float | None = self._ask({**asdict(shape), "threads": threads, "nbytes": args.megabytes << 20}).get("difference")

    def run_pass(self) -> list[float]:
        """Seconds of each layer's call; none where it failed."""
        seconds: list[float] = [] if self.reason is not None else self._ask({}).get("seconds", [])
        sleep(REST_S)
        return seconds

    def _ask(self, order: dict[str, object]) -> dict[str, Any]:
        try:
            return self._pipe.ask(order, timeout_s=600)
        except FailedError as error:
            self.reason = str(error)
            return {}


def _measure(shape: Shape, args: argparse.Namespace, elsewhere: Elsewhere | None) -> dict[str, Measured]:
    """Everybody, in turns."""
    generator = torch.Generator().manual_seed(args.seed)
    work = Work(shape, nbytes=args.megabytes << 20, block_size=args.block_size, generator=generator)
    results: dict[str, Measured] = {}
    ways: dict[str, Attend] = {}
    for name in args.backends:
        backend = get_backend(name, device="cpu")
        reason = backend.supports(work.spec)
        if reason is None:
            ways[name] = _paged(work, backend)
        else:
            results[name] = Measured(reason=reason)
    ways[YARDSTICK] = _contiguous(work)
    attending = list(ways)
    if shape.is_decode:
        ways[READS] = _reads(work, generator)
    passes: dict[str, Callable[[], list[float]]] = {name: partial(second_pass, way, work.num_layers) for name, way in ways.items()}
    if elsewhere is not None:
        passes[VLLM] = elsewhere.run_pass
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        truth = ways[YARDSTICK](0).float()
        errors = {name: float((ways[name](0).float() - truth).abs().max()) for name in attending}
        for number in range(1 + args.passes):
            for name in turns(list(passes), number):
                one_pass = passes[name]()
                seconds[name] += one_pass if number else []
    measured = {name: Measured(seconds[name], errors.get(name)) for name in ways}
    if elsewhere is not None:
        measured[VLLM] = Measured(seconds[VLLM], elsewhere.error, elsewhere.reason)
    return {**measured, **results}


def _reads(work: Work, generator: torch.Generator) -> Attend:
    """The least that a decode could do: as many bytes, in chunks as large as one head of a block."""
    chunk = work.batch.block_size * work.shape.dim * work.dtype.itemsize
    calls = scattered_reads(work.shape.nbytes, work.num_layers, chunk_nbytes=chunk, generator=generator)
    return lambda layer: calls[layer]()


def _paged(work: Work, backend: AttentionBackend) -> Attend:
    step, layers = backend.plan(work.batch), work.storage.layers
    return lambda layer: backend.attend(work.query, layers[layer], step, work.options)


def _contiguous(work: Work) -> Attend:
    """torch's fused attention: decodes with query groups folded into rows, in one call where lengths are equal."""
    shape, layers = work.shape, work.contiguous
    group = shape.num_heads // shape.num_kv_heads
    if shape.is_decode:
        grouped = work.query.view(-1, shape.num_kv_heads, group, shape.dim)
        queries = torch.split(grouped, len(shape.seq_lens) // len(layers[0]))

        def decode(layer: int) -> Tensor:
            pairs = zip(queries, layers[layer], strict=True)
            return torch.cat([F.scaled_dot_product_attention(query, key, value) for query, (key, value) in pairs]).view(work.query.shape)

        return decode
    (new,), (length,) = shape.query_lens, shape.seq_lens
    query = work.query.transpose(0, 1)[None]
    mask = None if new == length else torch.arange(length) <= torch.arange(length - new, length)[:, None]

    def prefill(layer: int) -> Tensor:
        key, value = layers[layer][0]
        result = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        return result[0].transpose(0, 1)

    return prefill


def _vllm(report: Report, args: argparse.Namespace) -> Pipe | None:
    pipe = Pipe([args.vllm_python, str(FOLDER.parent / "rivals" / "vllm_attention.py")], threads=args.threads, own=False)
    try:
        greeting = pipe.start({"seed": args.seed})
    except FailedError as error:
        report.note(f"{VLLM}: left out, {error}")
        return None
    report.figure("version, vLLM", greeting["version"])
    print(f"vLLM {greeting['version']}", flush=True)
    return pipe


def _row(
    report: Report, shape: Shape, name: str, results: dict[str, Measured], *, limits: Limits, args: argparse.Namespace
) -> list[object]:
    title, result = f"{shape}, {shape.dtype}, {torch.get_num_threads()} threads, {name}", results[name]
    if result.reason is not None:
        report.figure(f"{title}, not measured", result.reason)
        return [str(shape), f"{name}: {result.reason}", *[None] * 5]
    times = Spread.of(result.seconds, scale=1e3)
    ours = results[OURS].seconds if OURS in results else ()
    ratio = times.median / Spread.of(ours, scale=1e3).median if ours else None
    if shape.is_decode:
        amount, unit = shape.nbytes, "GB/s"
        best = amount / Spread.of(results[READS].seconds).median
    else:
        amount, unit, best = shape.flops, "GFLOP/s", limits.multiply[shape.dtype]
    rate = Spread.of([amount / value / 1e9 for value in result.seconds])
    share = 100 * rate.median * 1e9 / best
    error = "" if name == READS else _judged(result.error, shape.dtype)
    report.figure(f"{title}, ms", times)
    report.figure(f"{title}, times as long as {OURS}'s", ratio)
    report.figure(f"{title}, {unit}", rate)
    report.figure(f"{title}, % of best", share)
    report.figure(f"{title}, largest error", result.error)
    return [str(shape), name, times, ratio, rate, share, error]


def _judged(error: float | None, dtype: str) -> str:
    if error is None:
        return "unknown, WRONG"
    return f"{error:.1e}{', WRONG' if error > WORST_ERROR[dtype] else ''}"


if __name__ == "__main__":
    main()
