"""One prompt forked into four: the prompt is computed once, its blocks are shared, and each continuation writes only what is its own.

    python examples/04_fork_one_prompt.py

This goes step by step through the engine below ``LLM``, to look at the block tables while the four are running.
"""

import argparse

from smollm2 import model_file

from pagedkv import LLM, RequestOutput, SamplingParams

PROMPT = (
    "The old lighthouse keeper had not spoken to anybody for three weeks. Every evening he climbed the ninety-one steps, lit the lamp, "
    "wrote the hour and the weather into his book, and sat down at the window to watch the ships go by. But on the night of the storm"
)


def run(llm: LLM, params: SamplingParams, request_id: str) -> RequestOutput:
    """Generate one step at a time; once there are four sequences, show their block tables."""
    llm.engine.add_request(request_id, PROMPT, params, stream=False)
    shown = False
    while llm.engine.has_unfinished:
        for output in llm.engine.step():
            return output
        tables = [sequence.block_tables[0] for sequence in llm.engine.snapshot().sequences]
        if len(tables) == params.n and len(set(tables)) == params.n and not shown:
            shown = True
            print(f"{request_id}: block tables of the four, after the step that wrote into the shared last block")
            print("\n".join("    " + " ".join(f"{block:3d}" for block in table) for table in tables))
            group = llm.statistics().cache.groups[0]
            print(f"    {sum(map(len, tables))} entries, {group.num_in_use} blocks in use, {group.num_shared} of them shared by all")
            assert group.num_in_use == group.num_shared + params.n
            assert len({table[: group.num_shared] for table in tables}) == 1
    raise AssertionError("the request did not end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=40, help="new tokens of each continuation (default 40)")
    max_tokens = parser.parse_args().max_tokens
    params = SamplingParams(n=4, temperature=0.8, top_p=0.95, seed=7, max_tokens=max_tokens, ignore_eos=True)
    with LLM(model_file(), num_blocks=64) as llm:
        first = run(llm, params, "first run")
        statistics = llm.statistics()
        for sample in first.outputs:
            print(f"\n{sample.index}: ...{sample.text}")

        # All but the last prompt token are computed once; that one, whose logits are sampled from, by each of the four.
        num_prompt_tokens = len(first.prompt_token_ids)
        print(f"\n{num_prompt_tokens} prompt tokens; {statistics.num_computed_tokens} tokens went through the model", end="")
        print(f", four separate requests would be {4 * (num_prompt_tokens + max_tokens - 1)}")
        print(f"{statistics.cache.num_copies} blocks were copied before a write: the fourth continuation kept the original")
        assert statistics.num_computed_tokens == num_prompt_tokens - 1 + 4 * max_tokens
        assert statistics.cache.num_copies == 3
        assert len({sample.token_ids for sample in first.outputs}) == 4

        # The seed draws the same numbers whatever else happens: the same four again, this time with a cached prompt.
        again = run(llm, params, "second run")
        print(f"\nthe same seed again, {again.num_cached_tokens} prompt tokens from the cache: the same four texts")
        assert [sample.token_ids for sample in again.outputs] == [sample.token_ids for sample in first.outputs]


if __name__ == "__main__":
    main()
