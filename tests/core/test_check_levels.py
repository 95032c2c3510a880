"""Check levels of a manager: silent on healthy runs, the same answers at each, and each catches what it promises, at the command."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from core_helpers import ids, make_manager, start

from pagedkv.core import GuardedKVCacheManager, KVCacheManager, call_sites
from pagedkv.errors import ConfigError, InvalidRequestError, InvariantError, StaleHandleError, UnknownHandleError
from pagedkv.scheduling import Request, Scheduler
from pagedkv.testing.stress import stress_manager

Corruption = Callable[[KVCacheManager], object]


def here(offset: int = 0) -> str:
    """``file:line`` of the caller's line, as notes name it."""
    caller = inspect.stack()[1]
    return f"{caller.filename}:{caller.lineno + offset}"


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def busy_manager(check: str) -> KVCacheManager:
    """Three sequences, one of them forked, a pin, something evictable."""
    manager = make_manager([17, 20], check=check, max_num_seqs=6)
    for tokens in ([1] * 6, [2] * 6, [3] * 8):
        start(manager, tokens)
    manager.fork(manager.snapshot().sequences[1].seq, 1)
    manager.pin([1] * 4)
    manager.release([start(manager, [4] * 5)])
    return manager


# Construction.


def test_check_unknown_level_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="check is 'full': it must be one of off, step, audit"):
        make_manager(check="full")


def test_check_off_is_the_plain_class_and_others_are_guarded() -> None:
    assert type(make_manager()) is type(make_manager(check="off")) is KVCacheManager
    assert make_manager().check_level == "off"
    for level in ("step", "audit"):
        manager = make_manager(check=level)
        assert isinstance(manager, GuardedKVCacheManager)
        assert manager.check_level == level


def test_check_derived_class_is_guarded_as_it_is() -> None:
    class Forgetful(KVCacheManager):
        def release(self, seqs: object) -> None:
            rows = self.rows_of(seqs)  # type: ignore[arg-type]
            self._table.close_rows(rows)  # and its blocks stay held

    manager = Forgetful(num_blocks=9, block_size=4, check="audit")
    assert isinstance(manager, GuardedKVCacheManager)
    seq = start(manager, [1] * 6)
    with pytest.raises(InvariantError, match="1 references and 0 mentions"):
        manager.release([seq])
    assert type(type(manager)(num_blocks=9, block_size=4, check="step")) is type(manager)


def test_check_that_the_class_itself_does_not_see_is_refused() -> None:
    class Secretive(KVCacheManager):
        def __init__(self, num_blocks: int) -> None:
            super().__init__(num_blocks=num_blocks, check="audit")

    with pytest.raises(ConfigError, match=r"check is 'audit' in Secretive\(\), whose caller did not choose it"):
        Secretive(9)
    with pytest.raises(ConfigError, match=r"check is 'off' in GuardedKVCacheManager\(\)"):
        GuardedKVCacheManager(num_blocks=9)


# Healthy runs.


@pytest.mark.parametrize("level", ["step", "audit"])
def test_check_level_healthy_life_is_silent_and_answers_as_without(level: str) -> None:
    runs = [
        stress_manager(seed=7, num_operations=600, check="off", manager_factory=partial(KVCacheManager, check=check))
        for check in ("off", level)
    ]
    plain, watched = ((run.by_operation, run.refusals, run.seeds) for run in runs)
    assert plain == watched, "what is drawn depends on what was answered"
    assert plain[1] > 50


# Every command is verified.

COMMANDS: dict[str, Corruption] = {
    "open": lambda manager: manager.open([[1]]),
    "extend": lambda manager: manager.extend([], 1),
    "complete": lambda manager: manager.complete([]),
    "append": lambda manager: manager.append([], []),
    "cancel": lambda manager: manager.cancel([]),
    "fork": lambda manager: manager.fork(manager.snapshot().sequences[0].seq, 1),
    "truncate": lambda manager: manager.truncate([], []),
    "release": lambda manager: manager.release([]),
    "pin": lambda manager: manager.pin([]),
    "unpin": lambda manager: manager.unpin(1),
    "purge": lambda manager: manager.purge("nobody's"),
    "distrust": lambda manager: manager.distrust([]),
}
QUESTIONS = {"check", "free_block_ids", "held_blocks", "match", "num_blocks_needed", "num_exclusive_blocks", "num_held_blocks", "rows_of"}
ACCOUNTS = {"snapshot", "statistics"}


