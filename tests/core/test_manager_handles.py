"""Handles that mean nothing: released, forged, given twice, no integers; every command refuses them and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from core_helpers import ids, make_manager, start

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError, StaleHandleError, UnknownHandleError


def test_command_with_a_released_handle_is_refused(handle_command: str) -> None:
    manager = make_manager()
    seq, other = start(manager, [1, 2, 3]), start(manager, [4, 5])
    manager.release([seq])
    call_refused(manager, handle_command, [other, seq], StaleHandleError)


@pytest.mark.parametrize("forged", [0, -3, 12345, (1 << 32) + 3, (9 << 32)])
def test_command_with_a_forged_handle_is_refused(handle_command: str, forged: int) -> None:
    manager = make_manager()
    other = start(manager, [4, 5])
    call_refused(manager, handle_command, [other, forged], UnknownHandleError)


@pytest.mark.parametrize("handles", [[1.5], [[1 << 32]], ["a"], [2**70], [[1], [2, 3]]])
def test_command_with_no_flat_list_of_handles_is_refused(handle_command: str, handles: list[object]) -> None:
    if handle_command == "fork":
        return
    manager = make_manager()
    start(manager, [4, 5])
    call_refused(manager, handle_command, handles, InvalidRequestError)


def test_command_with_a_handle_given_twice_is_refused(handle_command: str) -> None:
    if handle_command == "fork":
        return
    manager = make_manager()
    other = start(manager, [4, 5])
    call_refused(manager, handle_command, [other, other], InvalidRequestError)


@pytest.fixture(params=["extend", "extend by one", "complete", "append", "cancel", "fork", "truncate", "release", "exclusive"])
def handle_command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def call_refused(manager: KVCacheManager, command: str, handles: list[int] | list[object], error: type[Exception]) -> None:
    """The command raises and leaves everything as it was."""
    seqs: list[int] = handles  # type: ignore[assignment]
    count = len(handles)
    before = manager.snapshot()
    with pytest.raises(error):
        {
            "extend": lambda: manager.extend(seqs, [1] * count),
            "extend by one": lambda: manager.extend(seqs, 1),
            "complete": lambda: manager.complete(seqs, [0] * count),
            "append": lambda: manager.append(seqs, [0] * count),
            "cancel": lambda: manager.cancel(seqs),
            "fork": lambda: manager.fork(seqs[-1], 1),
            "truncate": lambda: manager.truncate(seqs, [1] * count),
            "release": lambda: manager.release(seqs),
            "exclusive": lambda: manager.num_exclusive_blocks(seqs),
        }[command]()
    assert manager.snapshot() == before
    manager.check()


def test_handles_as_an_int64_array_are_taken_as_they_are() -> None:
    manager = make_manager()
    opened = manager.open([[1], [2]])
    assert manager.rows_of(opened.seqs).tolist() == [0, 1]
    assert manager.rows_of(opened.seqs.astype(np.uint64)).tolist() == [0, 1]
    assert manager.rows_of(ids()).tolist() == []
