"""Where the time of a step goes: decoding with 1, 16 and 64 running sequences, and one prefill step of 512 tokens.

Every sequence streams, so that each step makes text and outputs for all of them. Each kind of work counts its own time, without that of
other kinds inside it. Steps with and without running clocks take turns, which shows what the clocks cost.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any

import torch
from clocks import Clocks
from common import Report, Spread, arguments, numbers
from models_by_name import NAMES as MODELS
from models_by_name import model_by_name, tokenizer_by_name
from torch import nn
from transformers import PreTrainedTokenizerBase

from pagedkv import Engine, EngineConfig, ModelRunner, SamplingParams
from pagedkv.attention.cpu_backend import CpuBackend
from pagedkv.attention.native.operations import Operations
from pagedkv.attention.torch_backend import TorchBackend
from pagedkv.models.call import ModelCall
from pagedkv.models.fused_body import FusedBody
from pagedkv.models.fused_layers import FusedLayer
from pagedkv.models.linear_products import PackedProduct
from pagedkv.models.native_layer import NativeLayer, NativeStack
from pagedkv.models.replacements import Replacements
from pagedkv.responses import Completion, Response
from pagedkv.sampling import Sampler
from pagedkv.scheduling import Scheduler
from pagedkv.storage import BatchBuilder

BLOCK_SIZE = 16
LINEAR, HEAD, ATTENTION, SWAPS, LOOP = "linear layers", "head", "attention", "stand-ins into their places and out", "the engine's loop"
WHOLE, PLAIN = "whole step", "the same without clocks"
# In the order of a step; those without methods have clocks of their own.
KINDS: dict[str, list[tuple[type, str]]] = {
    "planning": [(Scheduler, "plan")],
    "tables and tokens to tensors": [(BatchBuilder, "build")],
    SWAPS: [],
    "layers and weights still what they were": [
        (PackedProduct, "usable"),
        *((part, "still") for part in (FusedLayer, FusedBody)),
        *((part, "weights") for part in (NativeLayer, NativeStack)),
    ],
    "whole decoder layers": [(CpuBackend, "run_decoders")],
    LINEAR: [],
    ATTENTION: [
        (CpuBackend, "attend_joined"),
        *((backend, name) for backend in (CpuBackend, TorchBackend) for name in ("attend", "write")),
    ],
    "attention's work lists": [(CpuBackend, "plan"), (CpuBackend, "new_work"), (TorchBackend, "plan")],
    "norms, gates, rotations": [(Operations, name) for name in ("norm", "gate", "rotate", "rotate_in_place")],
    "the model's own code, and a layer's": [(ModelCall, "__call__")],
    HEAD: [],
    "around the forward, logits to float32": [(ModelRunner, "forward")],
    "sampling": [(Sampler, "sample")],
    "completing": [(Scheduler, "complete")],
    "tokens to text": [(Completion, "append"), (Completion, "finish")],
    "outputs": [(Response, "output")],
    LOOP: [],
}


def main() -> None:
    """Put the clocks in place, measure each precision, print, write."""
    args = _options()
    torch.set_num_threads(args.threads)
    report = Report("step profile: where the time of a step goes", args.json)
    report.note(
        f"model {args.model}, {torch.get_num_threads()} threads, {args.context} tokens of context, seed {args.seed}, {args.repeats} steps"
        + ", processor time" * args.cpu_time
        + ", parts of decoder layers by calls of their own" * args.apart
        + ", layers called by the model's own code" * args.by_layers
        + ", quick" * args.quick
    )
    if args.apart:
        NativeLayer.weights = lambda self: None  # type: ignore[method-assign]
    if args.by_layers:
        FusedBody.looked_at = lambda self: False  # type: ignore[method-assign]
    clocks, heads = Clocks(_clock(args)), set[int]()
    _put_in_place(clocks, heads)
    tokenizer = tokenizer_by_name(args.model)
    for dtype in args.dtypes:
        model: Any = model_by_name(args.model, dtype=getattr(torch, dtype), seed=args.seed)
        heads.clear()  # ids may come back
        heads.add(id(model.get_output_embeddings().weight))
        runner = ModelRunner(model, block_size=BLOCK_SIZE)
        columns = {f"{count} running": _decodes(runner, tokenizer, clocks, count, args) for count in args.running}
        columns[f"prefill of {args.prefill}"] = _prefills(runner, tokenizer, clocks, args)
        _write(report, dtype, columns)
        runner.close()
    report.note(
        f"Medians over steps; shares are of the median step. {LOOP}: seating, looking after streams, and whatever else no clock is around."
    )
    report.finish()


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help=MODELS)
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"], help="of weights and K/V")
    parser.add_argument("--running", type=numbers, default=(1, 16, 64), help="sequences that decode")
    parser.add_argument("--context", type=int, default=256, help="tokens of each before")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of the prefill step")
    parser.add_argument("--repeats", type=int, default=30, help="steps that are measured with clocks, and as many without")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, with one thread: others disturb it less")
    parser.add_argument(
        "--apart", action="store_true", help="run products and attention of decoder layers by calls of their own, to tell them apart"
    )
    parser.add_argument("--by-layers", action="store_true", help="let the model's own code call its layers one by one")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1: it is the main thread's")
    if args.quick:
        args.repeats, args.running, args.context, args.prefill = 2, (1, 4), 16, 32
    return args


def _clock(args: argparse.Namespace) -> Callable[[], float]:
    return thread_time if args.cpu_time else perf_counter


def _put_in_place(clocks: Clocks, heads: set[int]) -> None:
    for kind, places in KINDS.items():
        for owner, name in places:
            clocks.wrap(owner, name, kind)
    clocks.wrap_block(Replacements, "in_place", SWAPS)
    clocks.wrap(PackedProduct, "whole", lambda product: HEAD if id(product.linears[0].weight) in heads else LINEAR)
    clocks.wrap(nn.Linear, "forward", lambda linear: HEAD if id(linear.weight) in heads else LINEAR)


def _decodes(
    runner: ModelRunner, tokenizer: PreTrainedTokenizerBase | None, clocks: Clocks, count: int, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Let so many sequences run and measure their steps."""
    rng, steps = random.Random(args.seed), 2 * args.repeats + 4
    engine = _engine(runner, tokenizer, num_tokens=args.context + steps, num_seqs=count, budget=4096)
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    for index in range(count):
        engine.add_request(str(index), rng.choices(range(runner.vocab_size), k=args.context), params)
    while engine.statistics().num_generated_tokens < 2 * count:
        engine.step()
    measured = [_measured(engine, clocks, _clock(args)) for _ in range(args.repeats)]
    engine.close()
    return measured


