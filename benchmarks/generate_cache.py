"""A user's own `model.generate()` with a PagedCache and with transformers' cache: new tokens per second, and the most K/V held at once.

Both run in this process, in turns, on the same model object and the same token ids, to a fixed number of new tokens: greedily, by beam
search, and with several samples of each prompt. What transformers' cache holds is counted in blocks, too: the tensors that it keeps when
the last token is there, without the copies that it makes while it grows or re-orders them. In float32 all tokens are compared, too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import transformers
from common import Report, Spread, arguments, numbers
from contest import turns
from models_by_name import NAMES, model_by_name
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from pagedkv import CachePool, PagedCache
from pagedkv.models import CACHE_ARGUMENT

OWN, PACKED, DENSE = "transformers", "pagedkv", "pagedkv, dense"
MODES: dict[str, dict[str, Any]] = {
    "greedy, 4 prompts": {"rows": 4},
    "beam 4": {"rows": 1, "num_beams": 4},
    "beam 4, 4 prompts": {"rows": 4, "num_beams": 4},
    "4 samples of a prompt": {"rows": 1, "num_return_sequences": 4, "do_sample": True},
}
NOTES = (
    "Spread: median (5th..95th percentile) over rounds. A ratio above 1 is in favour of pagedkv; it is the median over rounds of the ratio"
    " within a round, since a round's runs follow each other under the same load.",
    "Timed: the whole call of generate, prefill included. Not timed: loading the model and making the pool.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call of ``generate`` gave, took and held."""

    tokens: Tensor
    seconds: float
    nbytes: int


def main() -> None:
    """Load the model, run every mode and context, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="smollm2", help=NAMES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", type=numbers, default=(128, 1024), help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.model, args.contexts, args.new_tokens, args.repeats = "tiny", (48,), 8, 1
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    report = Report("generate(): a PagedCache beside transformers' cache, one process, the same model object and token ids", args.json)
    model = model_by_name(args.model, dtype=getattr(torch, args.dtype), seed=args.seed)
    facts = (
        f"model {args.model}, {args.dtype}, {args.threads} threads, seed {args.seed}, {args.repeats} rounds, {args.new_tokens} new tokens"
    )
    report.note(facts + (", quick" if args.quick else ""))
    most = 16 * (-(-(max(args.contexts) + args.new_tokens) // 16) + 1)
    pools = {name: CachePool(model, num_blocks=most + 1, tier=tier) for name, tier in ((PACKED, "auto"), (DENSE, "dense"))}
    report.note(f"pagedkv reads {'blocks in place' if pools[PACKED].tier == 'packed' else f'gathered blocks: {pools[PACKED].tier_reason}'}")
    for context in args.contexts:
        for mode, settings in MODES.items():
            _contest(report, model, pools, mode=f"{mode}, context {context}", settings={**settings, "columns": context}, args=args)
    for note in NOTES:
        report.note(note)
    report.finish()
    for pool in pools.values():
        pool.close()


def _contest(
    report: Report, model: PreTrainedModel, pools: dict[str, CachePool], *, mode: str, settings: dict[str, Any], args: argparse.Namespace
) -> None:
    names = (OWN, PACKED) if pools[PACKED].tier == "dense" else (OWN, PACKED, DENSE)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    options = {**settings, "max_new_tokens": args.new_tokens}
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(10, vocabulary, (options.pop("rows"), options.pop("columns")), generator=generator)
    for number in range(-1, args.repeats):  # the first round warms up
        for name in turns(names, max(number, 0)):
            answer = _answer(model, prompts, pools.get(name), seed=args.seed, options=options)
            if number >= 0 or args.quick:
                answers[name].append(answer)
    rows, block = [], pools[PACKED].nbytes_per_block
    for name in names:
        seconds = [answer.seconds for answer in answers[name]]
        new = answers[name][0].tokens.shape[0] * args.new_tokens
        nbytes = max(answer.nbytes for answer in answers[name])
        ratio = Spread.of([own.seconds / answer.seconds for own, answer in zip(answers[OWN], answers[name], strict=True)])
        saving = max(answer.nbytes for answer in answers[OWN]) / nbytes
        wrong = _differing(answers[name][0].tokens, answers[OWN][0].tokens) if args.dtype == "float32" else None
        rows.append((name, Spread.of([new / each for each in seconds]), ratio.median, nbytes // block, saving, wrong))
        report.figure(f"{mode}, {name}, s", Spread.of(seconds))
        report.figure(f"{mode}, {name}, tokens/s", Spread.of([new / each for each in seconds]))
        report.figure(f"{mode}, {name}, times the speed of transformers' cache", ratio.median)
        report.figure(f"{mode}, {name}, peak blocks", nbytes // block)
        report.figure(f"{mode}, {name}, peak share of transformers' cache", 1 / saving)
        report.figure(f"{mode}, {name}, rows other than with transformers' cache", wrong)
    columns = ("cache", "new tokens/s", "speed, times", "peak blocks of K/V", "smaller, times", "rows that differ")
    report.table(mode, columns, rows)


def _answer(model: PreTrainedModel, prompts: Tensor, pool: CachePool | None, *, seed: int, options: dict[str, Any]) -> Answer:
    cache: Cache = DynamicCache(config=model.config) if pool is None else PagedCache(pool)
    if pool is not None:
        pool.reset_peak()
    torch.manual_seed(seed)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True, **options}
    began = perf_counter()
    tokens = model.generate(prompts, **{CACHE_ARGUMENT: cache}, **settings)  # type: ignore[operator]  # typed there as a tensor or a module
    seconds = perf_counter() - began
    if isinstance(cache, PagedCache) and pool is not None:
        nbytes = pool.peak_blocks_in_use * pool.nbytes_per_block
        cache.close()
    else:
        nbytes = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore[union-attr]
    return Answer(tokens, seconds, nbytes)


def _differing(tokens: Tensor, others: Tensor) -> int:
    """Rows of generated tokens that are not the same."""
    return sum(ours != own for ours, own in zip(tokens.tolist(), others.tolist(), strict=True))


if __name__ == "__main__":
    main()
