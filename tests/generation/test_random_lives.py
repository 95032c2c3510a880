"""Caches through random lives beside transformers' own: chunks, padding anywhere, other rows, cropping, copies, hidden ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from generation_support import small_model
from transformers import DynamicCache

from pagedkv import CachePool, PagedCache
from pagedkv.errors import InvalidRequestError
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.models.tiers import TierName

KINDS: dict[str, tuple[str, TierName]] = {"packed": ("llama", "packed"), "dense": ("llama", "dense"), "windows": ("gemma3", "packed")}


@pytest.fixture(scope="module", params=KINDS)
def pool(request: pytest.FixtureRequest) -> Iterator[CachePool]:
    name, tier = KINDS[request.param]
    with CachePool(small_model(name), num_blocks=200, block_size=4, tier=tier, check="audit") as pool:
        yield pool


class Life:
    """One cache of ours and one of transformers', and the mask that both are shown."""

    def __init__(self, pool: CachePool, seed: int) -> None:
        self.pool, self.random = pool, np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.ours, self.own = PagedCache(pool), DynamicCache()
        self.mask = torch.zeros(int(self.random.integers(1, 4)), 0, dtype=torch.long)
        if self.random.random() < 0.5:
            self.ours.activate_past_recording()

    def forward(self) -> None:
        rows, count = self.mask.shape[0], int(self.random.integers(1, 6))
        tokens = torch.randint(3, 9, (rows, count), generator=self.generator)  # few, so that rows are the same now and then
        new = torch.ones(rows, count, dtype=torch.long)
        for row in range(rows):
            if self.random.random() < 0.3:
                new[row, : int(self.random.integers(0, count))] = 0
        self.mask = torch.cat([self.mask, new], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -count:]
        arguments = {"attention_mask": self.mask, "position_ids": positions, "use_cache": True}
        self.pool.fill_free_blocks(float("nan"))
        with torch.no_grad():
            got, want = (self.pool.model(tokens, **arguments, **{CACHE_ARGUMENT: past}).logits for past in (self.ours, self.own))
        torch.testing.assert_close(got[new.bool()], want[new.bool()], rtol=1e-4, atol=1e-4)

    def select(self) -> None:
        rows = self.mask.shape[0]
        chosen = torch.from_numpy(self.random.integers(0, rows, int(self.random.integers(1, 5))))
        for past in (self.ours, self.own):
            past.reorder_cache(chosen) if len(chosen) == rows else past.batch_select_indices(chosen)
        self.mask = self.mask[chosen]

    def repeat(self) -> None:
        if self.mask.shape[0] < 4:
            for past in (self.ours, self.own):
                past.batch_repeat_interleave(2)
            self.mask = self.mask.repeat_interleave(2, dim=0)

    def crop(self) -> None:
        count = int(self.random.integers(0, min(6, self.mask.shape[1])))
        try:
            self.ours.crop(-count)
        except InvalidRequestError:
            assert len(self.pool.windows) > 1  # what is behind a window is gone
            return
        self.own.crop(-count)
        self.mask = self.mask[:, : self.mask.shape[1] - count]

    def hide(self) -> None:
        self.mask[int(self.random.integers(0, self.mask.shape[0])), -int(self.random.integers(1, 4)) :] = 0

    def fork(self) -> None:
        former, self.ours = self.ours, copy.copy(self.ours)
        former.close()

    def run(self, num_steps: int) -> None:
        self.forward()
        actions = (self.forward, self.forward, self.forward, self.select, self.repeat, self.crop, self.hide, self.fork)
        for _ in range(num_steps):
            actions[int(self.random.integers(0, len(actions)))]()
        self.forward()
        self.ours.close()
        assert self.pool.num_blocks_in_use == 0
        self.pool.check()


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 80))])
def test_random_life_gives_the_logits_of_transformers_cache(pool: CachePool, seed: int) -> None:
    Life(pool, seed).run(num_steps=20)
