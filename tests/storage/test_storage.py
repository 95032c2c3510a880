from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedkv.errors import ClosedError, ConfigError, InvalidRequestError, PoolAllocationError
from pagedkv.storage import KVStorage, LayerSpec


def make_storage(*specs: LayerSpec, num_blocks: int | tuple[int, ...] = 8, block_size: int = 4) -> KVStorage:
    layers = specs or (LayerSpec(2, 8, 8), LayerSpec(3, 6, 10))
    return KVStorage(layers, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device="cpu")


def random_kv(spec: LayerSpec, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(tokens, spec.num_kv_heads, spec.key_dim, generator=generator)
    return key, torch.randn(tokens, spec.num_kv_heads, spec.value_dim, generator=generator)


@pytest.mark.parametrize("layer", [0, 1], ids=["equal widths", "unequal widths"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_write_then_gather_gives_the_tokens_back_and_touches_nothing_else(layer: int, block_size: int) -> None:
    storage = make_storage(block_size=block_size, num_blocks=24)
    storage.fill(range(1, 24), float("nan"))
    length, table = 17, np.random.default_rng(1).permutation(np.arange(1, 24))[: -(-17 // block_size)]
    slots = torch.from_numpy(table[np.arange(length) // block_size] * block_size + np.arange(length) % block_size)
    key, value = random_kv(storage.layers[layer].spec, length)
    storage.write(layer, key, value, slots)
    read_key, read_value = storage.gather(layer, table, length)
    assert torch.equal(read_key, key.transpose(0, 1))
    assert torch.equal(read_value, value.transpose(0, 1))
    pool = storage.layers[layer]
    assert int(pool.key.isfinite().sum()) == key.numel() + pool.key[0].numel()
    assert int(pool.value.isfinite().sum()) == value.numel() + pool.value[0].numel()
    assert not pool.key[0].any()
    assert not pool.value[0].any()


def test_pool_views_have_the_documented_shapes_and_share_one_buffer() -> None:
    storage = make_storage()
    equal, unequal = storage.layers
    assert equal.key.shape == equal.value.shape == (8, 2, 4, 8)
    assert unequal.key.shape == (8, 3, 4, 6)
    assert unequal.value.shape == (8, 3, 4, 10)
    for pool in storage.layers:
        assert pool.key.untyped_storage().data_ptr() == pool.value.untyped_storage().data_ptr()
        assert pool.key.untyped_storage().nbytes() == pool.nbytes
    assert storage.nbytes == sum(pool.nbytes for pool in storage.layers) == 8 * 4 * 4 * (2 * 16 + 3 * 16)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages to ask for")
def test_pool_of_many_blocks_asks_for_large_pages() -> None:
    storage = make_storage(num_blocks=20_000)
    for pool in storage.layers:
        middle, flags = pool.key.data_ptr() + pool.nbytes // 2, ""
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            place = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if place:
                inside = int(place[1], 16) <= middle < int(place[2], 16)
            elif inside and line.startswith("VmFlags:"):
                flags = line
        assert "hg" in flags.split(), flags
        assert not pool.key.any()
        assert not pool.value.any()


def test_pool_rows_are_one_head_of_one_block() -> None:
    for pool in make_storage().layers:
        key, value = random_kv(pool.spec, 1)
        pool.write(key, value, blocks=torch.tensor([5]), offsets=torch.tensor([2]))
        for head in range(pool.spec.num_kv_heads):
            row = 5 * pool.rows_per_block + head
            assert torch.equal(pool.key_rows[row].view(4, -1)[2], key[0, head])
            assert torch.equal(pool.value_rows[row].view(4, -1)[2], value[0, head])


def test_copy_blocks_chain_reads_sources_before_writing_targets() -> None:
    storage = make_storage()
    for block in (1, 2, 3):
        storage.fill([block], float(block))
    storage.copy_blocks([np.array([[1, 2], [2, 3], [3, 7]], dtype=np.int32)])
    for pool in storage.layers:
        assert [float(pool.key[block].mean()) for block in (1, 2, 3, 7)] == [1, 1, 2, 3]
        assert [float(pool.value[block].mean()) for block in (1, 2, 3, 7)] == [1, 1, 2, 3]


def test_copy_blocks_of_one_group_leaves_the_other_alone() -> None:
    storage = make_storage(LayerSpec(1, 4, 4), LayerSpec(1, 4, 4, group=1), num_blocks=(4, 6))
    storage.fill([1], 1.0)
    storage.fill([1], 5.0, group=1)
    none = np.zeros((0, 2), dtype=np.int32)
    storage.copy_blocks([none, np.array([[1, 5]], dtype=np.int32)])
    assert float(storage.layers[1].key[5].mean()) == 5
    assert not storage.layers[0].key[2:].any()
    storage.copy_blocks([none, none])


@pytest.mark.parametrize(
    ("copies", "words"),
    [
        ([[[0, 1]]], r"allows \[1, 8\)"),
        ([[[1, 8]]], r"allows \[1, 8\)"),
        ([[[1, 3], [2, 3]]], "twice"),
        ([[[1, 2, 3]]], r"\[C, 2\]"),
        ([[[1, 2]], [[1, 2]]], "2 entries for 1"),
    ],
)
def test_copy_blocks_wrong_list_is_refused_and_copies_nothing(copies: list[list[list[int]]], words: str) -> None:
    storage = make_storage()
    storage.fill([1], 1.0)
    with pytest.raises(InvalidRequestError, match=words):
        storage.copy_blocks([np.array(pairs, dtype=np.int32) for pairs in copies])
    assert not storage.layers[0].key[2:].any()


@pytest.mark.parametrize(
    ("shape", "slots", "words"),
    [
        ((2, 2, 8), [4], "do not fit"),
        ((1, 3, 8), [4], "do not fit"),
        ((1, 2, 7), [4], "do not fit"),
        ((1, 2, 8), [3], "null block"),
        ((1, 2, 8), [32], "may be written"),
        ((1, 2, 8), [-1], "may be written"),
    ],
)
def test_write_wrong_shape_or_slot_is_refused_and_writes_nothing(shape: tuple[int, ...], slots: list[int], words: str) -> None:
    storage = make_storage()
    with pytest.raises(InvalidRequestError, match=words):
        storage.write(0, torch.ones(shape), torch.ones(shape), torch.tensor(slots))
    assert not storage.layers[0].key.any()
    assert not storage.layers[0].value.any()


def test_write_wrong_dtype_or_gradient_is_refused() -> None:
    storage, slots = make_storage(), torch.tensor([4])
    good = torch.ones(1, 2, 8)
    with pytest.raises(InvalidRequestError, match="the pool stores"):
        storage.write(0, good, good.double(), slots)
    with pytest.raises(InvalidRequestError, match="int64"):
        storage.write(0, good, good, slots.int())
    with pytest.raises(InvalidRequestError, match="inference"):
        storage.write(0, good.clone().requires_grad_(), good, slots)
    assert not storage.layers[0].key.any()


def test_write_no_tokens_changes_nothing() -> None:
    storage = make_storage()
    storage.write(0, torch.ones(0, 2, 8), torch.ones(0, 2, 8), torch.zeros(0, dtype=torch.int64))
    assert not storage.layers[0].key.any()


def test_gather_and_fill_bad_arguments_are_refused() -> None:
    storage = make_storage()
    with pytest.raises(InvalidRequestError, match="length 9"):
        storage.gather(0, [1, 2], 9)
    with pytest.raises(InvalidRequestError, match="block ids reach"):
        storage.gather(0, [1, 8], 8)
    with pytest.raises(InvalidRequestError, match="flat list of integers"):
        storage.gather(0, np.zeros((1, 2)), 1)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="block ids reach"):
        storage.fill([0], 0.0)
    with pytest.raises(InvalidRequestError, match="group is 1"):
        storage.fill([1], 0.0, group=1)
    key, value = storage.gather(0, torch.tensor([1, 0]), 0)
    assert key.shape == (2, 0, 8)
    assert value.shape == (2, 0, 8)


def test_storage_more_than_the_machine_has_is_refused_with_the_sizes() -> None:
    with pytest.raises(PoolAllocationError, match=r"the pools need 2,199,\d{3},\d{3},\d{3} bytes: 2 layers.*num_blocks") as caught:
        make_storage(LayerSpec(2, 8, 8), LayerSpec(2, 8, 8), num_blocks=2**31 - 1, block_size=4)
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize(
    ("layers", "num_blocks", "block_size", "words"),
    [
        ([], 4, 4, "layers is empty"),
        ([LayerSpec(1, 4, 4, group=2)], 4, 4, "without a hole"),
        ([LayerSpec(1, 4, 4)], 1, 4, "num_blocks is 1"),
        ([LayerSpec(1, 4, 4)], 4, 0, "block_size is 0"),
        ([LayerSpec(1, 4, 4)], (4, 4), 4, "2 entries for 1"),
    ],
)
def test_storage_sizes_out_of_range_are_refused(
    layers: list[LayerSpec], num_blocks: int | tuple[int, ...], block_size: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        KVStorage(layers, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device="cpu")


def test_storage_integer_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="floating"):
        KVStorage([LayerSpec(1, 4, 4)], num_blocks=4, block_size=4, dtype=torch.int8, device="cpu")


@pytest.mark.parametrize("change", [{"num_kv_heads": 0}, {"key_dim": 0}, {"value_dim": -1}, {"group": -1}])
def test_layer_spec_count_out_of_range_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        LayerSpec(**{"num_kv_heads": 1, "key_dim": 4, "value_dim": 4, **change})


def test_close_then_use_is_refused_and_close_again_is_not() -> None:
    storage = make_storage()
    storage.close()
    storage.close()
    with pytest.raises(ClosedError):
        _ = storage.layers
    with pytest.raises(ClosedError):
        storage.write(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([4]))
