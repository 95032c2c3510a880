"""Generate for a list of prompts of very different lengths, all at once, over a paged K/V cache.

    python examples/batched_generation.py
    python examples/batched_generation.py --num-blocks 60     # a pool far too small: requests wait and are preempted, the texts stay

The 28 prompts are in prompts.json, from a single word to several paragraphs; some share a system prompt, whose K/V is computed and stored
once. The model is SmolLM2-135M-Instruct. Its first load converts the weights, which takes up to a minute; later loads take seconds.
"""

import argparse
import json
import time
from pathlib import Path

from smollm2 import model_file

from pagedkv import LLM, RequestOutput, SamplingParams


def conversations() -> list[list[dict[str, str]]]:
    """The prompts as chat messages: a system message where one is named, then the user's."""
    prompts = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
    chats = []
    for prompt in prompts["conversations"]:
        system = [{"role": "system", "content": prompts["systems"][prompt["system"]]}] if "system" in prompt else []
        chats.append([*system, {"role": "user", "content": prompt["user"]}])
    return chats


def print_texts(chats: list[list[dict[str, str]]], outputs: list[RequestOutput]) -> None:
    """Each prompt, shortened to a line, and what the model made of it."""
    for number, (chat, output) in enumerate(zip(chats, outputs, strict=True), start=1):
        question = " ".join(chat[-1]["content"].split())
        print(f"\n{number:2d}. {question if len(question) <= 110 else question[:107] + '...'}")
        print(f"    ({len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them from the cache)")
        answer = output.outputs[0]
        print("    " + answer.text.strip().replace("\n", "\n    ") + (" ..." if answer.finish_reason == "length" else ""))


def print_table(llm: LLM, outputs: list[RequestOutput], seconds: float) -> None:
    """What it took."""
    statistics = llm.statistics()
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_new_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    num_hits = sum(output.num_cached_tokens for output in outputs)
    rows = {
        "prompts": f"{len(outputs)}, {num_prompt_tokens:,} tokens",
        "new tokens": f"{num_new_tokens:,}",
        "time": f"{seconds:.1f} s",
        "tokens per second": f"{num_new_tokens / seconds:.0f}",
        "blocks at peak": f"{statistics.peak_blocks_in_use} of {llm.engine.num_usable_blocks} ({statistics.pool_nbytes / 2**20:.0f} MiB)",
        "K/V waste": f"{statistics.mean_waste:.1%} of the reserved slots",
        "prefix hits": f"{num_hits:,} tokens, {num_hits / num_prompt_tokens:.1%} of the prompts",
        "preemptions": f"{statistics.num_preemptions}",
    }
    print("\n" + "\n".join(f"{name:<18} {value}" for name, value in rows.items()))


def check(chats: list[list[dict[str, str]]], outputs: list[RequestOutput], llm: LLM, max_tokens: int) -> None:
    """Every prompt has its own answer, in the order asked, and every block was given back."""
    assert len(outputs) == len(chats)
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    for chat, output in zip(chats, outputs, strict=True):
        assert output.finished, output.error
        asked = tokenizer.decode(output.prompt_token_ids)
        assert chat[-1]["content"].strip() in asked, f"request {output.request_id} answers another prompt"
        (answer,) = output.outputs
        assert answer.text.strip(), f"request {output.request_id} has no answer"
        assert answer.finish_reason == ("length" if answer.token_ids[-1] not in llm.runner.eos_token_ids else "stop")
        assert len(answer.token_ids) == max_tokens or answer.finish_reason == "stop"
    assert sum(output.num_cached_tokens for output in outputs) > 0, "the shared system prompts were not found"
    assert llm.engine.num_blocks_in_use == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens for each prompt at most (default 64)")
    parser.add_argument("--num-blocks", type=int, help="blocks of 16 tokens in the pool (default: what the prompts can use)")
    options = parser.parse_args()
    chats = conversations()
    with LLM(model_file(), num_blocks=options.num_blocks) as llm:
        start = time.perf_counter()
        # A model this small repeats itself when it is greedy; the penalty makes better reading.
        params = SamplingParams(temperature=0, frequency_penalty=0.6, max_tokens=options.max_tokens)
        outputs = llm.chat(chats, params)
        seconds = time.perf_counter() - start
        print_texts(chats, outputs)
        print_table(llm, outputs, seconds)
        check(chats, outputs, llm, options.max_tokens)


if __name__ == "__main__":
    main()
