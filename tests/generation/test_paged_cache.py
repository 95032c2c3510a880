"""What a user does with a cache besides one ``generate``: chats, copies, shared pools, mistakes, and what comes back."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from generation_support import SETTINGS, assert_same_tokens, compare, generate, prompts, small_model
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from pagedkv import CachePool, PagedCache
from pagedkv.errors import (
    ClosedError,
    ConfigError,
    InvalidRequestError,
    OutOfBlocksError,
    StepError,
    UnsupportedModelError,
)
from pagedkv.models import CACHE_ARGUMENT
from pagedkv.testing.models import randomised


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_model("gemma2")


@pytest.fixture(scope="module", params=["gemma2", "falcon_alibi"])  # packed and dense
def shared_pool(request: pytest.FixtureRequest) -> Iterator[CachePool]:
    with CachePool(small_model(request.param), num_blocks=100, block_size=4, windowed_groups=False, check="step") as pool:
        yield pool


@pytest.fixture
def pool(shared_pool: CachePool) -> Iterator[CachePool]:
    """A pool that must be empty and in order after every test."""
    yield shared_pool
    assert shared_pool.num_blocks_in_use == 0
    shared_pool.check()


@pytest.fixture
def small_pool(model: PreTrainedModel) -> Iterator[CachePool]:
    with CachePool(model, num_blocks=12, block_size=4, max_num_seqs=4, tier="dense", check="audit") as pool:
        yield pool
        pool.check()


# Chats and copies.


def test_continued_chat_with_padding_between_turns_gives_the_same_tokens(pool: CachePool) -> None:
    first, mask = prompts(2, 9, seed=1, padding=(3,))
    settings = {"eos_token_id": 5, "max_new_tokens": 6}
    caches = {"ours": PagedCache(pool), "own": DynamicCache(config=pool.model.config)}
    turns: dict[str, list[torch.Tensor]] = {}
    for name, cache in caches.items():
        said = generate(pool.model, first, cache, attention_mask=mask, **settings)
        # Row 1 ended early: what follows in it is padding that the next turn hides.
        seen = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
        seen[1, 12:] = 0
        more, _ = prompts(2, 5, seed=2)
        whole = torch.cat([said[:, :15], more], dim=1)
        seen = torch.cat([seen, torch.ones_like(more)], dim=1)
        turns[name] = [said, generate(pool.model, whole, cache, attention_mask=seen, **settings)]
    for ours, own in zip(turns["ours"], turns["own"], strict=True):
        assert_same_tokens(ours, own, "chat")
    caches["ours"].close()
    assert pool.num_blocks_in_use == 0


def test_hidden_tail_of_a_row_is_given_back(pool: CachePool) -> None:
    tokens, mask = prompts(2, 12, seed=3)
    with torch.no_grad(), PagedCache(pool) as cache:
        pool.model(tokens, attention_mask=mask, **{CACHE_ARGUMENT: cache}, use_cache=True)
        assert cache.num_blocks == 6
        mask[1, 3:] = 0
        grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        pool.model(tokens[:, :1], attention_mask=grown, **{CACHE_ARGUMENT: cache}, use_cache=True)
        assert cache.num_blocks == 4 + 1


def test_token_hidden_in_the_middle_is_not_attended(pool: CachePool) -> None:
    tokens, mask = prompts(2, 12, seed=4)
    logits = []
    with torch.no_grad(), PagedCache(pool) as cache:
        for past in (cache, DynamicCache(config=pool.model.config)):
            mask = torch.ones_like(mask)
            pool.model(tokens[:, :8], attention_mask=mask[:, :8], **{CACHE_ARGUMENT: past}, use_cache=True)
            mask[0, 2:5] = 0
            logits.append(pool.model(tokens[:, 8:], attention_mask=mask, **{CACHE_ARGUMENT: past}, use_cache=True).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_copies_of_a_prefilled_cache_share_its_blocks(pool: CachePool, make: Any) -> None:
    prompt, _ = prompts(1, 18, seed=7)
    with PagedCache(pool) as prefilled:
        with torch.no_grad():
            pool.model(prompt, **{CACHE_ARGUMENT: prefilled}, use_cache=True)
        assert pool.num_blocks_in_use == 5
        ends = [prompts(1, 3, seed=seed)[0] for seed in (8, 9, 10)]
        copies = [make(prefilled) for _ in ends]
        assert pool.num_blocks_in_use == 5
        for end, each in zip(ends, copies, strict=True):
            whole = torch.cat([prompt, end], dim=1)
            assert_same_tokens(generate(pool.model, whole, each), generate(pool.model, whole, None), "continuation")
        # Four full blocks are shared; each continuation has a copy of the fifth, and what it wrote behind it.
        assert pool.num_blocks_in_use == 4 + 1 + 3 * 4
        for each in copies:
            each.close()
        assert pool.num_blocks_in_use == 5
    assert pool.num_blocks_in_use == 0


def test_one_prefilled_row_is_repeated_for_a_batch(pool: CachePool) -> None:
    prompt, _ = prompts(1, 16, seed=11)
    with PagedCache(pool) as cache, torch.no_grad():
        pool.model(prompt, **{CACHE_ARGUMENT: cache}, use_cache=True)
        cache.batch_repeat_interleave(3)
        whole = torch.cat([prompt.repeat(3, 1), torch.tensor([[4], [9], [33]])], dim=1)
        assert_same_tokens(generate(pool.model, whole, cache), generate(pool.model, whole, None), "repeated")
        cache.batch_select_indices(torch.tensor([True, False, True]))
        assert cache.batch_size == 2
        cache.reset()
        assert pool.num_blocks_in_use == 0
        assert cache.batch_size == -1


def test_cropped_cache_goes_on_from_what_is_left(pool: CachePool) -> None:
    tokens, mask = prompts(2, 12, seed=12, padding=(5,))
    logits = []
    with torch.no_grad(), PagedCache(pool) as cache:
        own = DynamicCache()
        for past in (cache, own):
            pool.model(tokens, attention_mask=mask, **{CACHE_ARGUMENT: past}, use_cache=True)
            past.crop(-8)
            logits.append(pool.model(tokens[:, 4:], attention_mask=mask, **{CACHE_ARGUMENT: past}, use_cache=True).logits[:, -1])
        assert cache.get_seq_length() == 12
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_embeddings_as_input_give_the_same_tokens_and_share_nothing(pool: CachePool) -> None:
    tokens, _ = prompts(2, 9, seed=13)
    tokens[1] = tokens[0]
    embeddings = pool.model.get_input_embeddings()(tokens).detach()
    with PagedCache(pool, namespace="all") as cache:
        got = generate(pool.model, None, cache, inputs_embeds=embeddings)
        assert_same_tokens(got, generate(pool.model, None, None, inputs_embeds=embeddings), "embeddings")
    with PagedCache(pool, namespace="all") as cache:
        generate(pool.model, torch.zeros(2, 9, dtype=torch.long) + 4, cache)
    assert_same_tokens(got, generate(pool.model, None, None, inputs_embeds=embeddings), "embeddings")


# Pools.


@pytest.mark.parametrize("columns", [None, 12])
def test_prompt_of_beams_is_stored_once(model: PreTrainedModel, columns: int | None) -> None:
    tokens, _ = prompts(1, 40, seed=14)
    with CachePool(model, num_blocks=40, block_size=4, tier="dense") as pool:
        compare(pool, tokens, "beams", num_beams=8, max_new_tokens=2, prefill_chunk_size=columns)
        assert pool.peak_blocks_in_use == 10 + 8


def test_caches_of_one_name_share_prefixes_and_others_do_not(pool: CachePool) -> None:
    tokens, _ = prompts(1, 24, seed=15)
    want = generate(pool.model, tokens, None)
    with PagedCache(pool, namespace="system") as one, PagedCache(pool, namespace="system") as two, PagedCache(pool) as three:
        held = []
        for cache in (one, two, three):
            assert_same_tokens(generate(pool.model, tokens, cache), want, "shared")
            held.append(pool.num_blocks_in_use)
    assert held[0] == 9
    assert held[1] < 18 - 4
    assert held[2] == held[1] + 9
    assert pool.num_blocks_in_use == 0
    assert pool.purge("system") > 0


def test_prefixes_are_forgotten_when_the_model_was_altered() -> None:
    model = small_model("llama")
    tokens, _ = prompts(1, 24, seed=32)
    with CachePool(model, num_blocks=60, block_size=4) as pool:
        for _ in range(2):
            for _ in range(2):
                with PagedCache(pool, namespace="system") as cache:
                    assert_same_tokens(generate(model, tokens, cache), generate(model, tokens, None), "altered")
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(-1.0)
        with pytest.raises(ConfigError, match="namespace"):
            PagedCache(pool, namespace=3)  # type: ignore[arg-type]  # as a user may pass it


class _Wrapper(torch.nn.Module):
    """Around a model, as adapters put one."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> torch.nn.Module:
        return self.model

    def forward(self, **arguments: Any) -> Any:
        return self.model(**arguments)