def _prefills(
    runner: ModelRunner, tokenizer: PreTrainedTokenizerBase | None, clocks: Clocks, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Measure the one step of a prompt, again and again; the first is not counted."""
    rng = random.Random(args.seed)
    engine = _engine(runner, tokenizer, num_tokens=args.prefill + 1, num_seqs=1, budget=args.prefill)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def submit() -> None:
        engine.add_request("prompt", rng.choices(range(runner.vocab_size), k=args.prefill), params)

    measured = []
    for _ in range(1 + max(2, args.repeats // 4)):
        measured.append(_measured(engine, clocks, _clock(args), submit))
    engine.close()
    return measured[1:]


def _engine(runner: ModelRunner, tokenizer: PreTrainedTokenizerBase | None, *, num_tokens: int, num_seqs: int, budget: int) -> Engine:
    blocks = num_seqs * (-(-num_tokens // BLOCK_SIZE) + 1)
    config = EngineConfig(num_blocks=int(blocks * 1.02) + 3, max_num_batched_tokens=budget, enable_prefix_caching=False)
    return Engine(runner, config, tokenizer=tokenizer)


def _measured(engine: Engine, clocks: Clocks, clock: Callable[[], float], prepare: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Seconds of one step, whole and by kinds, and of the next one without clocks."""
    prepare()
    with clocks.reading(LOOP) as seconds:
        engine.step()
    prepare()
    began = clock()
    engine.step()
    return {**seconds, WHOLE: sum(seconds.values()), PLAIN: clock() - began}


def _write(report: Report, dtype: str, columns: dict[str, list[dict[str, float]]]) -> None:
    """A row for each kind, milliseconds and percent for each situation."""
    rows: list[list[object]] = [[kind] for kind in (*KINDS, WHOLE, PLAIN)]
    for title, steps in columns.items():
        whole = statistics.median(step[WHOLE] for step in steps)
        for row in rows:
            seconds = Spread.of([step.get(str(row[0]), 0.0) for step in steps])
            report.figure(f"{dtype}, {title}, {row[0]}, s", seconds)
            row += [f"{1e3 * seconds.median:.3f}", f"{100 * seconds.median / whole:.1f}"]
    report.table(dtype, ["", *(f"{title}, {unit}" for title in columns for unit in ("ms", "%"))], rows)


if __name__ == "__main__":
    main()
