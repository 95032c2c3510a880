"""Bugs of the manager, the prefix cache, the storage and the batch, planted one at a time: the kit kills every one of them.

Managers and storages run random programs, counted in operations; what only an engine shows, an engine's simulated lives, counted in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median

import pytest
from manager_bugs import MANAGER_BUGS
from planting import MAX_LIVES, MAX_PROGRAMS, PROGRAM_LENGTH, Kill, kill_with_lives, kill_with_programs
from storage_bugs import BATCH_BUGS, STORAGE_BUGS
from window_bugs import WINDOW_BUGS

from pagedkv.testing.manager_driver import ORACLES
from pagedkv.testing.storage_oracle import StorageOracle

BUGS = {**MANAGER_BUGS, **WINDOW_BUGS, **STORAGE_BUGS, **BATCH_BUGS}


@cache
def kill(name: str) -> Kill | None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        BUGS[name](monkeypatch)
        if name in BATCH_BUGS:
            return kill_with_lives()
        if name in STORAGE_BUGS:
            return kill_with_programs(("tokens",), storage=StorageOracle, least_block_size=2)  # a block of one token is never copied
        return kill_with_programs()


@pytest.mark.parametrize("name", BUGS)
def test_kit_kills_the_bug(name: str, record_property: Callable[[str, object], None]) -> None:
    killed = kill(name)
    assert killed is not None, f"{name!r} survived {MAX_PROGRAMS} programs of {PROGRAM_LENGTH} operations, or {MAX_LIVES} lives"
    assert killed.kind != "crash", "whoever only crashes was planted badly"
    record_property("operations", killed.operations)
    record_property("kind", killed.kind)


def test_kit_kills_every_bug_summary(capsys: pytest.CaptureFixture[str]) -> None:
    kills = {name: kill(name) for name in BUGS}
    counts = {name: killed.operations for name, killed in kills.items() if killed is not None}
    programs = [counts[name] for name in counts if name not in BATCH_BUGS]
    lives = [counts[name] for name in counts if name in BATCH_BUGS]
    with capsys.disabled():
        print(
            f"\nplanted bugs: {len(BUGS)}, killed: {len(counts)}; operations: median {median(programs):g}, worst {max(programs)}; "
            f"steps of the {len(lives)} that an engine shows: median {median(lives):g}, worst {max(lives)}"
        )
    assert len(counts) == len(BUGS) >= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("oracle", "name"), [("tokens", "the copy list is dropped"), ("reference", "copies are not counted among the blocks needed")]
)
def test_bug_survives_all_programs_where_its_only_oracle_is_off(oracle: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MANAGER_BUGS[name](monkeypatch)
    assert kill_with_programs([other for other in ORACLES if other != oracle]) is None
    killed = kill_with_programs([oracle])
    assert killed is not None
    assert killed.kind in (oracle, "ownership")  # a slot that another namespace wrote is the token oracle's to tell
