"""Layers with windows inside ``generate``: blocks behind a window come back, and no token changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from generation_support import assert_same_tokens, generate, prompts, small_model
from test_generate_modes import BATCH
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pagedkv import CachePool, PagedCache
from pagedkv.core import Window
from pagedkv.errors import ConfigError, InvalidRequestError
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.models.tiers import TierName
from pagedkv.testing.models import WINDOW

BLOCK = 2
COLUMNS = 21  # of prompts, beyond every window
NAMES = ("gemma2", "gemma3", "gpt_oss", "mistral", "llama4")
MODES: dict[str, dict[str, Any]] = {**BATCH, "prompt look-up": {"prompt_lookup_num_tokens": 7}, "draft model": {}}
EARLY = {
    "gemma2": ("beams", "draft model"),
    "gemma3": ("sampling", "prompt look-up"),
    "gpt_oss": ("greedy", "several beams"),
    "mistral": ("beams, prefill in chunks", "prompt look-up"),
    "llama4": ("greedy", "beams"),
}


def of(*early: str) -> Any:
    """For each model, those of the long sweep but for the early ones marked so."""
    return pytest.mark.parametrize(
        "pool", [pytest.param(name, marks=() if name in early else pytest.mark.slow) for name in NAMES], indirect=True
    )


@pytest.fixture(scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[CachePool]:
    with CachePool(small_model(request.param), num_blocks=200, block_size=BLOCK, check="step") as pool:
        assert pool.tier == "packed"
        assert len(pool.windows) == 2
        yield pool


@pytest.fixture
def name(pool: CachePool, request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["pool"])


class Poison(StoppingCriteria):
    """Stops nothing; between forwards, fills what nobody holds with NaN and looks how many blocks are held."""

    def __init__(self, cache: PagedCache) -> None:
        self.pool = cache.block_pool
        self.held: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.pool.fill_free_blocks(float("nan"))
        self.held.append(self.pool.group_blocks_in_use)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def poisoned(cache: PagedCache, tokens: Tensor, **settings: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
    poison = Poison(cache)
    return generate(cache.block_pool.model, tokens, cache, stopping_criteria=StoppingCriteriaList([poison]), **settings), poison.held


def most_blocks(sequences: int, *, ahead: int = 1) -> int:
    """What sequences may hold of the windowed group at most, where ``ahead`` tokens are not complete."""
    return sequences * (Window.sliding(WINDOW).most_blocks(BLOCK) + -(-ahead // BLOCK))


@pytest.mark.parametrize(
    ("pool", "mode"),
    [pytest.param(name, mode, marks=() if mode in EARLY[name] else pytest.mark.slow) for name in NAMES for mode in MODES],
    indirect=["pool"],
)
def test_tokens_are_the_same_and_windowed_layers_hold_no_more_than_their_windows(pool: CachePool, name: str, mode: str) -> None:
    settings = {"max_new_tokens": 24, **MODES[mode]}
    assisted = mode in ("prompt look-up", "draft model")
    tokens, mask = prompts(1, COLUMNS, seed=6) if assisted else prompts(3, COLUMNS, seed=5, padding=(9, 1))
    if mode == "draft model":
        settings["assistant_model"] = small_model(name)
        with torch.no_grad():
            for parameter in settings["assistant_model"].parameters():
                parameter.add_(0.01)
    elif assisted:
        tokens[0, 12:18] = tokens[0, 0:6]
    want = generate(pool.model, tokens, None, attention_mask=mask, **settings)
    with PagedCache(pool) as cache:
        got, held = poisoned(cache, tokens, attention_mask=mask, **settings)
        assert_same_tokens(got, want, f"{mode} on {name}")
        assert cache.num_blocks == pool.num_blocks_in_use
    assert pool.num_blocks_in_use == 0
    pool.check()
    rows = len(want) * settings.get("num_beams", 1) // settings.get("num_return_sequences", 1)
    bound = most_blocks(max(rows, len(want)), ahead=24 if assisted else 1)
    assert max(windowed for _, windowed in held) <= bound
    assert held[-1][0] > held[-1][1] > 0


def forward(pool: CachePool, cache: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    pool.fill_free_blocks(float("nan"))
    with torch.no_grad():
        logits = pool.model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True, **arguments).logits
    assert isinstance(logits, Tensor)
    return logits


@of(*NAMES)
def test_the_last_forward_can_be_taken_back_in_part_where_that_was_announced(pool: CachePool) -> None:
    tokens, mask = prompts(2, 50, seed=7, padding=(5,))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    random = np.random.default_rng(8)
    with PagedCache(pool) as cache, torch.no_grad():
        want = pool.model(tokens, attention_mask=mask, position_ids=positions).logits
        cache.activate_past_recording()
        done = 0
        while done < 50:
            count = min(int(random.integers(1, 14)), 50 - done)
            columns = slice(done, done + count)
            got = forward(pool, cache, tokens[:, columns], attention_mask=mask[:, : done + count], position_ids=positions[:, columns])
            seen = mask[:, columns].bool()
            torch.testing.assert_close(got[seen], want[:, columns][seen], rtol=1e-4, atol=1e-4)
            done += count
            back = int(random.integers(0, count))
            cache.crop(-back)
            done -= back
            pool.check()
            copy.copy(cache).close()
    assert pool.num_blocks_in_use == 0


@of("gemma2", "gpt_oss")
def test_row_whose_last_columns_are_padding_keeps_its_tokens_when_these_are_taken_back(pool: CachePool) -> None:
    tokens, mask = prompts(2, COLUMNS + 7, seed=13)
    mask[1, COLUMNS + 2 : COLUMNS + 6] = 0
    with PagedCache(pool) as cache:
        cache.activate_past_recording()
        forward(pool, cache, tokens[:, :COLUMNS])
        forward(pool, cache, tokens[:, COLUMNS:-1], attention_mask=mask[:, :-1])
        cache.crop(-4)
        kept = torch.cat([tokens[:, : COLUMNS + 2], tokens[:, -1:]], dim=1)
        with copy.copy(cache) as other, torch.no_grad():
            want = pool.model(kept).logits[:, -1]
            for each in (cache, other):
                torch.testing.assert_close(forward(pool, each, kept[:, -1:])[:, -1], want, rtol=1e-4, atol=1e-4)


@of("gemma3", "mistral")
@pytest.mark.parametrize("tier", ["packed", "dense"])
def test_rows_of_the_same_tokens_are_not_the_same_where_padding_between_them_counts(pool: CachePool, tier: TierName) -> None:
    whole, mask = prompts(3, 18, seed=14)
    whole[:] = whole[:1]
    mask[1, 8:11], mask[2, 4:7] = 0, 0
    whole[1, 11:], whole[2, 4:] = whole[0, 8:15].clone(), whole[0, 1:15].clone()
    whole[2, 7:] = whole[0, 4:15].clone()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with CachePool(pool.model, num_blocks=80, block_size=BLOCK, tier=tier) as other, PagedCache(other) as cache, torch.no_grad():
        want = pool.model(whole, attention_mask=mask, position_ids=positions).logits
        for begin, end in ((0, 8), (8, 13), (13, 17), (17, 18)):
            columns = slice(begin, end)
            got = forward(other, cache, whole[:, columns], attention_mask=mask[:, :end], position_ids=positions[:, columns])
            seen = mask[:, columns].bool()
            torch.testing.assert_close(got[seen], want[:, columns][seen], rtol=1e-4, atol=1e-4)


@of("gemma2", "gpt_oss")
def test_dense_forward_behind_packed_ones_reads_zeros_where_blocks_are_gone(pool: CachePool) -> None:
    tokens, _ = prompts(2, COLUMNS + 2, seed=15)
    with PagedCache(pool) as cache, torch.no_grad():
        want = pool.model(tokens, output_hidden_states=True)
        forward(pool, cache, tokens[:, :COLUMNS])
        pool.fill_free_blocks(float("nan"))
        got = pool.model(tokens[:, COLUMNS:], **{CACHE_ARGUMENT: cache}, use_cache=True, output_hidden_states=True)
        torch.testing.assert_close(got.logits, want.logits[:, COLUMNS:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.hidden_states[1], want.hidden_states[1][:, COLUMNS:], rtol=1e-4, atol=1e-4)


@of("gemma2", "mistral")
def test_what_is_gone_is_not_read_again_but_refused(pool: CachePool) -> None:
    tokens, _ = prompts(1, COLUMNS, seed=9)
    want = generate(pool.model, tokens, None)
    with PagedCache(pool) as cache:
        forward(pool, cache, tokens)
        for columns in (2 * BLOCK, COLUMNS - 1):
            with pytest.raises(InvalidRequestError, match="activate_past_recording"):
                cache.crop(-columns)
        own_mask = torch.zeros(1, 1, 1, COLUMNS + 1)
        with pytest.raises(InvalidRequestError, match="windowed_groups=False"):
            forward(pool, cache, tokens[:, :1], attention_mask=own_mask)
        assert cache.get_seq_length() == COLUMNS
        got, _ = poisoned(cache, torch.cat([tokens, want[:, COLUMNS : COLUMNS + 1]], dim=1), max_new_tokens=11)
        assert_same_tokens(got, want, "after what was refused")
        cache.crop(-cache.get_seq_length())
        assert pool.num_blocks_in_use == 0


@of("gemma3", "llama4")
def test_padding_behind_a_row_stays_where_the_window_has_moved_over_it(pool: CachePool, name: str) -> None:
    first, mask = prompts(2, COLUMNS, seed=10, padding=(3,))
    caches = {"ours": PagedCache(pool), "own": None}
    turns: dict[str, list[Tensor]] = {}
    for who, cache in caches.items():
        said = generate(pool.model, first, cache, attention_mask=mask, max_new_tokens=20)
        seen = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], dim=1)
        seen[1, COLUMNS + 2 :] = 0  # as if the row had ended there
        more, _ = prompts(2, 5, seed=11)
        whole, seen = torch.cat([said, more], dim=1), torch.cat([seen, torch.ones_like(more)], dim=1)
        turns[who] = [said, generate(pool.model, whole, cache, attention_mask=seen, max_new_tokens=8)]
    for ours, own in zip(turns["ours"], turns["own"], strict=True):
        assert_same_tokens(ours, own, f"chat on {name}")
    assert caches["ours"] is not None
    caches["ours"].close()
    assert pool.num_blocks_in_use == 0


def test_small_pool_for_layers_with_windows_is_enough_where_prompts_come_in_chunks() -> None:
    tokens, _ = prompts(2, 60, seed=12)
    model = small_model("gemma3")
    want = generate(model, tokens, None)
    with CachePool(model, num_blocks=(80, 21), block_size=BLOCK) as pool:
        nbytes, (whole, windowed) = pool.nbytes_per_block, pool.group_nbytes
        assert whole + windowed == nbytes
        with PagedCache(pool) as cache:
            got, held = poisoned(cache, tokens, prefill_chunk_size=4)
        assert_same_tokens(got, want, "chunks")
        most = max(full * whole + short * windowed for full, short in held)
        assert most <= pool.peak_nbytes_in_use < (sum(held[-1]) * nbytes)
    with pytest.raises(ConfigError, match="2 layer groups"):
        CachePool(model, num_blocks=(80, 21, 5))
    with CachePool(model, num_blocks=80, windowed_groups=False) as pool:
        assert pool.windows == (None,)