def test_model_in_a_wrapper_is_the_one_inside(model: PreTrainedModel) -> None:
    tokens, _ = prompts(2, 9, seed=33)
    with PagedCache(_Wrapper(model).eval(), num_blocks=40, tier="dense") as cache:
        assert cache.block_pool.model is model
        assert_same_tokens(generate(model, tokens, cache), generate(model, tokens, None), "wrapped")


def test_cache_that_is_garbage_gives_its_blocks_back(pool: CachePool) -> None:
    tokens, _ = prompts(2, 9, seed=16)
    generate(pool.model, tokens, PagedCache(pool))
    gc.collect()
    assert pool.num_blocks_in_use == 0


def test_pool_that_is_garbage_leaves_no_hooks(model: PreTrainedModel) -> None:
    before = len(model._forward_hooks), len(model._forward_pre_hooks)
    cache = PagedCache(model, num_blocks=40, block_size=4)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) > before
    del cache
    gc.collect()
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == before


def test_cache_of_a_model_makes_a_pool_of_its_own(model: PreTrainedModel) -> None:
    tokens, _ = prompts(1, 9, seed=17)
    with PagedCache(model, kv_cache_memory_bytes=200_000, block_size=4) as cache:
        assert_same_tokens(generate(model, tokens, cache), generate(model, tokens, None), "own pool")
        pool = cache.block_pool
        assert pool.nbytes_per_block * (pool.num_usable_blocks // len(pool.windows) + 1) <= 200_000
    with pytest.raises(ClosedError, match="pool"):
        pool.open(None)
    assert PagedCache.pool(model).num_usable_blocks >= 1024


def test_forwards_without_the_cache_are_left_alone(pool: CachePool) -> None:
    tokens, _ = prompts(1, 9, seed=18)
    with torch.no_grad():
        assert pool.model(tokens).logits.shape == (1, 9, 97)
    assert pool.num_blocks_in_use == 0


# Mistakes.


def test_pool_that_is_too_small_raises_and_gives_everything_back(small_pool: CachePool) -> None:
    model = small_pool.model
    tokens, _ = prompts(2, 20, seed=19)
    with PagedCache(small_pool) as cache:
        with pytest.raises(OutOfBlocksError, match="num_blocks"):
            generate(model, tokens, cache, max_new_tokens=8)
        assert cache.get_seq_length() == 20
        assert small_pool.num_blocks_in_use == 10
        cache.reset()
        assert small_pool.num_blocks_in_use == 0
        with pytest.raises(OutOfBlocksError, match="num_blocks"):
            generate(model, prompts(1, 60, seed=19)[0], cache)
        assert cache.batch_size == -1
        assert small_pool.num_blocks_in_use == 0
        assert_same_tokens(generate(model, tokens[:, :6], cache), generate(model, tokens[:, :6], None), "afterwards")


def test_more_sequences_than_the_pool_has_are_refused(small_pool: CachePool) -> None:
    with PagedCache(small_pool) as cache:
        with pytest.raises(InvalidRequestError, match="max_num_seqs"):
            generate(small_pool.model, prompts(5, 4, seed=20)[0], cache)
        assert small_pool.num_blocks_in_use == 0


def test_closed_cache_is_refused_by_everything(pool: CachePool) -> None:
    tokens, _ = prompts(1, 5, seed=21)
    cache = PagedCache(pool)
    cache.close()
    cache.close()
    for use in (
        lambda: generate(pool.model, tokens, cache),
        lambda: pool.model(tokens, **{CACHE_ARGUMENT: cache}),
        lambda: cache.get_seq_length(),
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.reset(),
        lambda: copy.copy(cache),
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_other_model_or_a_part_of_the_model_is_refused(pool: CachePool) -> None:
    tokens, _ = prompts(1, 5, seed=22)
    other = small_model("llama")
    with PagedCache(pool) as cache, torch.no_grad():
        for use in (lambda: generate(other, tokens, cache), lambda: pool.model.base_model(tokens, **{CACHE_ARGUMENT: cache})):
            with pytest.raises(InvalidRequestError, match="another model or to a part"):
                use()
        assert pool.num_blocks_in_use == 0
        generate(pool.model, tokens, cache)


def test_other_number_of_rows_or_columns_is_refused(pool: CachePool) -> None:
    tokens, mask = prompts(2, 6, seed=23, padding=(2,))
    with PagedCache(pool) as cache, torch.no_grad():
        pool.model(tokens, attention_mask=mask, **{CACHE_ARGUMENT: cache}, use_cache=True)
        for rows, message in ((3, "holds 2 rows and the forward has 3"), (2, "was padding when it came")):
            with pytest.raises(InvalidRequestError, match=message):
                pool.model(torch.ones(rows, 1, dtype=torch.long), **{CACHE_ARGUMENT: cache}, use_cache=True)
        with pytest.raises(InvalidRequestError, match=r"\[2, 7\] is needed"):
            pool.model(tokens[:, :1], attention_mask=mask, **{CACHE_ARGUMENT: cache}, use_cache=True)
        with pytest.raises(InvalidRequestError, match="use_cache"):
            pool.model(tokens[:, :1], **{CACHE_ARGUMENT: cache}, use_cache=False)
        with pytest.raises(InvalidRequestError, match="negative"):
            cache.crop(3)
        with pytest.raises(InvalidRequestError, match="has 6"):
            cache.crop(-7)
        with pytest.raises(InvalidRequestError, match="there are 2"):
            cache.reorder_cache(torch.tensor([0, 2]))
        assert cache.get_seq_length() == 6


def test_training_model_is_refused(pool: CachePool) -> None:
    tokens, _ = prompts(1, 5, seed=24)
    with PagedCache(pool) as cache:
        pool.model.train()
        with pytest.raises(UnsupportedModelError, match="training"):
            generate(pool.model, tokens, cache)
        with pytest.raises(UnsupportedModelError, match="training"):
            CachePool(pool.model)
        pool.model.eval()


def test_static_generate_is_refused_and_leaves_nothing_behind(pool: CachePool) -> None:
    tokens, _ = prompts(1, 5, seed=25)
    with PagedCache(pool) as cache:
        with pytest.raises(ValueError, match="cache_implementation"):
            generate(pool.model, tokens, cache, cache_implementation="static")
        assert pool.num_blocks_in_use == 0


def test_models_that_keep_no_plain_cache_are_refused_by_name() -> None:
    mamba = randomised(AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8))
    compiled = small_model("llama")
    compiled._compiled_call_impl = compiled._call_impl  # what compile() leaves, without the seconds that its import takes
    for wrong, message in ((mamba, "Mamba.*recurrent state alone"), (compiled, "compile"), (torch.nn.Linear(2, 2), "not a transformers")):
        with pytest.raises(UnsupportedModelError, match=message):
            PagedCache(wrong)


# States beside K and V.


@pytest.fixture(scope="module")
def hybrid() -> Iterator[CachePool]:
    with CachePool(small_model("qwen3_next"), num_blocks=60, block_size=4) as pool:
        yield pool


def test_copies_of_a_cache_with_states_go_on_by_themselves(hybrid: CachePool) -> None:
    prompt, _ = prompts(1, 9, seed=40)
    with PagedCache(hybrid) as prefilled, torch.no_grad():
        hybrid.model(prompt, **{CACHE_ARGUMENT: prefilled}, use_cache=True)
        for seed in (41, 42):
            whole = torch.cat([prompt, prompts(1, 1, seed=seed)[0]], dim=1)
            with copy.copy(prefilled) as each:
                assert_same_tokens(generate(hybrid.model, whole, each), generate(hybrid.model, whole, None), "copy with states")
        prefilled.batch_repeat_interleave(2)
        whole = torch.cat([prompt.repeat(2, 1), torch.tensor([[4], [9]])], dim=1)
        assert_same_tokens(generate(hybrid.model, whole, prefilled), generate(hybrid.model, whole, None), "repeated with states")
    assert hybrid.num_blocks_in_use == 0


def test_recurrent_state_cannot_be_cropped_and_a_failed_forward_empties_the_cache(hybrid: CachePool) -> None:
    prompt, _ = prompts(1, 9, seed=43)

    def stop(*_: object) -> None:
        raise _StopError

    with PagedCache(hybrid) as cache, torch.no_grad():
        hybrid.model(prompt, **{CACHE_ARGUMENT: cache}, use_cache=True)
        with pytest.raises(InvalidRequestError, match="recurrent"):
            cache.crop(-1)
        assert cache.get_seq_length() == 9
        hook = hybrid.model.get_output_embeddings().register_forward_hook(stop)
        with pytest.raises(_StopError):
            hybrid.model(prompt[:, :1], **{CACHE_ARGUMENT: cache}, use_cache=True)
        hook.remove()
        assert cache.batch_size == -1
        assert not cache.has_previous_state()
        assert_same_tokens(generate(hybrid.model, prompt, cache), generate(hybrid.model, prompt, None), "after the failure")


def test_cache_without_states_says_so_to_a_model_that_asks(pool: CachePool) -> None:
    with PagedCache(pool) as cache, pytest.raises(UnsupportedModelError, match="none when it was tried"):
        cache.has_previous_state(0)


# Mistakes in settings.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 1}, "num_blocks"),
        ({"num_blocks": 9, "kv_cache_memory_bytes": 9}, "give one"),
        ({"kv_cache_memory_bytes": 9}, "kv_cache_memory_bytes"),
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 9, "max_num_seqs": 0}, "max_num_seqs"),
        ({"num_blocks": 9, "check": "sometimes"}, "check"),
        ({"tier": "sparse"}, "tier"),
        ({"fuse": 3}, "fuse"),
    ],
)
def test_wrong_option_is_named(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    hooks = len(model._forward_hooks)
    with pytest.raises(ConfigError, match=message):
        PagedCache(model, **options)
    assert len(model._forward_hooks) == hooks


def test_unknown_option_and_option_of_a_pool_that_exists_are_refused(pool: CachePool) -> None:
    with pytest.raises(TypeError, match="num_pages"):
        PagedCache(pool.model, num_pages=9)
    with pytest.raises(ConfigError, match="num_blocks"):
        PagedCache(pool, num_blocks=9)


# Forwards that do not run to their end.


class _StopError(Exception):
    """Raised in the middle of a forward."""


@pytest.mark.parametrize("error", [_StopError, KeyboardInterrupt])
def test_forward_that_fails_leaves_the_cache_as_it_was(pool: CachePool, error: type[BaseException]) -> None:
    tokens, _ = prompts(2, 10, seed=26)
    want = generate(pool.model, tokens, None)

    def stop(*_: object) -> None:
        raise error

    with PagedCache(pool) as cache, torch.no_grad():
        pool.model(tokens[:, :5], **{CACHE_ARGUMENT: cache}, use_cache=True)
        hook = list(pool.model.modules())[-1].register_forward_hook(stop)
        with pytest.raises(error):
            pool.model(tokens[:, 5:], **{CACHE_ARGUMENT: cache}, use_cache=True)
        hook.remove()
        assert cache.get_seq_length() == 5
        assert pool.num_blocks_in_use == 4
        pool.check()
        assert_same_tokens(generate(pool.model, tokens, cache), want, "after the failure")


def test_failed_forward_that_was_to_copy_blocks_leaves_the_cache_empty(pool: CachePool) -> None:
    tokens, _ = prompts(1, 6, seed=27)

    def stop(*_: object) -> None:
        raise _StopError

    with PagedCache(pool) as cache, torch.no_grad():
        pool.model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True)
        with copy.copy(cache) as other:
            hook = list(pool.model.modules())[-1].register_forward_hook(stop)
            with pytest.raises(_StopError):
                pool.model(tokens[:, :1], **{CACHE_ARGUMENT: other}, use_cache=True)
            hook.remove()
            assert other.batch_size == -1
        assert cache.get_seq_length() == 6
        assert pool.num_blocks_in_use == 2


