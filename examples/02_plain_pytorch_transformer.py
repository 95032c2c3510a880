"""A plain PyTorch transformer, written out in this file, that decodes over paged K/V: no transformers library.

    python examples/02_plain_pytorch_transformer.py

The model (rotary positions, grouped query heads) is handed the function that attends: one sees all tokens in every step, the other writes
the new K/V into pages and reads the rest from there. Both must choose the same tokens.
"""

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from pagedkv.attention import AttendOptions, Mask, get_backend
from pagedkv.core import KVCacheManager
from pagedkv.scheduling import Request, Scheduler, SchedulerConfig
from pagedkv.storage import BatchBuilder, KVStorage, LayerSpec

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY, BLOCK_SIZE, NUM_BLOCKS, MAX_TOKENS = 3, 8, 2, 16, 300, 16, 40, 24
WIDTH = HEADS * DIM
torch.manual_seed(0)
EMBEDDING, HEAD = torch.randn(VOCABULARY, WIDTH), torch.randn(WIDTH, VOCABULARY)
QKV = torch.randn(LAYERS, WIDTH, (HEADS + 2 * KV_HEADS) * DIM) / 4  # wide weights: a model that attends sharply, so that
OUT, UP, DOWN = torch.randn(3, LAYERS, WIDTH, WIDTH) / 4  # one wrong K or V anywhere gives other tokens


def rotate(x, positions):
    """Rotary positions: the pairs of ``x [tokens, heads, dim]`` are turned by angles that grow with the position."""
    angles = positions[:, None, None] / 10_000 ** (torch.arange(DIM // 2) / (DIM // 2))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)


def transformer(tokens, positions, attend):
    """Logits ``[tokens, vocabulary]``; ``attend(layer, q, k, v)`` is all that knows whether there is a cache."""
    x = EMBEDDING[tokens]
    for layer in range(LAYERS):
        qkv = (rms_norm(x, [WIDTH]) @ QKV[layer]).view(len(tokens), -1, DIM)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        x = x + attend(layer, rotate(q, positions), rotate(k, positions), v).flatten(1) @ OUT[layer]
        x = x + silu(rms_norm(x, [WIDTH]) @ UP[layer]) @ DOWN[layer]
    return rms_norm(x, [WIDTH]) @ HEAD


def without_cache(prompt):
    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    tokens = list(prompt)
    for _ in range(MAX_TOKENS):
        tokens.append(int(transformer(torch.tensor(tokens), torch.arange(len(tokens)), attend)[-1].argmax()))
    return tokens[len(prompt) :]


def over_pages(prompts):
    manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)  # who holds which block
    scheduler = Scheduler(manager, SchedulerConfig(max_num_batched_tokens=48))  # what runs next; long prompts in chunks
    layers = [LayerSpec(num_kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)] * LAYERS
    storage = KVStorage(layers, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device="cpu")  # the bytes
    backend, batches = get_backend("auto", device="cpu"), BatchBuilder("cpu", BLOCK_SIZE)
    options = AttendOptions(Mask.causal(), scale=DIM**-0.5)
    for number, prompt in enumerate(prompts):
        scheduler.submit(Request(str(number), prompt, max_tokens=MAX_TOKENS))
    while (plan := scheduler.plan()) is not None:
        storage.copy_blocks(plan.copies)  # copy-on-write, before anything is written
        step = backend.plan(batch := batches.build(plan))  # as tensors: prompts and single tokens of many sequences, packed

        def attend(layer, q, k, v, step=step):
            backend.write(storage.layers[layer], k, v, step)
            return backend.attend(q, storage.layers[layer], step, options)

        logits = transformer(batch.token_ids, batch.positions, attend)[batch.logits_indices]
        scheduler.complete(plan, logits.argmax(-1).numpy())
    return [scheduler.record(str(number)).branches[0].output_token_ids.tolist() for number in range(len(prompts))]


prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in (1, 5, 16, 40, 100)]
for prompt, tokens in zip(prompts, over_pages(prompts), strict=True):
    print(f"prompt of {len(prompt):3d} tokens: {tokens[:10]} ... the same without a cache")
    assert tokens == without_cache(prompt), f"without a cache: {without_cache(prompt)}"
