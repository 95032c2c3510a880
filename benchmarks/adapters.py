"""Models whose attention has no interface, by their adapter and dense: tokens per second of greedy batches of ragged prompts.

Each kind is a random model of middle size. Both ways answer the same prompts with the same number of tokens, in turns, and every token must
be the same. Times are of whole runs, prompts included; nothing is cached between them.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Report, Spread, arguments, numbers, timed
from transformers import AutoConfig, PreTrainedModel

from pagedkv import LLM, SamplingParams
from pagedkv.models import TierName
from pagedkv.testing.models import randomised

BLOCK_SIZE = 16
WAYS: tuple[TierName, ...] = ("packed", "dense")
_IDS = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2}


def configs(layers: int, width: int, heads: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each kind transformers' model type and the arguments of its config."""
    gpt = {**_IDS, "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 2048, "rotary_dim": width // heads // 2}
    falcon = {**_IDS, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    neo = {**_IDS, "hidden_size": width, "num_layers": layers, "num_heads": heads, "window_size": 64}
    mpt = {"d_model": width, "n_layers": layers, "n_heads": heads}
    return {
        "bloom": ("bloom", {**_IDS, "hidden_size": width, "n_layer": layers, "n_head": heads}),
        "falcon, ALiBi": ("falcon", {**falcon, "alibi": True, "multi_query": False, "parallel_attn": False}),
        "falcon, multi-query": ("falcon", {**falcon, "alibi": False, "multi_query": True}),
        "falcon, grouped": ("falcon", {**falcon, "alibi": False, "num_kv_heads": heads // 4, "new_decoder_architecture": True}),
        "mpt": ("mpt", {**_IDS, **mpt}),
        "gptj": ("gptj", gpt),
        "gpt_neo": ("gpt_neo", {**neo, "attention_types": [[["global", "local"], layers // 2]]}),
        "codegen": ("codegen", {**gpt, "n_ctx": 2048}),
    }


def model_of(model_type: str, arguments: dict[str, Any], width: int, seed: int) -> PreTrainedModel:
    """A random one, its weights as wide as lets attention look at several tokens."""
    model = randomised(AutoConfig.for_model(model_type, **arguments), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(math.sqrt(32 / width))
    return model


def prompts_of(rng: np.random.Generator, count: int, longest: int) -> list[list[int]]:
    """Lengths from 8 to ``longest``, log-uniform."""
    lengths = np.exp(rng.uniform(np.log(8), np.log(longest), count)).astype(int)
    return [rng.integers(3, _IDS["vocab_size"], int(length)).tolist() for length in lengths]


def answered(llm: LLM, prompts: list[list[int]], num_new: int) -> list[tuple[int, ...]]:
    """The tokens that follow each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def compare(name: str, llms: Mapping[TierName, LLM], prompts: list[list[int]], options: Namespace) -> dict[TierName, Spread]:
    """Tokens per second of each way, timed in turns."""
    answers = {way: answered(llm, prompts, options.num_new) for way, llm in llms.items()}  # which warms up, too
    different = sum(ours != theirs for ours, theirs in zip(*answers.values(), strict=True))
    if different:
        raise SystemExit(f"{name}: {different} of {len(prompts)} sequences have other tokens by the adapter than dense")
    made, seconds = len(prompts) * options.num_new, defaultdict[TierName, list[float]](list)
    for repeat in range(options.repeats):
        for way in WAYS if repeat % 2 else reversed(WAYS):
            seconds[way] += timed(partial(answered, llms[way], prompts, options.num_new), 1, warmup=0)
    return {way: Spread.of([made / took for took in seconds[way]]) for way in WAYS}


def measure(report: Report, name: str, model: PreTrainedModel, options: Namespace) -> list[list[object]]:
    """A row for each number of sequences."""
    longest = options.longest + options.num_new
    num_blocks = 1 + max(options.sequences) * -(-longest // BLOCK_SIZE)
    settings: dict[str, Any] = {"num_blocks": num_blocks, "max_model_len": longest, "enable_prefix_caching": False}
    llms = {way: LLM(model, tier=way, block_size=BLOCK_SIZE, **settings) for way in WAYS}
    adapters = ", ".join(llms["packed"].runner.tier.adapters) or "none: its code has the interface"
    rows: list[list[object]] = []
    for count in options.sequences:
        rates = compare(name, llms, prompts_of(np.random.default_rng(options.seed), count, options.longest), options)
        for way, rate in rates.items():
            report.figure(f"{name}, {count} sequences, {way}, tokens/s", rate)
        gain = rates["packed"].median / rates["dense"].median
        report.figure(f"{name}, {count} sequences, times dense", gain)
        rows.append([name, adapters, count, *rates.values(), f"{gain:.2f}"])
        print(f"{name}, {count} sequences: {gain:.2f} times dense", flush=True)
    for llm in llms.values():
        llm.close()
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", help="these kinds, separated by semicolons")
    parser.add_argument("--sequences", type=numbers, default="16,64", help="prompts at once")
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument("--num-new", type=int, default=64, help="tokens that are generated for each")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, after one to warm up")
    options = parser.parse_args()
    layers, width, heads = 8, 512, 8
    if options.quick:
        layers, width, heads = 2, 64, 4
        options.sequences, options.longest, options.num_new, options.repeats = (4,), 40, 6, 1
    report = Report("Adapters for models without the attention interface, against the dense tier", options.json)
    report.note(f"{layers} layers, {width} wide, {heads} heads, float32, {torch.get_num_threads()} threads")
    known = configs(layers, width, heads)
    names = tuple(known) if options.only is None else tuple(options.only.split(";"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no kind is called {', '.join(unknown)}: there are {'; '.join(known)}")
    rows = []
    for name in names:
        rows += measure(report, name, model_of(*known[name], width, options.seed), options)
    report.table("Tokens per second", ["model", "adapter for", "sequences", "adapter", "dense", "times dense"], rows)
    report.finish()


if __name__ == "__main__":
    main()
