"""Many questions behind one system prompt: its K/V is computed once and stored once, and the answers stay the same.

    python examples/03_shared_system_prompt.py

The same six conversations are answered twice, without and with the prefix cache. With it, whoever comes second waits for the one step in
which the first computes the shared blocks, and then points its own block table at them.
"""

import argparse
import json
import time
from pathlib import Path

from smollm2 import model_file

from pagedkv import LLM, RequestOutput, SamplingParams

BLOCK_SIZE = 16
QUESTIONS = [
    "When do you close on Saturday?",
    "How many books can I borrow?",
    "I have lost a book. What now?",
    "Where can I use a computer?",
    "Is there anything for small children?",
    "When does the reading group meet?",
]


def answer(llm: LLM, system: str, max_tokens: int) -> list[RequestOutput]:
    """Ask everything at once, and print what it took."""
    chats = [[{"role": "system", "content": system}, {"role": "user", "content": question}] for question in QUESTIONS]
    start = time.perf_counter()
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    seconds, statistics = time.perf_counter() - start, llm.statistics()
    hits = sum(output.num_cached_tokens for output in outputs)
    print(f"{seconds:6.1f} s  {statistics.num_computed_tokens:7,} tokens computed  {hits:6,} found", end="")
    print(f"  {statistics.peak_blocks_in_use:4d} blocks at peak")
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=32, help="new tokens for each question at most (default 32)")
    max_tokens = parser.parse_args().max_tokens
    system = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))["systems"]["librarian"]

    with LLM(model_file(), enable_prefix_caching=False, block_size=BLOCK_SIZE, num_blocks=400) as llm:
        print("without the prefix cache ", end="", flush=True)
        separate = answer(llm, system, max_tokens)
        model, tokenizer, computed_separately = llm.runner.model, llm.tokenizer, llm.statistics().num_computed_tokens
    with LLM(model, tokenizer, block_size=BLOCK_SIZE, num_blocks=400) as llm:
        print("with the prefix cache    ", end="", flush=True)
        shared = answer(llm, system, max_tokens)
        computed_together, blocks = llm.statistics().num_computed_tokens, llm.statistics().peak_blocks_in_use

    for question, alone, together in zip(QUESTIONS, separate, shared, strict=True):
        print(f"\n{question}\n    {together.outputs[0].text.strip()}")
        assert alone.outputs[0].token_ids == together.outputs[0].token_ids, "the cache changed an answer"
    prefix = len(tokenizer.apply_chat_template([{"role": "system", "content": system}], return_dict=False)) // BLOCK_SIZE
    print(f"\nthe system prompt fills {prefix} blocks, which five of six conversations neither computed nor stored")
    cached = [output.num_cached_tokens for output in shared]
    assert cached[0] == 0
    assert min(cached[1:]) >= prefix * BLOCK_SIZE
    assert computed_separately - computed_together == sum(cached)
    longest = [len(output.prompt_token_ids) + max_tokens for output in shared]
    assert blocks <= prefix + sum(-(-tokens // BLOCK_SIZE) - prefix for tokens in longest), "the system prompt was stored twice"


if __name__ == "__main__":
    main()
