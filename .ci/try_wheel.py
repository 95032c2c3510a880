"""Run from an environment that has only the wheel: the native kernel is in it, is chosen, and gives generate's own tokens."""

from __future__ import annotations

from pathlib import Path

import torch

import pagedkv
from pagedkv.attention.native.library import load_library
from pagedkv.testing.models import tiny_model

assert "site-packages" in Path(pagedkv.__file__).parts, f"{pagedkv.__file__} is not the installed wheel"
loaded = load_library()
assert loaded.library is not None, loaded.reasons
model = tiny_model("llama")
prompt = [3, 1, 4, 1, 5, 9, 2, 6]
with pagedkv.LLM(model) as llm:
    assert llm.runner.backend_name == "cpu", llm.runner.backend_name
    greedy = pagedkv.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ours = llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids
own = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
assert list(ours) == own, (ours, own)
print(f"the wheel works: build {loaded.library.build.name}")
