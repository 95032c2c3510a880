"""Seconds that the self-check adds to the load of a model: learning what its layers store, and comparing paged steps with its own forward.

The weights are in memory already. In half precision a copy of a few layers in float32 is checked as well, which counts. What packed and
fused parts take on top is shown beside it: they are for speed, and can be left out. "auto" is what a user gets, with whatever is tried
before the way that is right.
"""

from __future__ import annotations

from typing import cast

import torch
from common import Report, Spread, arguments
from contest import Watch
from models_by_name import NAMES, model_by_name
from transformers import PreTrainedModel

from pagedkv.errors import UnsupportedModelError
from pagedkv.models import ModelRunner, TierName
from pagedkv.models.replacements import Wanted


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="smollm2", help=NAMES)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the weights, separated by commas")
    parser.add_argument("--tiers", default="auto", help="ways of running the model, each forced: auto, packed, dense, dense-equal")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    name, repeats = ("tiny", 2) if options.quick else (options.model, options.repeats)
    report = Report("Seconds that the self-check adds to the load of a model", options.json)
    report.note(f"model {name}, {torch.get_num_threads()} threads, {repeats} repeats after one to warm up")
    rows = []
    for dtype in options.dtypes.split(","):
        model = model_by_name(name, dtype=getattr(torch, dtype), seed=options.seed)
        for tier in options.tiers.split(","):
            what = f"{dtype}, {tier}"
            try:
                check, cpu = _seconds(model, cast(TierName, tier), repeats, only_checked=True)
            except UnsupportedModelError as error:
                report.note(f"{what}: {error}")
                continue
            whole, _ = _seconds(model, cast(TierName, tier), repeats, only_checked=False)
            report.figure(f"{what}, self-check, s", check)
            report.figure(f"{what}, self-check, s of processors", cpu)
            report.figure(f"{what}, with packed and fused parts, s", whole)
            rows.append([what, check, cpu, whole])
            report.note(f"the self-check adds {check.median:.2f} s to the load of {name} in {dtype} ({tier})")
    report.table("Seconds", ["model", "self-check", "self-check, of all processors", "with packed and fused parts"], rows)
    report.finish()


def _seconds(model: PreTrainedModel, tier: TierName, repeats: int, *, only_checked: bool) -> tuple[Spread, Spread]:
    """By the clock and of the processors, of making a runner of a model."""
    wanted: Wanted = False if only_checked else "auto"
    times = []
    for number in range(-1, repeats):
        watch = Watch()
        runner = ModelRunner(model, tier=tier, pack_linears=wanted, fuse=wanted)
        if number >= 0:
            times.append(watch.read())
        runner.close()
    return Spread.of([each.seconds for each in times]), Spread.of([each.cpu_seconds for each in times])


if __name__ == "__main__":
    main()
