from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagedkv.attention import Mask
from pagedkv.errors import ConfigError
from pagedkv.models import ModelRunner, plan_memory
from pagedkv.testing.models import TINY_MODELS, tiny_config, tiny_model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_plan_of_a_config_equals_the_plan_of_the_model_and_its_storage(name: str) -> None:
    model = tiny_model(name)
    plan = plan_memory(model, block_size=4)
    assert plan == plan_memory(tiny_config(name), block_size=4)
    storage = ModelRunner(model, block_size=4).new_storage(10)
    assert storage.nbytes == 10 * plan.nbytes_per_block
    assert plan.num_layers == len(storage.layers) == 2


def test_plan_reads_only_the_config_of_a_folder(tmp_path: Path) -> None:
    config = tiny_config("gemma3")
    config.save_pretrained(tmp_path)
    assert plan_memory(str(tmp_path)) == plan_memory(config)
    assert plan_memory(tmp_path) == plan_memory(config)


def test_plan_of_a_large_config_allocates_nothing() -> None:
    config = tiny_config(
        "llama", hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, vocab_size=128_256
    )
    plan = plan_memory(config, dtype="bfloat16")
    assert plan.nbytes_per_token == 2 * 8 * (128 + 128) * 2


def test_plan_says_what_fits() -> None:
    plan = plan_memory(tiny_config("llama"), block_size=16, memory_bytes=10 * 4096 + 5, max_model_len=33)
    assert (plan.nbytes_per_token, plan.nbytes_per_block) == (256, 4096)
    assert (plan.num_blocks, plan.num_tokens, plan.num_sequences) == (10, 144, 3)
    assert "256 B per token" in str(plan)
    assert "10 blocks, 144 tokens" in str(plan)
    assert "3 fit at once" in str(plan)
    half = plan_memory(tiny_config("llama"), dtype=torch.float16)
    assert half.nbytes_per_token == 128
    assert half.num_blocks is half.num_tokens is half.num_sequences is None
    assert "\n" not in str(half)


def test_plan_counts_only_what_is_inside_a_window() -> None:
    plan = plan_memory(tiny_config("gemma3", max_position_embeddings=4096), block_size=4, memory_bytes=1_000_000, max_model_len=1001)
    (windowed, full), each = plan.layers, 2 * 2 * 16 * 4  # K and V, heads, elements, bytes
    assert (windowed.group, full.group, plan.windows) == (1, 0, (None, Mask.sliding(8)))
    assert plan.nbytes_per_sequence == (1004 + 3 * 4) * each  # two blocks of the window, and the one that is written
    assert plan.num_sequences == (1_000_000 - plan.nbytes_per_block) // plan.nbytes_per_sequence == 3
    assert "502 KiB if layers with windows of 8 (sliding) kept everything; 3 fit at once" in str(plan)


def test_window_that_the_longest_sequence_fits_into_is_none() -> None:
    assert plan_memory(tiny_config("mistral", max_position_embeddings=8)).windows == (None,)
    assert plan_memory(tiny_config("mistral", max_position_embeddings=9)).windows == (None, Mask.sliding(8))


@pytest.mark.parametrize("option", ["block_size", "memory_bytes", "max_model_len"])
@pytest.mark.parametrize("value", [0, -1])
def test_plan_with_a_size_below_one_is_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        plan_memory(tiny_config("llama"), **{option: value})  # type: ignore[arg-type]


def test_plan_with_an_unknown_dtype_or_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        plan_memory(tiny_config("llama"), dtype="int8")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        plan_memory(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="no such GGUF file"):
        plan_memory("nothing.gguf")
