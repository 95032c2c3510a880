"""Microseconds of a model's linear layers and milliseconds of its steps: as they are, with repacked weights, merged, and in eight bits.

A layer is measured over its copies in all layers of the model, one after the other, so that weights come from memory as in a step. Ways
take turns. A step decodes one token for each of so many sequences, attention included. Beside our products with weights of eight bits
stands torch's own operator for them, of few rows only: above, it takes up to seventy times as long as the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from common import Report, Spread, arguments
from models_by_name import NAMES as MODELS
from models_by_name import model_by_name
from torch import Tensor, nn
from transformers import PreTrainedModel

from pagedkv.attention.native.library import load_library
from pagedkv.models import ModelRunner
from pagedkv.models.int8_weights import quantised
from pagedkv.models.linear_products import PackedProduct
from pagedkv.storage import BatchBuilder
from pagedkv.testing.plans import make_plan

PLAIN, PACKED, MERGED, NATIVE, INT8, TORCH_INT8 = "plain", "packed", "merged", "native", "int8", "torch's int8"
USED = "what a step runs"
ROWS = (1, 4, 16, 64, 256)
STEP_ROWS = (1, 16, 64)
CONTEXT, BLOCK_SIZE = 64, 16
MOST_COPIES = 16
MOST_TORCH_ROWS = 4

Way = Callable[[Tensor], object]


def main() -> None:
    """Load the model, measure its layers and its steps, print, write."""
    args = _options()
    torch.set_num_threads(args.threads)
    report = Report("linear: layers with repacked weights beside F.linear", args.json)
    model = model_by_name(args.model, dtype=getattr(torch, args.dtype), seed=args.seed)
    report.note(f"model {args.model}, {args.dtype}, {torch.get_num_threads()} threads, {args.repeats} rounds" + (", quick" * args.quick))
    with torch.no_grad():
        wanted: dict[str, bool | Literal["int8"]] = {PLAIN: False, PACKED: True, INT8: "int8"}
        runners = {name: ModelRunner(model, pack_linears=value) for name, value in wanted.items()}
        packing = runners[PACKED].packing
        report.note(f"{len(packing.packed)} layers packed, {len(packing.merged)} groups merged, {packing.nbytes:,} bytes of copies")
        report.figure("packed bytes", packing.nbytes)
        report.figure("packed layers", len(packing.packed))
        error, check = runners[INT8].packing.weight_error, runners[INT8].report.int8
        report.figure("int8 bytes", runners[INT8].packing.nbytes)
        report.figure("int8 weight error", error)
        if check is not None:
            report.figure("int8 logit error", check.max_relative_error)
            report.figure("int8 argmax agreement", check.argmax_agreement)
            report.note(
                f"int8: {runners[INT8].packing.nbytes:,} bytes of copies; weights differ by {error:.2%}, logits of random tokens by at "
                f"most {check.max_relative_error:.1%} of the largest, {check.argmax_agreement:.1%} of next tokens agree"
            )
        _layers(report, model, runners[PACKED], args)
        _steps(report, runners, args)
    report.note("Spread: median (5th..95th percentile).")
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help=MODELS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 2
    return args


def _layers(report: Report, model: PreTrainedModel, runner: ModelRunner, args: argparse.Namespace) -> None:
    """Every distinct shape of product of the model, at every number of rows."""
    generator = torch.Generator().manual_seed(args.seed)
    library = load_library().library
    if library is None:
        raise SystemExit("the native library is missing: see python -m pagedkv doctor")
    rows = []
    for label, copies in _shapes(model, runner).items():
        merged = [PackedProduct(linears) for linears in copies]
        native, int8 = ([PackedProduct(linears, library) for linears in copies] for _ in range(2))
        has_native = all(product.pairs is not None for product in native)
        for product in int8:
            product.quantise()
        torch_int8 = [_torch_int8(linears) for linears in copies]
        single = [[PackedProduct([linear]) for linear in linears] for linears in copies]
        for count in ROWS:
            x = torch.randn((1, count, copies[0][0].in_features), generator=generator).to(model.dtype)
            ways: dict[str, list[Way]] = {
                PLAIN: [_plainly(linears) for linears in copies],
                PACKED: [_packed(products) for products in single],
                MERGED: [_packed([product]) for product in merged],
                INT8: [_packed([product]) for product in int8],
                TORCH_INT8: torch_int8,
            }
            if len(copies[0]) == 1:
                del ways[MERGED]
            if has_native:
                ways[NATIVE] = [_packed([product]) for product in native]
            if count > MOST_TORCH_ROWS:
                del ways[TORCH_INT8]
            spreads = _turns({name: [partial(way, x) for way in each] for name, each in ways.items()}, args.repeats, scale=1e6)
            for name, spread in spreads.items():
                report.figure(f"{label}, {count} rows, {name}, us", spread)
            used = next(spreads[name] for name in (NATIVE, MERGED, PACKED) if name in spreads)
            columns = [spreads.get(name) for name in (PLAIN, PACKED, MERGED, NATIVE, INT8, TORCH_INT8)]
            rows.append([label, count, *columns, spreads[PLAIN].median / used.median, used.median / spreads[INT8].median])
    heads = ["layer", "rows", PLAIN, PACKED, MERGED, NATIVE, INT8, TORCH_INT8, f"{PLAIN} / {USED}", f"{USED} / {INT8}"]
    report.table("one layer or group of layers, us", heads, rows)


def _shapes(model: PreTrainedModel, runner: ModelRunner) -> dict[str, list[list[nn.Linear]]]:
    """The packed products by the last parts of their names and their sizes, each with its copies all over the model."""
    packing = runner.packing
    together = {name for group in packing.merged for name in group}
    groups = [*packing.merged, *((name,) for name in packing.packed if name not in together)]
    shapes: dict[str, list[list[nn.Linear]]] = {}
    for group in groups:
        linears = [linear for name in group if isinstance(linear := model.get_submodule(name), nn.Linear)]
        outputs = "+".join(str(linear.out_features) for linear in linears)
        label = f"{'+'.join(name.rpartition('.')[2] for name in group)} {linears[0].in_features}->{outputs}"
        copies = shapes.setdefault(label, [])
        if len(copies) < MOST_COPIES:
            copies.append(linears)
    return shapes


def _plainly(linears: Sequence[nn.Linear]) -> Way:
    return lambda x: [F.linear(x, linear.weight, linear.bias) for linear in linears]


def _packed(products: Sequence[PackedProduct]) -> Way:
    return lambda x: [product.result(x, place) for product in products for place in range(len(product.linears))]


def _torch_int8(linears: Sequence[nn.Linear]) -> Way:
    rounded = quantised(torch.cat([linear.weight for linear in linears]))
    scale = rounded.scale.to(linears[0].weight.dtype)
    return lambda x: torch._weight_int8pack_mm(x[0], rounded.weight, scale)


def _steps(report: Report, runners: dict[str, ModelRunner], args: argparse.Namespace) -> None:
    """Whole decode steps of the model."""
    rows = []
    per = CONTEXT // BLOCK_SIZE
    for count in STEP_ROWS:
        tables = [[1 + row * per + block for block in range(per)] for row in range(count)]
        tokens = np.random.default_rng(args.seed).integers(0, runners[PLAIN].vocab_size, size=count)
        plan = make_plan([1] * count, [CONTEXT] * count, block_tables=tables, block_size=BLOCK_SIZE, token_ids=tokens)
        batch = BatchBuilder(runners[PLAIN].device, BLOCK_SIZE).build(plan)
        storage = runners[PLAIN].new_storage(count * per + 1)
        spreads = _turns({name: [partial(runner.forward, batch, storage)] for name, runner in runners.items()}, args.repeats, scale=1e3)
        storage.close()
        for name, spread in spreads.items():
            report.figure(f"step, {count} rows, {name}, ms", spread)
        medians = [spreads[name].median for name in (PLAIN, PACKED, INT8)]
        rows.append([count, *spreads.values(), medians[0] / medians[1], medians[1] / medians[2]])
    heads = ["rows", PLAIN, USED, INT8, f"{PLAIN} / {USED}", f"{USED} / {INT8}"]
    report.table(f"a decode step over {CONTEXT} tokens of context, ms", heads, rows)


def _turns(ways: Mapping[str, Sequence[Callable[[], object]]], repeats: int, *, scale: float) -> dict[str, Spread]:
    """Time each way over all its copies in turn; a measurement is a round's mean over the copies."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, copies in ways.items():
            began = perf_counter()
            for call in copies:
                call()
            if number:
                seconds[name].append((perf_counter() - began) / len(copies))
    return {name: Spread.of(values, scale=scale) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
