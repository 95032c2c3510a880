"""Seconds that a loaded model takes until it is ready to serve: probe and self-check, and packed and fused parts on top.

The weights are in memory already. Every way of running the model is timed that its self-check finds right, forced; "auto" is what a user
gets, with whatever was tried before. In half precision a copy of a few layers in float32 is checked as well.
"""

from __future__ import annotations

import torch
from common import Report, Spread, arguments, timed
from models_by_name import NAMES, model_by_name

from pagedkv.errors import UnsupportedModelError
from pagedkv.models import ModelRunner, TierName

TIERS: tuple[TierName, ...] = ("auto", "packed", "dense", "dense-equal")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="smollm2", help=NAMES)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the weights, separated by commas")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    report = Report("Seconds until a loaded model is ready to serve", options.json)
    rows = []
    for name in options.dtypes.split(","):
        model = model_by_name("tiny" if options.quick else options.model, dtype=getattr(torch, name), seed=options.seed)
        for tier in TIERS:
            try:
                runner = ModelRunner(model, tier=tier)
            except UnsupportedModelError as error:
                report.note(f"{name}, {tier}: {error}")
                continue
            check = runner.report
            runner.close()
            plain = Spread.of(timed(lambda: ModelRunner(model, tier=tier, pack_linears=False, fuse=False).close(), repeats))  # noqa: B023
            full = Spread.of(timed(lambda: ModelRunner(model, tier=tier).close(), repeats))  # noqa: B023
            report.figure(f"{name}, {tier}, probe and self-check, s", plain)
            report.figure(f"{name}, {tier}, all, s", full)
            worst = check.max_relative_error if check.copy is None else check.copy.max_relative_error
            rows.append([f"{name}, {tier}", runner.tier.name, plain, full, f"{worst:.1e}"])
    report.table("Seconds", ["model", "way", "probe and self-check", "with packed and fused parts", "largest difference in float32"], rows)
    report.finish()


if __name__ == "__main__":
    main()
