"""Runs sequences through a runner by hand-made step plans, teacher-forced, and compares with the model's own forward."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagedkv.models import ModelRunner
from pagedkv.storage import BatchBuilder
from pagedkv.testing.plans import make_plan

Step = Sequence[tuple[int, int]]


def random_tokens(lens: Sequence[int], *, seed: int, vocab_size: int = 97) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lens]


def plain_logits(model: PreTrainedModel, tokens: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=row[None], use_cache=False).logits[0].float() for row in tokens]


def mixed_schedule(lens: Sequence[int], *, chunk: int, num_decodes: int) -> list[Step]:
    """Every sequence in chunks but its last tokens one by one; sequences start one step apart, so steps mix both."""
    todo = []
    for start, length in enumerate(lens):
        prompt = max(length - num_decodes, 1)
        parts = [min(chunk, prompt - at) for at in range(0, prompt, chunk)] + [1] * (length - prompt)
        todo.append([0] * start + parts)
    steps: list[Step] = []
    for column in range(max(len(parts) for parts in todo)):
        step = [(row, parts[column]) for row, parts in enumerate(todo) if column < len(parts) and parts[column]]
        steps.append(sorted(step, key=lambda item: item[1] != 1))
    return steps


def paged_logits(runner: ModelRunner, tokens: Sequence[Tensor], steps: Sequence[Step], *, seed: int = 0) -> list[Tensor]:
    """Logits of every position, over permuted blocks in a pool full of NaN; only the rows asked for are computed."""
    size = runner.block_size
    needed = [-(-len(row) // size) for row in tokens]
    blocks = np.random.default_rng(seed).permutation(sum(needed) + 3) + 1
    tables = [blocks[sum(needed[:row]) : sum(needed[: row + 1])].tolist() for row in range(len(needed))]
    storage = runner.new_storage(len(blocks) + 1)
    storage.fill(blocks.tolist(), float("nan"))
    builder = BatchBuilder(runner.device, size)
    done = [0] * len(tokens)
    parts: list[list[Tensor]] = [[] for _ in tokens]
    for step in steps:
        counts = [count for _, count in step]
        ids = torch.cat([tokens[row][done[row] : done[row] + count] for row, count in step])
        plan = make_plan(
            counts,
            [done[row] + count for row, count in step],
            block_tables=[tables[row] for row, _ in step],
            block_size=size,
            token_ids=ids.numpy(),
        )
        plan = dataclasses.replace(plan, logits_indices=np.arange(len(ids), dtype=np.int64))
        logits = runner.forward(builder.build(plan), storage)
        for (row, count), part in zip(step, logits.split(counts), strict=True):
            parts[row].append(part)
            done[row] += count
    storage.close()
    return [torch.cat(part) for part in parts]


def keys_of_a_dropped_storage(runner: ModelRunner, tokens: Tensor) -> list[weakref.ref[Tensor]]:
    """The K of each layer of a storage that a step of one sequence ran over, and that nobody but the runner may still hold."""
    storage, length = runner.new_storage(4), len(tokens)
    plan = make_plan([length], [length], block_tables=[[1]], block_size=runner.block_size, token_ids=tokens.numpy())
    runner.forward(BatchBuilder("cpu", runner.block_size).build(plan), storage)
    return [weakref.ref(pool.key) for pool in storage.layers]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], *, relative: float, what: str) -> None:
    for row, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.shape == theirs.shape, f"{what}: sequence {row} has {tuple(ours.shape)}, wanted {tuple(theirs.shape)}"
        scale = float(theirs.abs().max())
        difference = (ours - theirs).abs().amax(dim=1) / scale
        bad = torch.nonzero(~(difference <= relative)).flatten().tolist()
        assert not bad, f"{what}: sequence {row} of {len(theirs)} tokens first differs at position {bad[0]} by {difference[bad[0]]:.2e}"
