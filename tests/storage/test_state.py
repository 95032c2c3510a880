from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv.errors import ClosedError, ConfigError, InvariantError, PoolAllocationError
from pagedkv.storage import KVStorage, LayerSpec, StateSpec, StateStorage

SPECS = (StateSpec("conv", (3, 4), torch.float32), StateSpec("scan", (2,), torch.float64))


def make_state(num_rows: int = 5) -> StateStorage:
    return StateStorage(SPECS, num_rows=num_rows, device="cpu")


def values(rows: list[int], base: float) -> dict[str, torch.Tensor]:
    return {spec.name: torch.stack([torch.full(spec.shape, base + row, dtype=spec.dtype) for row in rows]) for spec in SPECS}


def put(state: StateStorage, rows: list[int], lens: list[int], base: float = 0.0) -> None:
    state.stage(np.array(rows), np.array(lens, dtype=np.int32), values(rows, base))
    state.commit()


def first(state: StateStorage, rows: list[int], starts: list[int]) -> list[float]:
    read = state.read(np.array(rows), np.array(starts, dtype=np.int32))
    assert set(read) == {"conv", "scan"}
    assert all(torch.equal(read["scan"][:, 0].float(), read["conv"][:, 0, 0]) for _ in rows)
    return [float(value) for value in read["scan"][:, 0]]


def test_state_is_read_back_by_row_and_counts_its_bytes() -> None:
    state = make_state()
    put(state, [3, 1], [7, 2])
    assert first(state, [1, 3], [2, 7]) == [1.0, 3.0]
    assert state.nbytes == 5 * (12 * 4 + 2 * 8)
    assert state.lens.tolist() == [0, 2, 0, 7, 0]


def test_state_read_is_a_copy_and_staged_state_counts_only_once_committed() -> None:
    state = make_state()
    put(state, [0, 2], [4, 4])
    state.read(np.array([0]), np.array([4], dtype=np.int32))["conv"].fill_(9.0)
    state.stage(np.array([0]), np.array([5], dtype=np.int32), values([0], 50.0))
    assert first(state, [0, 2], [4, 4]) == [0.0, 2.0]
    state.begin()
    state.commit()
    assert first(state, [0], [4]) == [0.0]
    put(state, [0], [5], 50.0)
    assert first(state, [0], [5]) == [50.0]


def test_state_of_another_position_is_refused() -> None:
    state = make_state()
    put(state, [0, 1], [4, 6])
    with pytest.raises(InvariantError, match="row 1 goes on from 5 tokens, but 6"):
        state.read(np.array([0, 1]), np.array([4, 5], dtype=np.int32))
    state.follow(1, None)
    with pytest.raises(InvariantError, match="but 0 went"):
        state.check(np.array([1]), np.array([6], dtype=np.int32))
    state.check(np.array([1]), np.array([0], dtype=np.int32))


def test_state_follow_gives_a_fork_what_its_source_has() -> None:
    state = make_state()
    put(state, [2], [8])
    for row, source in ((2, 2), (0, 2), (4, 0)):
        state.follow(row, source)
    assert first(state, [0, 2, 4], [8, 8, 8]) == [2.0, 2.0, 2.0]
    put(state, [2], [9], 10.0)
    assert first(state, [0, 2, 4], [8, 9, 8]) == [2.0, 12.0, 2.0]


def test_state_fill_touches_the_rows_alone() -> None:
    state = make_state()
    put(state, [0, 1, 2], [1, 1, 1])
    state.fill(np.array([1]), float("nan"))
    read = state.read(np.array([0, 1, 2]), np.array([1, 1, 1], dtype=np.int32))
    assert [bool(tensor[row].isnan().all()) for tensor in read.values() for row in range(3)] == [False, True, False] * 2
    assert not read["conv"][[0, 2]].isnan().any()


@pytest.mark.parametrize("wrong", [{}, {"conv": torch.zeros(1, 3, 4)}, {"conv": torch.zeros(1, 3, 5), "scan": torch.zeros(1, 2)}])
def test_state_stage_refuses_what_is_not_the_whole_state(wrong: dict[str, torch.Tensor]) -> None:
    state = make_state()
    with pytest.raises(InvariantError, match=r"conv|scan"):
        state.stage(np.array([0]), np.array([1], dtype=np.int32), wrong)


def test_state_refuses_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="num_rows"):
        make_state(0)
    with pytest.raises(ConfigError, match="at least one tensor"):
        StateStorage([], num_rows=2, device="cpu")
    with pytest.raises(ConfigError, match="name of its own"):
        StateStorage([SPECS[0], SPECS[0]], num_rows=2, device="cpu")
    with pytest.raises(PoolAllocationError, match="max_num_seqs"):
        StateStorage([StateSpec("large", (2**40,), torch.float64)], num_rows=2**20, device="cpu")


def test_state_closes_with_its_storage_which_may_have_no_layer() -> None:
    state = make_state()
    storage = KVStorage([], num_blocks=4, block_size=2, dtype=torch.float32, device="cpu", state=state)
    assert storage.nbytes == 0
    assert storage.layers == ()
    storage.fill([1, 3], 1.0)
    storage.copy_blocks([np.array([[1, 2]], dtype=np.int32)])
    storage.close()
    with pytest.raises(ClosedError):
        state.read(np.array([0]), np.array([0], dtype=np.int32))
    other = KVStorage([LayerSpec(1, 2, 2)], num_blocks=2, block_size=2, dtype=torch.float32, device="cpu")
    assert other.state is None
