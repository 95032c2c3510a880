"""A user's own `model.generate()` with a PagedCache and with transformers' cache: new tokens per second, and the most K/V held at once.

Both run in this process, in turns, on the same model object and the same token ids, to a fixed number of new tokens. What transformers'
cache holds is counted in blocks, too: the tensors that it keeps when the last token is there, without the copies that it makes while it
grows or re-orders them. In float32 all tokens are compared, too.
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
from transformers import Cache, DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from pagedkv import CachePool, PagedCache
from pagedkv.models import CACHE_ARGUMENT

OWN, PAGED, DENSE = "transformers", "pagedkv", "pagedkv, dense"
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"rows": 4},
    "sampling": {"rows": 4, "do_sample": True},
    "beam 4": {"rows": 1, "num_beams": 4},
    "beam 4 of 4 prompts": {"rows": 4, "num_beams": 4},
    "4 samples of a prompt": {"rows": 1, "num_return_sequences": 4, "do_sample": True},
}
NOTES = (
    "Spread: median (5th..95th percentile) over rounds. A ratio above 1 is in favour of pagedkv; it is the median over rounds of the ratio"
    " within a round, since a round's runs follow each other under the same load.",
    "New tokens/s: of the whole call of generate, prefill included. Behind the first: of the tokens after the first of each row alone."
    " Not timed: loading the model and making the pool.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call of ``generate`` gave, took and held."""

    tokens: Tensor
    seconds: float
    first_seconds: float
    nbytes: int


class FirstToken(StoppingCriteria):
    """Stops nothing; looks at the clock when the first token is there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.at is None:
            self.at = perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def main() -> None:
    """Load the model, run every mode and context, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="smollm2", help=NAMES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", type=numbers, default=(128, 1024), help="tokens of each prompt")
    parser.add_argument("--modes", default="greedy;sampling;beam 4", help=f"separated by semicolons: {'; '.join(MODES)}")
    parser.add_argument("--dense", action="store_true", help="also with a pool that is told to run forwards dense")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.quick:
        args.model, args.contexts, args.new_tokens, args.repeats = "tiny", (48,), 8, 1
        args.modes, args.dense = ";".join(MODES), True
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
    pools = {PAGED: CachePool(model, num_blocks=most + 1)}
    paged = pools[PAGED]
    report.note(f"pagedkv reads {'blocks in place' if paged.tier == 'packed' else f'gathered blocks: {paged.tier_reason}'}")
    if args.dense and paged.tier == "packed":
        pools[DENSE] = CachePool(model, num_blocks=most + 1, tier="dense")
    for context in args.contexts:
        for mode in args.modes.split(";"):
            _contest(report, model, pools, mode=f"{mode}, context {context}", settings={**MODES[mode], "columns": context}, args=args)
    for note in NOTES:
        report.note(note)
    report.finish()
    for pool in pools.values():
        pool.close()


def _contest(
    report: Report, model: PreTrainedModel, pools: dict[str, CachePool], *, mode: str, settings: dict[str, Any], args: argparse.Namespace
) -> None:
    names = (OWN, *pools)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    options = {**settings, "max_new_tokens": args.new_tokens}
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(10, vocabulary, (options.pop("rows"), options.pop("columns")), generator=generator)
    for name in names:  # to warm up
        _answer(model, prompts[:, :16], pools.get(name), seed=args.seed, options=options)
    for number in range(args.repeats):
        for name in turns(names, number):
            answers[name].append(_answer(model, prompts, pools.get(name), seed=args.seed, options=options))
    rows, block = [], pools[PAGED].nbytes_per_block
    for name in names:
        own, ours = answers[OWN], answers[name]
        new = ours[0].tokens.shape[0] * args.new_tokens
        speed = Spread.of([new / each.seconds for each in ours])
        later = Spread.of([new * (1 - 1 / args.new_tokens) / (each.seconds - each.first_seconds) for each in ours])
        pairs = list(zip(own, ours, strict=True))
        ratio = Spread.of([his.seconds / mine.seconds for his, mine in pairs])
        later_ratio = Spread.of([(his.seconds - his.first_seconds) / (mine.seconds - mine.first_seconds) for his, mine in pairs])
        nbytes = max(answer.nbytes for answer in ours)
        share = nbytes / max(answer.nbytes for answer in own)
        wrong = _differing(ours[0].tokens, own[0].tokens) if args.dtype == "float32" else None
        rows.append((name, speed, ratio.median, later, later_ratio.median, nbytes // block, share, wrong))
        report.figure(f"{mode}, {name}, s", Spread.of([each.seconds for each in ours]))
        report.figure(f"{mode}, {name}, tokens/s", speed)
        report.figure(f"{mode}, {name}, times the speed of transformers' cache", ratio)
        report.figure(f"{mode}, {name}, tokens/s behind the first", later)
        report.figure(f"{mode}, {name}, times the speed of transformers' cache behind the first", later_ratio)
        report.figure(f"{mode}, {name}, peak blocks", nbytes // block)
        report.figure(f"{mode}, {name}, peak share of transformers' cache", share)
        report.figure(f"{mode}, {name}, rows other than with transformers' cache", wrong)
    columns = ("cache", "new tokens/s", "times", "behind the first", "times", "peak blocks of K/V", "share", "rows that differ")
    report.table(mode, columns, rows)


def _answer(model: PreTrainedModel, prompts: Tensor, pool: CachePool | None, *, seed: int, options: dict[str, Any]) -> Answer:
    cache: Cache = DynamicCache(config=model.config) if pool is None else PagedCache(pool)
    if pool is not None:
        pool.reset_peak()
    torch.manual_seed(seed)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True, CACHE_ARGUMENT: cache, **options}
    first = FirstToken()
    began = perf_counter()
    tokens = model.generate(prompts, stopping_criteria=StoppingCriteriaList([first]), **settings)  # type: ignore[operator]  # typed there as a tensor or a module
    seconds = perf_counter() - began
    if first.at is None:
        raise RuntimeError("generate gave no token")
    if isinstance(cache, PagedCache) and pool is not None:
        nbytes = pool.peak_nbytes_in_use
        cache.close()
    else:
        nbytes = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore[union-attr]
    return Answer(tokens, seconds, first.at - began, nbytes)


def _differing(tokens: Tensor, others: Tensor) -> int:
    """Rows of generated tokens that are not the same."""
    return sum(ours != own for ours, own in zip(tokens.tolist(), others.tolist(), strict=True))


if __name__ == "__main__":
    main()
