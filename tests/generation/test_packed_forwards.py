"""Forwards that run packed: what the caller gets back, what is computed at all, and which forwards are dense instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation_support import assert_same_tokens, compare, generate, prompts, small_model
from torch import Tensor
from transformers import AutoConfig, DynamicCache

from pagedkv import CachePool, ModelRunner, PagedCache
from pagedkv.errors import ConfigError
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.testing.models import randomised


@pytest.fixture(scope="module")
def pool() -> Iterator[CachePool]:
    with CachePool(small_model("gemma2"), num_blocks=100, block_size=4, check="audit") as pool:
        assert pool.tier == "packed"
        yield pool


class Widths:
    """Records the tokens that each forward of a model computes."""

    def __init__(self, pool: CachePool) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._embeddings = pool.model.get_input_embeddings()

    def __enter__(self) -> Widths:
        self._hook = self._embeddings.register_forward_hook(lambda _module, args, _output: self.shapes.append(tuple(args[0].shape)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def both(pool: CachePool, steps: list[tuple[tuple[Any, ...], dict[str, Any]]], mask: Tensor | None = None) -> None:
    """The same forwards over a paged cache and over transformers' own: the same logits wherever there is a token."""
    results: list[list[Tensor]] = [[], []]
    with torch.no_grad(), PagedCache(pool) as cache:
        for place, past in enumerate((cache, DynamicCache(config=pool.model.config))):
            for args, kwargs in steps:
                output = pool.model(*args, **kwargs, **{CACHE_ARGUMENT: past}, use_cache=True)
                assert (output[1] if isinstance(output, tuple) else output[CACHE_ARGUMENT]) is past
                results[place].append(output[0])
    for ours, own in zip(*results, strict=True):
        seen = torch.ones(own.shape[:2], dtype=torch.bool) if mask is None else mask[:, -own.shape[1] :].bool()
        assert ours.shape == own.shape
        torch.testing.assert_close(ours[seen], own[seen], rtol=1e-4, atol=1e-4)
        assert not ours[~seen].any()


def test_logits_of_all_columns_come_back_where_they_belong(pool: CachePool) -> None:
    tokens, mask = prompts(3, 9, seed=1, padding=(4, 1))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    kwargs = {"attention_mask": mask, "position_ids": positions}
    both(pool, [((tokens,), kwargs)], mask)
    for keep in (3, torch.tensor([2, 8, 5])):
        with torch.no_grad(), PagedCache(pool) as cache:
            got = pool.model(tokens, **kwargs, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=keep).logits
            want = pool.model(tokens, **kwargs, logits_to_keep=keep).logits
        torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)
        assert got.shape == want.shape


def test_arguments_by_place_and_results_as_tuples_work(pool: CachePool) -> None:
    tokens, mask = prompts(2, 7, seed=2)
    both(pool, [((tokens, mask), {"return_dict": False}), ((tokens[:, :2],), {"return_dict": False})])


def test_rows_that_are_the_same_are_computed_once(pool: CachePool) -> None:
    tokens, _ = prompts(1, 10, seed=3)
    with Widths(pool) as widths, PagedCache(pool) as cache:
        generate(pool.model, tokens, cache, num_beams=4, max_new_tokens=4)
    assert widths.shapes[0] == (1, 10)
    assert set(widths.shapes[1:]) == {(1, 4)}


def test_padding_is_not_computed(pool: CachePool) -> None:
    tokens, mask = prompts(3, 10, seed=4, padding=(7, 2))
    with Widths(pool) as widths, PagedCache(pool) as cache:
        generate(pool.model, tokens, cache, attention_mask=mask, max_new_tokens=2)
    assert widths.shapes == [(1, 3 + 8 + 10), (1, 3)]


