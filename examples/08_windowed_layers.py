"""Layers with a window give back what is behind it, while the sequence runs: a table for each kind of layer, numpy only.

    python examples/08_windowed_layers.py

A model with layers that read everything and layers that see the last 1,024 tokens has two layer groups. The books give the second group a
pool of 200 blocks, which a prompt of 32,768 tokens would fill ten times over. A second prompt finds the first one's prefix: of the
windowed layers it needs only the blocks inside the window at the prefix's end.
"""

import sys

import numpy as np

from pagedkv.core import KVCacheManager, Window

BLOCK_SIZE, WINDOW, CHUNK = 16, 1_024, 2_048

manager = KVCacheManager(num_blocks=[4_200, 200], windows=[None, Window.sliding(WINDOW)], block_size=BLOCK_SIZE)
prompt = np.arange(32_768)
(seq,) = manager.open([prompt]).seqs


def held() -> list[int]:
    """Blocks in use, group by group."""
    return [group.num_in_use for group in manager.statistics().groups]


print("tokens    full blocks    windowed blocks")
for start in range(0, len(prompt), CHUNK):
    extension = manager.extend([seq], [CHUNK])  # slots for a chunk: a row of slot_mapping for each group
    assert extension.slot_mapping.shape == (2, CHUNK)
    manager.complete([seq])  # the forward pass has run: what no later token sees is given back
    print(f"{start + CHUNK:6,} {held()[0]:14,} {held()[1]:18,}")
assert held() == [len(prompt) // BLOCK_SIZE, WINDOW // BLOCK_SIZE]

table = manager.table.block_tables[1, 0]
print(f"\nthe windowed table: {int((table[:2048] == 0).sum()):,} times the null block, then {table[1984:1987]} ...")
manager.release([seq])

for shared, why in ((32_000, "the pool still has what was given back last"), (16_000, "the window of that prefix is gone")):
    found = manager.match(prompt[:shared]).num_tokens
    print(f"a prompt that shares {shared:,} tokens finds {found:,}: {why}")
    assert found == (shared if shared == 32_000 else 0)
again = manager.open([np.append(prompt, [7, 7, 7])])
print(f"one that goes on where it ended finds {int(again.num_cached_tokens[0]):,}, and holds {held()} blocks")
assert again.num_cached_tokens.tolist() == [len(prompt)]
assert held() == [len(prompt) // BLOCK_SIZE, WINDOW // BLOCK_SIZE]
manager.check()
assert "torch" not in sys.modules
