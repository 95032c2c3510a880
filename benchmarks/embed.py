"""Hidden states of many prompts of mixed lengths: ``LLM.embed`` against transformers, one prompt at a time and in padded batches.

The prompts are random tokens, half of them behind one of a few shared beginnings. Every way gives the last token's state, and all are
compared with one prompt at a time. The prefix cache is emptied before each run of ours, so that only sharing within a run counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from common import Report, Spread, arguments, timed
from models_by_name import NAMES, model_by_name
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv import LLM

NUM_SHARED, SHARED_LENGTH = 4, 96


def prompts_of(rng: np.random.Generator, count: int, longest: int, num_token_ids: int) -> list[list[int]]:
    """Lengths from a few tokens to ``longest``, log-uniform; every second prompt behind a shared beginning."""
    lengths = np.exp(rng.uniform(np.log(8), np.log(longest), count)).astype(int)
    shared = rng.integers(3, num_token_ids, (NUM_SHARED, SHARED_LENGTH)).tolist()
    prompts = [rng.integers(3, num_token_ids, int(length)).tolist() for length in lengths]
    return [prompt if index % 2 else shared[index // 2 % NUM_SHARED] + prompt for index, prompt in enumerate(prompts)]


def one_by_one(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """Each prompt alone."""
    device = model.device
    return torch.stack([model.base_model(input_ids=torch.tensor([prompt], device=device), use_cache=False)[0][0, -1] for prompt in prompts])


def padded(model: PreTrainedModel, prompts: list[list[int]], size: int) -> Tensor:
    """Batches of ``size``, sorted by length, padded on the left."""
    result: list[Tensor | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = max(len(prompts[row]) for row in rows)
        ids, mask = (torch.zeros((len(rows), longest), dtype=torch.int64, device=model.device) for _ in range(2))
        for place, row in enumerate(rows):
            ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[place, longest - len(prompts[row]) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        states = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0][:, -1]
        for place, row in enumerate(rows):
            result[row] = states[place]
    return torch.stack([state for state in result if state is not None])


def embedded(llm: LLM, prompts: list[list[int]]) -> Tensor:
    """Through the engine, with nothing cached before."""
    llm.reset_prefix_cache()
    outputs = llm.embed(prompts, use_tqdm=False)
    return torch.from_numpy(np.stack([output.outputs.embedding for output in outputs if output.outputs is not None]))


def main() -> None:
    """Time every way on the same prompts, and say how far apart the states are."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="smollm2", help=NAMES)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest prompt, shared beginnings not counted")
    parser.add_argument("--batch-size", type=int, default=32, help="of padded batches")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.quick:
        options.model, options.num_prompts, options.longest, options.repeats = "tiny", 12, 40, 2
    report = Report("Hidden states of many prompts", options.json)
    model = model_by_name(options.model, seed=options.seed)
    num_token_ids = model.get_input_embeddings().weight.shape[0]
    prompts = prompts_of(np.random.default_rng(options.seed), options.num_prompts, options.longest, num_token_ids)
    num_tokens = sum(map(len, prompts))
    rows = []
    with torch.no_grad(), LLM(model) as llm:
        ways: dict[str, Callable[[], Tensor]] = {
            "one prompt at a time": lambda: one_by_one(model, prompts),
            f"padded batches of {options.batch_size}": lambda: padded(model, prompts, options.batch_size),
            "LLM.embed": lambda: embedded(llm, prompts),
        }
        reference = one_by_one(model, prompts).float().cpu()
        for name, way in ways.items():
            difference = float((way().float().cpu() - reference).abs().max() / reference.abs().max())
            spread = Spread.of(timed(way, options.repeats, warmup=0))
            report.figure(f"{name}, s", spread)
            report.figure(f"{name}, largest difference", difference)
            rows.append([name, spread, f"{num_tokens / spread.median:,.0f}", f"{difference:.1e}"])
    report.table(f"{len(prompts)} prompts, {num_tokens} tokens", ["way", "seconds", "tokens/s", "largest difference from alone"], rows)
    report.finish()


if __name__ == "__main__":
    main()
