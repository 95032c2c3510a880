"""Microseconds of a model's linear layers and milliseconds of its steps: as they are, with repacked weights, and merged.

A layer is measured over its copies in all layers of the model, one after the other, so that weights come from memory as in a step. Ways
take turns. A step decodes one token for each of so many sequences, attention included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from common import Report, Spread, arguments
from models_by_name import NAMES as MODELS
from models_by_name import model_by_name
from torch import Tensor, nn
from transformers import PreTrainedModel

from pagedkv.models import ModelRunner
from pagedkv.models.linear_products import PackedProduct
from pagedkv.storage import BatchBuilder
from pagedkv.testing.plans import make_plan

PLAIN, PACKED, MERGED = "plain", "packed", "merged"
ROWS = (1, 4, 16, 64, 256)
STEP_ROWS = (1, 16, 64)
CONTEXT, BLOCK_SIZE = 64, 16
MOST_COPIES = 16

Way = Callable[[Tensor], object]


def main() -> None:
    """Load the model, measure its layers and its steps, print, write."""
    args = _options()
    torch.set_num_threads(args.threads)
    report = Report("linear: layers with repacked weights beside F.linear", args.json)
    model = model_by_name(args.model, dtype=getattr(torch, args.dtype), seed=args.seed)
    report.note(f"model {args.model}, {args.dtype}, {torch.get_num_threads()} threads, {args.repeats} rounds" + (", quick" * args.quick))
    with torch.no_grad():
        runners = {PLAIN: ModelRunner(model, pack_linears=False), PACKED: ModelRunner(model, pack_linears=True)}
        packing = runners[PACKED].packing
        report.note(f"{len(packing.packed)} layers packed, {len(packing.merged)} groups merged, {packing.nbytes:,} bytes of copies")
        report.figure("packed bytes", packing.nbytes)
        report.figure("packed layers", len(packing.packed))
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
    rows = []
    for label, copies in _shapes(model, runner).items():
        merged = [PackedProduct(linears) for linears in copies]
        single = [[PackedProduct([linear]) for linear in linears] for linears in copies]
        for count in ROWS:
            x = torch.randn((1, count, copies[0][0].in_features), generator=generator).to(model.dtype)
            ways: dict[str, list[Way]] = {
                PLAIN: [_plainly(linears) for linears in copies],
                PACKED: [_packed(products) for products in single],
                MERGED: [_packed([product]) for product in merged],
            }
            if len(copies[0]) == 1:
                del ways[MERGED]
            spreads = _turns({name: [partial(way, x) for way in each] for name, each in ways.items()}, args.repeats, scale=1e6)
            for name, spread in spreads.items():
                report.figure(f"{label}, {count} rows, {name}, us", spread)
            used = spreads.get(MERGED, spreads[PACKED])  # what a step runs
            rows.append([label, count, *[spreads.get(name) for name in (PLAIN, PACKED, MERGED)], spreads[PLAIN].median / used.median])
    report.table("one layer or group of layers, us", ["layer", "rows", PLAIN, PACKED, MERGED, "ratio"], rows)


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
        rows.append([count, *spreads.values(), spreads[PLAIN].median / spreads[PACKED].median])
    report.table(f"a decode step over {CONTEXT} tokens of context, ms", ["rows", PLAIN, "packed and merged", "ratio"], rows)


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