def test_cache_used_by_two_threads_at_once_is_refused(pool: CachePool) -> None:
    tokens, _ = prompts(1, 6, seed=28)
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(30)

    def run() -> None:
        with torch.no_grad():
            pool.model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True)

    with PagedCache(pool) as cache:
        hook = list(pool.model.modules())[-1].register_forward_hook(wait)
        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(30)
        for use in (run, cache.reset, cache.close):
            with pytest.raises(StepError, match="another thread"):
                use()
        hook.remove()
        go_on.set()
        thread.join()
        assert not errors
        assert cache.get_seq_length() == 6


def test_forward_within_a_forward_is_refused_and_one_without_a_cache_is_none_of_ours(pool: CachePool) -> None:
    tokens, _ = prompts(2, 6, seed=34)
    want = pool.model(tokens).logits
    inner: list[Any] = []

    def nested(*_: object) -> None:
        if inner:
            pool.model(tokens, **inner.pop())

    hook = next(layer for layer in pool.model.modules() if isinstance(layer, torch.nn.ModuleList))[0].register_forward_hook(nested)
    with torch.no_grad(), PagedCache(pool) as cache, PagedCache(pool) as other:
        for past, message in ((cache, "within a forward over it"), (other, "take turns")):
            inner.append({CACHE_ARGUMENT: past, "use_cache": True})
            with pytest.raises(StepError, match=message):
                pool.model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True)
            assert pool.num_blocks_in_use == 0
        hook.remove()
        hook = pool.model.register_forward_pre_hook(nested)
        inner.append({"use_cache": False})
        if pool.tier == "packed":  # the model's attention is ours meanwhile
            with pytest.raises(UnsupportedModelError, match="K or V"):
                pool.model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True)
        else:
            got = pool.model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert cache.get_seq_length() == 6
        hook.remove()


def test_two_threads_with_a_cache_each_take_turns(pool: CachePool) -> None:
    batches = [prompts(2, 8, seed=seed)[0] for seed in (29, 30)]
    want = [pool.model.generate(tokens, **SETTINGS) for tokens in batches]
    got: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        with PagedCache(pool) as cache:
            got[number] = pool.model.generate(batches[number], **{CACHE_ARGUMENT: cache}, **SETTINGS)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert_same_tokens(got[number], want[number], f"thread {number}")
    assert pool.num_blocks_in_use == 0


def test_random_batches_over_one_pool_give_the_same_tokens(pool: CachePool) -> None:
    random = np.random.default_rng(31)
    for turn in range(4):
        rows, columns = int(random.integers(1, 4)), int(random.integers(2, 20))
        tokens, mask = prompts(rows, columns, seed=turn, padding=tuple(random.integers(0, columns, rows).tolist()))
        beams = int(random.integers(1, 4))
        compare(pool, tokens, f"seed 31, turn {turn}", attention_mask=mask, num_beams=beams, max_new_tokens=6)
