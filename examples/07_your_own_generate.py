"""Keep ``model.generate()``, and give it a cache in blocks: beams, samples and continuations share what they have in common.

    python examples/07_your_own_generate.py

A tiny model with random weights and a window in every other layer: the tokens mean nothing, but they must be the same as with
transformers' own cache. The pool says how many blocks that took.
"""

import copy

import torch

from pagedkv import CachePool, PagedCache
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.testing.models import tiny_model

NEW_TOKENS = 24
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def main() -> None:
    model = tiny_model("gemma3")
    torch.manual_seed(0)
    prompt = torch.randint(3, 97, (1, 96))

    # One cache, one call: the pool is made for the cache, and goes with it.
    with PagedCache(model, num_blocks=64) as cache:
        assert torch.equal(model.generate(prompt, **{CACHE_ARGUMENT: cache}, **GREEDY), model.generate(prompt, **GREEDY))
    print("greedy: the same tokens")

    # A pool is made once, because it tries the model first, and serves any number of caches.
    with CachePool(model, num_blocks=64, block_size=8) as pool:
        print(f"the pool reads {'blocks in place' if pool.tier == 'packed' else pool.tier_reason}")

        # Beam search: the prompt is stored once, not once for each beam, and beams are re-ordered by changing tables.
        with PagedCache(pool) as cache:
            beams = model.generate(prompt, **{CACHE_ARGUMENT: cache}, num_beams=4, **GREEDY)
        assert torch.equal(beams, model.generate(prompt, num_beams=4, **GREEDY))
        separate = 4 * -(-(prompt.shape[1] + NEW_TOKENS) // 8)
        print(f"4 beams: the same tokens in {pool.peak_blocks_in_use} blocks; four separate rows would fill {separate}")
        assert pool.peak_blocks_in_use < separate / 2

        # A prefilled cache, continued three times: copies share its blocks, and write only what is their own.
        with PagedCache(pool) as prefilled:
            with torch.no_grad():
                model(prompt, **{CACHE_ARGUMENT: prefilled}, use_cache=True)
            for question in ([5, 9, 11], [7, 7], [31, 4, 4, 8]):
                whole = torch.cat([prompt, torch.tensor([question])], dim=1)
                with copy.copy(prefilled) as cache:
                    answer = model.generate(whole, **{CACHE_ARGUMENT: cache}, **GREEDY)
                    print(f"a continuation: {cache.num_blocks} blocks, of which {prefilled.num_blocks} are the prompt's")
                assert torch.equal(answer, model.generate(whole, **GREEDY))

        # Assisted decoding: candidates that the model rejects are cut off again.
        with PagedCache(pool) as cache:
            assisted = model.generate(prompt, **{CACHE_ARGUMENT: cache}, prompt_lookup_num_tokens=4, **GREEDY)
        assert torch.equal(assisted, model.generate(prompt, **GREEDY))
        assert pool.num_blocks_in_use == 0
        print("prompt look-up: the same tokens; all blocks are back")


if __name__ == "__main__":
    main()