def test_cached_prefix_is_not_computed_again_unless_its_logits_are_wanted(pool: CachePool) -> None:
    tokens, _ = prompts(1, 14, seed=5)
    want = generate(pool.model, tokens, None)
    with Widths(pool) as widths, PagedCache(pool, namespace="prefix") as one, PagedCache(pool, namespace="prefix") as two:
        for cache in (one, two):
            assert_same_tokens(generate(pool.model, tokens, cache), want, "shared prefix")
        assert widths.shapes[0] == (1, 14)
        assert widths.shapes[12] == (1, 2)
        with PagedCache(pool, namespace="prefix") as three, torch.no_grad():
            got = pool.model(tokens, **{CACHE_ARGUMENT: three}, use_cache=True).logits
        assert widths.shapes[-1] == (1, 14)
        torch.testing.assert_close(got, pool.model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_first_chunk_of_nothing_but_padding_works(pool: CachePool) -> None:
    tokens, mask = prompts(2, 9, seed=6, padding=(7, 5))
    compare(pool, tokens, "padding longer than a chunk", attention_mask=mask, prefill_chunk_size=2)


@pytest.mark.parametrize("extra", ["output_attentions", "output_hidden_states"])
def test_forward_that_wants_more_than_logits_is_dense_between_packed_ones(pool: CachePool, extra: str) -> None:
    tokens, _ = prompts(2, 9, seed=7)
    got, want = [], []
    with torch.no_grad(), PagedCache(pool) as cache, Widths(pool) as widths:
        for past, results in ((cache, got), (DynamicCache(config=pool.model.config), want)):
            for columns, options in ((slice(0, 5), {}), (slice(5, 7), {extra: True}), (slice(7, 9), {})):
                results.append(pool.model(tokens[:, columns], **{CACHE_ARGUMENT: past}, use_cache=True, **options))
    assert widths.shapes[:3] == [(1, 10), (2, 2), (1, 4)]
    for ours, own in zip(got, want, strict=True):
        torch.testing.assert_close(ours.logits, own.logits, rtol=1e-4, atol=1e-4)
    name = extra.removeprefix("output_")
    for ours, own in zip(got[1][name], want[1][name], strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_positions_of_the_callers_own_are_dense_and_right(pool: CachePool) -> None:
    tokens, _ = prompts(2, 8, seed=8)
    with Widths(pool) as widths:
        both(pool, [((tokens,), {"position_ids": torch.arange(3, 11)[None]}), ((tokens[:, :1],), {"position_ids": torch.tensor([[11]])})])
    assert widths.shapes[:2] == [(2, 8), (2, 1)]


def test_padding_between_tokens_counts_where_the_model_measures_distances_in_columns() -> None:
    with CachePool(small_model("mpt"), num_blocks=40, block_size=4) as pool:
        assert pool.tier == "packed"
        tokens, mask = prompts(2, 12, seed=12)
        mask[1, 3:7] = 0
        with torch.no_grad(), PagedCache(pool) as cache:
            want = pool.model(tokens, attention_mask=mask).logits
            for columns in (slice(0, 8), slice(8, 12)):
                seen = mask[:, columns].bool()
                arguments = {"attention_mask": mask[:, : columns.stop], CACHE_ARGUMENT: cache, "use_cache": True}
                got = pool.model(tokens[:, columns], **arguments).logits
                torch.testing.assert_close(got[seen], want[:, columns][seen], rtol=1e-4, atol=1e-4)


_SWITCHING: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 5.33,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_rows_beyond_a_switch_of_frequencies_are_what_transformers_makes_of_them(kind: str) -> None:
    model_type, options = _SWITCHING[kind]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = randomised(AutoConfig.for_model(model_type, **sizes, num_key_value_heads=2, pad_token_id=0, **options))
    with CachePool(model, num_blocks=100, block_size=4) as pool:
        assert pool.tier == "dense"
        assert "longest row" in str(pool.tier_reason)
        for columns, beams in ((12, 1), (12, 3), (30, 1), (30, 3)):
            tokens, mask = prompts(2, columns, seed=columns, padding=(3,))
            # The frequencies depend on what the model has seen before, too: a short forward resets them.
            with torch.no_grad():
                model(tokens[:, :1])
            with PagedCache(pool) as cache:
                got = generate(model, tokens, cache, attention_mask=mask, num_beams=beams, max_new_tokens=20)
                model(tokens[:, :1])
            want = generate(model, tokens, None, attention_mask=mask, num_beams=beams, max_new_tokens=20)
            assert_same_tokens(got, want, f"{kind}, {columns} columns, {beams} beams")


def test_interrupted_forward_leaves_the_model_as_it_was(pool: CachePool) -> None:
    tokens, _ = prompts(2, 8, seed=9)
    model = pool.model
    want = model(tokens).logits
    implementation = model.config._attn_implementation

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.get_output_embeddings().register_forward_hook(stop)
    with PagedCache(pool) as cache:
        with pytest.raises(KeyboardInterrupt):
            generate(model, tokens, cache)
        hook.remove()
        torch.testing.assert_close(model(tokens).logits, want)
        assert model.config._attn_implementation == implementation
        assert_same_tokens(generate(model, tokens, cache), generate(model, tokens, None), "after the interrupt")


def test_copied_model_does_not_run_over_the_pool_of_the_original(pool: CachePool) -> None:
    tokens, _ = prompts(1, 8, seed=10)
    other = copy.deepcopy(pool.model)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(-1.0)
        torch.testing.assert_close(other(tokens).logits[:, -1].argmin(), pool.model(tokens).logits[:, -1].argmax())


def test_model_that_is_not_packed_lets_nobody_else_call_it_within_a_step() -> None:
    runner = ModelRunner(small_model("bloom"), tier="dense")
    storage = runner.new_storage(2)
    with pytest.raises(ConfigError, match="'dense'"), runner.step(None, storage):  # type: ignore[arg-type]  # it does not come to that
        pass


def test_half_precision_runs_packed_and_generates() -> None:
    model = small_model("llama").to(torch.bfloat16)
    tokens, mask = prompts(2, 8, seed=11, padding=(3,))
    with CachePool(model, num_blocks=40, block_size=4) as pool, PagedCache(pool) as cache:
        assert pool.tier == "packed"
        assert generate(model, tokens, cache, attention_mask=mask, num_beams=2).shape == (2, 20)
