"""Look inside a running sequence: its tokens, block table and slots, and the K behind one position.

    python examples/look_inside.py
    python examples/look_inside.py --position 20 --layer 3 --html view.html

Two requests with the same beginning are running when the second is looked at. In a notebook, end a cell with the view itself: it shows as a
coloured table. What it says is checked against the K that transformers' own cache holds for the same tokens.
"""

import argparse
from pathlib import Path

import torch
from smollm2 import model_file

from pagedkv import LLM, SamplingParams
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.observe import inspect_sequence

BEGINNING = (
    "A keeper of bees gets up early, because bees fly as soon as the sun has warmed the hive. The hives of the monastery stood behind the "
    "orchard, twelve of them in a row, and the oldest was said to be as old as the wall. On a cold morning in April"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--position", type=int, help="the position whose K is shown (default: the last computed one)")
    parser.add_argument("--layer", type=int, default=0, help="in which layer (default 0)")
    parser.add_argument("--html", type=Path, help="write what a notebook would show to this file")
    options = parser.parse_args()

    with LLM(model_file(), num_blocks=64) as llm:
        engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        engine.add_request("rain", f"{BEGINNING} it rained, and", params)
        engine.add_request("sun", f"{BEGINNING} the sun came out, so", params)
        for _ in range(6):
            engine.step()

        view = inspect_sequence(engine, "sun", position=options.position, layer=options.layer)
        print(view)
        if options.html is not None:
            page = f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">{view._repr_html_()}'
            options.html.write_text(page, encoding="utf-8")
            print(f"\nnotebook view saved to {options.html}")

        # A slot is arithmetic over the block table, and the beginning lies in the other request's blocks.
        size, table = view.sequence.block_size, view.block_table
        assert list(view.slots) == [table[p // size] * size + p % size for p in range(view.sequence.num_computed_tokens)]
        other = inspect_sequence(engine, "rain").block_table
        num_shared = sum(mine == theirs for mine, theirs in zip(table, other, strict=False))
        assert num_shared == len(llm.tokenizer.encode(BEGINNING)) // size > 0

        # The K stored there is what the model, asked without us, computes for the same tokens.
        with torch.inference_mode():
            tokens = torch.tensor([view.sequence.token_ids[: view.sequence.num_computed_tokens]])
            cache = llm.runner.model(tokens, use_cache=True)[CACHE_ARGUMENT]
        theirs = cache.layers[view.layer].keys[0, :, view.position]
        difference = float((theirs - torch.tensor(view.key)).abs().max())
        print(f"\ntransformers' own cache holds the same K, to {difference:.1e}; the two requests share {num_shared} blocks")
        assert difference < 1e-3 * float(theirs.abs().max())


if __name__ == "__main__":
    main()
