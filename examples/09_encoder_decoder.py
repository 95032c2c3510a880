"""T5 and its like in batches: the encoder's input and the decoder's tokens are one sequence, over one block table.

    python examples/09_encoder_decoder.py

A prompt is what the encoder reads. It runs once; K and V of cross attention go into blocks before those of the decoder. Continuations share
them, and so does the next request with the same input. Weights are random: what counts is that every token is the one that transformers'
own ``generate`` gives to that prompt alone.
"""

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from pagedkv import LLM, SamplingParams, plan_memory

torch.manual_seed(0)
config = AutoConfig.for_model("t5", vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, decoder_start_token_id=0)
model = AutoModelForSeq2SeqLM.from_config(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
prompts = [torch.randint(2, 500, (length,)).tolist() for length in (40, 7, 93, 22)]
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
num_runs = 0


def count(*_: object) -> None:
    global num_runs
    num_runs += 1


def alone(prompt: list[int]) -> tuple[int, ...]:
    found = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    return tuple(found[0, 1:].tolist())


print(plan_memory(model))
wanted = [alone(prompt) for prompt in prompts]
with LLM(model, max_num_seqs=8) as llm:
    model.get_encoder().register_forward_hook(count)
    print(f"\nruns as {llm.runner.tier}")
    for output, tokens in zip(llm.generate(prompts, greedy, use_tqdm=False), wanted, strict=True):
        assert output.outputs[0].token_ids == tokens
        print(f"{len(output.prompt_token_ids):3} tokens read, written {output.outputs[0].token_ids[:6]} ... as alone")
    print(f"the encoder ran {num_runs} time for {len(prompts)} inputs")
    assert num_runs == 1

    begins = {"prompt_token_ids": prompts[2], "decoder_prompt_token_ids": wanted[2][:4]}  # goes on from these
    (again,) = llm.generate(begins, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    assert again.outputs[0].token_ids == wanted[2][4:]
    print(f"the same input again: {again.num_cached_tokens} of {93 + 1 + 4} tokens were found in the cache")
    assert again.num_cached_tokens == 96
    assert num_runs == 1  # all of the input among them

    (several,) = llm.generate(prompts[0], SamplingParams(n=3, seed=1, max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert len({sample.token_ids for sample in several.outputs}) == 3
    assert llm.engine.num_blocks_in_use == 0
    print(f"three drawn continuations, from {several.num_cached_tokens} cached tokens of {len(prompts[0])}; all blocks are back")
