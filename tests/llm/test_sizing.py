"""Pools by layer group: what the work can use, and what fits."""

from __future__ import annotations

import pytest
from llm_support import greedy
from transformers import PreTrainedModel

from pagedkv import LLM
from pagedkv.core import Window
from pagedkv.errors import ConfigError
from pagedkv.scheduling import SchedulerConfig
from pagedkv.sizing import PoolGroup, blocks_for_work, blocks_needed, fit_in_memory, split_blocks
from pagedkv.testing.models import tiny_model

LIMITS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, watermark=0.0)
FULL, NEAR, IDLE = PoolGroup(None, 100), PoolGroup(Window.sliding(33), 300), PoolGroup(None, 0)
WINDOW, STEP, REST = (
    3,
    64 // 16 + 1,
    3,
)  # blocks of 16: two of the window and the one that is written; what a step takes; null block, rounding


def test_windowed_group_needs_the_windows_of_all_that_run_and_a_step() -> None:
    assert blocks_needed([FULL, NEAR], LIMITS, block_size=16, max_model_len=160)[1] == 4 * WINDOW + STEP + REST
    assert blocks_needed([IDLE, NEAR], LIMITS, block_size=16, max_model_len=160) == [4 * 10 + REST, 4 * WINDOW + STEP + REST]
    assert blocks_needed([IDLE, NEAR], LIMITS, block_size=16, max_model_len=2**30)[0] == 2**26 + REST


def test_one_number_is_for_all_groups_that_do_not_need_less() -> None:
    needed = blocks_needed([FULL, NEAR], LIMITS, block_size=16, max_model_len=160)
    assert split_blocks(100, needed, [FULL, NEAR]) == [100, needed[1]]
    assert split_blocks(7, needed, [FULL, NEAR]) == [7, 7]
    assert split_blocks(7, [43, 20], [IDLE, NEAR]) == [43, 7]


def test_work_needs_its_longest_sequences_and_in_windowed_groups_their_windows() -> None:
    work = [(160, 3), (320, 1), (16, 9)]
    assert blocks_for_work(work, [FULL, NEAR], LIMITS, block_size=16) == [20 + 3 * 10 + REST, 4 * WINDOW + STEP + REST]
    assert blocks_for_work([(16, 2)], [FULL, NEAR], LIMITS, block_size=16) == [2 + REST, 2 + REST]
    assert blocks_for_work([(16, 1)], [FULL], SchedulerConfig(watermark=0.5), block_size=16) == [2 + REST]


@pytest.mark.parametrize("nbytes", [800, 1_000, 2_345, 6_400, 10_000, 10_099, 50_000, 2**40])
def test_memory_is_split_so_that_nothing_more_would_fit(nbytes: int) -> None:
    needed = [100, 20]
    full, near = fit_in_memory(nbytes, needed, [FULL, NEAR], setting="memory")
    assert full * 100 + near * 300 <= nbytes
    assert near == min(full, 20)
    assert full == 100 or (full + 1) * 100 + min(full + 1, 20) * 300 > nbytes


def test_memory_of_a_model_without_layers_in_the_first_group_is_all_for_the_others() -> None:
    assert fit_in_memory(3_000, [500, 20], [IDLE, NEAR], setting="memory") == [500, 10]
    with pytest.raises(ConfigError, match="memory is 500 bytes, room for 1 blocks of 300 bytes"):
        fit_in_memory(500, [500, 20], [IDLE, NEAR], setting="memory")


def windowed_model() -> PreTrainedModel:
    return tiny_model("gemma3")


def test_llm_sizes_both_pools_to_the_work_and_grows_each() -> None:
    with LLM(windowed_model(), block_size=4, max_num_seqs=2, max_num_batched_tokens=16) as llm:
        llm.generate([[5, 6, 7]], greedy(5), use_tqdm=False)
        first = [group.num_blocks for group in llm.statistics().cache.groups]
        assert first == [4, 4]
        llm.generate([[5] * 150], greedy(5), use_tqdm=False)
        second = [group.num_blocks for group in llm.statistics().cache.groups]
        assert second[0] >= 39
        assert second[1] < 16, "a window of 8 tokens, and a step of 16"
        before = llm.statistics().num_steps
        llm.generate([[5, 6, 7]], greedy(5), use_tqdm=False)
        assert llm.statistics().num_steps > before, "the same engine"


def test_llm_splits_the_bytes_given() -> None:
    with LLM(windowed_model(), block_size=4, max_num_seqs=2, max_num_batched_tokens=16, kv_cache_memory_bytes=2**17) as llm:
        full, near = (group.num_blocks + 1 for group in llm.statistics().cache.groups)
        assert near < 20 < full
        assert 2**17 - sum(llm.runner.group_nbytes) < llm.statistics().pool_nbytes <= 2**17