def test_every_public_method_is_a_command_or_known_to_change_nothing() -> None:
    methods = {name for name, member in vars(KVCacheManager).items() if inspect.isfunction(member) and not name.startswith("_")}
    assert methods == {*COMMANDS} | QUESTIONS | ACCOUNTS


@pytest.mark.parametrize("level", ["step", "audit"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_verified(name: str, level: str) -> None:
    manager = busy_manager(level)
    manager.table.num_published[0] += 9
    with pytest.raises(InvariantError) as caught:
        COMMANDS[name](manager)
    assert notes(caught.value).startswith(f"found after {name} at {__file__}:")


# Step: conservation laws.


def _add(column: str, row: int, change: int) -> Corruption:
    def corrupt(manager: KVCacheManager) -> None:
        getattr(manager.table, column)[row] += change

    return corrupt


LAWS: list[tuple[Corruption, str]] = [
    (_add("num_computed", 0, 1), "row 0: 0 <= computed 7 <= reserved 6 <= known 6 tokens does not hold"),
    (_add("num_computed", 1, -7), "row 1: 0 <= computed -1 <= reserved 6"),
    (_add("num_tokens", 0, -1), "row 0: 0 <= computed 6 <= reserved 6 <= known 5"),
    (_add("num_blocks", 0, 1), "row 0: 3 blocks of 4 for 6 reserved tokens"),
    (_add("num_blocks", 0, -1), "row 0: 1 blocks of 4 for 6 reserved tokens"),
    (_add("num_blocks", 2, 1), "row 2: 3 blocks of 4 for 8 reserved tokens"),
    (_add("num_published", 0, 1), "row 0: 2 blocks of 4 are published and 6 tokens computed"),
    (lambda manager: manager.table._free.pop(), "4 rows with a sequence and 1 free ones are not 6 rows"),
    (
        lambda manager: manager._groups[1].pool._references.__setitem__(7, 3),
        "group 1: 12 free, 1 evictable and 7 held blocks are not the pool's 19",
    ),
    (lambda manager: manager._groups[0].pool._references.__setitem__(1, 9), "group 0: 16 references to blocks, and 9 mentions in"),
    (lambda manager: manager._pins.clear(), "group 0: 9 references to blocks, and 8 mentions in tables and pins"),
    (lambda manager: manager._groups[0].pool._cached.__setitem__(2, True), "group 0: 6 blocks are marked as cached, and .* finds 5"),
]


@pytest.mark.parametrize(("corrupt", "law"), LAWS, ids=[law[:50] for _, law in LAWS])
def test_step_level_broken_law_is_named_with_its_numbers_after_the_next_command(corrupt: Corruption, law: str) -> None:
    manager = busy_manager("step")
    manager.pin([])
    corrupt(manager)
    with pytest.raises(InvariantError, match=f"conservation law: {law}") as caught:
        manager.pin([])
    assert notes(caught.value) == f"found after pin at {here(-1)}"


def test_step_level_refused_command_is_verified_as_well() -> None:
    manager = busy_manager("step")
    manager.table.num_tokens[0] -= 1
    with pytest.raises(InvariantError) as caught:
        manager.open([[]])
    assert isinstance(caught.value.__context__, InvalidRequestError)


def test_step_level_interrupted_command_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    manager = busy_manager("step")
    manager.table.num_tokens[0] -= 1
    monkeypatch.setattr(manager._reservations, "cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.cancel([])


def test_step_level_remembers_no_call_sites_and_no_blocks() -> None:
    manager = make_manager(check="step")
    seq = start(manager, [1] * 6)
    manager.release([seq])
    with pytest.raises(StaleHandleError) as caught:
        manager.release([seq])
    assert not notes(caught.value)
    assert isinstance(manager, GuardedKVCacheManager)
    assert [ids.tolist() for ids in manager.take_stale_blocks()] == [[]]


# Audit: everything, and the two call sites.


def test_audit_level_error_that_cancels_out_in_sums_is_found() -> None:
    for level in ("step", "audit"):
        manager = make_manager(check=level)
        start(manager, [1] * 6)
        start(manager, [2] * 6)
        table = manager.table
        table.block_tables[0, :2, 1] = table.block_tables[0, [1, 0], 1]  # each lists the other's last block: all sums are right
        table.block_tables[0, 0, 1], table.block_tables[0, 1, 1] = table.block_tables[0, 1, 1], table.block_tables[0, 1, 1]
        if level == "step":
            manager.pin([])
            continue
        with pytest.raises(InvariantError, match=r"\d references and \d mentions") as caught:
            manager.pin([])
        assert notes(caught.value).startswith(f"found after pin at {here(-1)}")


def test_audit_level_use_of_a_released_sequence_names_both_call_sites() -> None:
    manager = make_manager(check="audit")
    seq, other = start(manager, [1] * 6), start(manager, [2] * 6)
    manager.release([other, seq])
    released = here(-1)
    for use in (
        lambda: manager.release([seq]),
        lambda: manager.extend([seq], 1),
        lambda: manager.fork(seq, 1),
        lambda: manager.rows_of(np.array([seq])),
        lambda: manager.num_exclusive_blocks([seq]),
    ):
        with pytest.raises(StaleHandleError) as caught:
            use()
        assert f"sequence handle {seq} was released at {released} and is used at {__file__}:" in notes(caught.value)
    with pytest.raises(StaleHandleError) as caught:
        manager.complete([seq], [1])
    assert notes(caught.value).endswith(f"is used at {here(-1)}")
    with pytest.raises(UnknownHandleError) as unknown:
        manager.release([99])
    assert not notes(unknown.value)


def test_audit_level_use_of_a_released_pin_names_both_call_sites() -> None:
    manager = make_manager(check="audit")
    pin, _ = manager.pin([1])
    manager.unpin(pin)
    released = here(-1)
    with pytest.raises(StaleHandleError) as caught:
        manager.unpin(pin)
    assert notes(caught.value) == f"pin {pin} was released at {released} and is used at {here(-1)}"


def test_audit_level_table_that_lists_a_freed_block_names_both_call_sites() -> None:
    manager = make_manager(check="audit")
    seq, gone = start(manager, [1] * 6), start(manager, [2] * 6)
    block = int(manager.table.block_tables[0, 1, 1])
    manager.release([gone])
    released = here(-1)
    manager.table.block_tables[0, 0, 1] = block
    with pytest.raises(InvariantError) as caught:
        manager.append([seq], [7])
    used = here(-1)
    assert notes(caught.value).split("\n") == [
        f"found after append at {used}",
        f"group 0: block {block}, which rows [0] list, was let go of by release at {released}",
    ]


def test_audit_level_handles_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_sites, "_MOST_REMEMBERED", 2)
    manager = make_manager(check="audit")
    gone = [start(manager, [token]) for token in range(3)]
    manager.release(gone)
    for seq, known in zip(gone, (False, True, True), strict=True):
        with pytest.raises(StaleHandleError) as caught:
            manager.release([seq])
        assert bool(notes(caught.value)) is known


def test_audit_level_table_with_an_id_beyond_the_pool_is_found() -> None:
    for wrong in (-3, 99):
        manager = make_manager(check="audit")
        start(manager, [1] * 6)
        manager.table.block_tables[0, 0, 2] = wrong
        with pytest.raises(InvariantError, match="row 0: the null block and the table's 2 blocks are mixed up"):
            manager.pin([])


def test_call_site_inside_the_package_is_named_beside_who_called_the_package() -> None:
    scheduler = Scheduler(make_manager(check="audit", max_num_seqs=256))
    scheduler.submit(Request("it", ids(1, 2, 3), max_tokens=4))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.undo(plan)
    scheduler.abort("it")
    released = here(-1)
    with pytest.raises(StaleHandleError) as caught:
        scheduler.manager.release(plan.seqs)
    used = here(-1)
    inside = rf"pagedkv{re.escape(os.sep)}scheduling{re.escape(os.sep)}\w+\.py:\d+"
    assert re.fullmatch(rf"sequence handle \d+ was released at {inside}, called at {released} and is used at {used}", notes(caught.value))


def test_call_site_without_a_caller_outside_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_sites, "_CORE", "")
    assert call_sites.call_site() == "an unknown place"


def test_audit_level_stale_blocks_are_those_let_go_of_or_handed_out_after_eviction() -> None:
    manager = make_manager(6, check="audit", max_seq_len=20)
    assert isinstance(manager, GuardedKVCacheManager)
    (fresh,) = manager.take_stale_blocks()
    assert fresh.tolist() == [1, 2, 3, 4, 5]
    first = start(manager, [1] * 6)
    assert [ids.tolist() for ids in manager.take_stale_blocks()] == [[]], "they hold nothing valid since the first call"
    published, tail = manager.snapshot().sequences[0].block_tables[0]
    manager.release([first])
    assert manager.take_stale_blocks()[0].tolist() == [tail], "the published one can still be found"
    start(manager, [2] * 20)
    assert manager.take_stale_blocks()[0].tolist() == [published], "it was evicted"
    assert manager.purge() == 5
    assert [ids.tolist() for ids in manager.take_stale_blocks()] == [[]], "the sequence holds them"
