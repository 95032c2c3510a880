from __future__ import annotations

from pathlib import Path

import pytest

from pagedkv.core import KVCacheManager
from pagedkv.errors import InvalidRequestError
from pagedkv.plan import Int64Array
from pagedkv.testing.manager_driver import ManagerDriver, run_program
from pagedkv.testing.programs import OPERATIONS, ManagerConfig, MatchPrefix, Open, Program, Prompt, load_program, save_program
from pagedkv.testing.replay import replay
from pagedkv.testing.shrink import shrink
from pagedkv.testing.stress import stress_manager
from pagedkv.testing.stress_report import Report
from pagedkv.testing.token_oracle import TokenOracle
from pagedkv.testing.violations import ViolationError


class ForgetsSharedTails(KVCacheManager):
    """A planted bug: a fork's tail is written without a copy."""

    def fork(self, seq: int, count: int) -> Int64Array:
        children = super().fork(seq, count)
        self.table.tail_shared[:] = False
        return children


def test_stress_healthy_manager_reports_what_it_did() -> None:
    seen: list[Report] = []
    report = stress_manager(seed=3, num_operations=1500, on_progress=seen.append)
    assert report.operations == sum(report.by_operation.values()) == 1500
    assert report.checks >= 1500
    assert report.refusals > 100
    assert set(report.by_operation) == set(OPERATIONS)
    assert seen[-1].operations == report.operations
    assert report.seeds == (3, 7)
    again = stress_manager(seed=3, num_operations=1500)
    assert (again.by_operation, again.refusals) == (report.by_operation, report.refusals)


@pytest.mark.parametrize("check", ["off", "step"])
def test_stress_cheaper_level_consults_less(check: str) -> None:
    assert stress_manager(num_operations=300, check=check, num_blocks=6, block_size=2).checks < 300


def test_stress_time_budget_ends_after_a_session() -> None:
    assert stress_manager(seconds=0.0, check="off").seeds == (0, 0)


def test_stress_broken_manager_is_shrunk_to_a_program_that_fails_again(tmp_path: Path) -> None:
    with pytest.raises(ViolationError) as caught:
        stress_manager(num_operations=2000, manager_factory=ForgetsSharedTails)
    program = caught.value.program
    assert program is not None
    assert any("seed" in note for note in caught.value.__notes__)
    assert len(program.operations) <= 6
    save_program(program, tmp_path / "program.json")
    assert load_program(tmp_path / "program.json") == program
    lines: list[str] = []
    with pytest.raises(ViolationError) as again:
        replay(program, lines.append, manager_factory=ForgetsSharedTails)
    assert again.value.kind == caught.value.kind
    assert any("group 0" in line for line in lines)
    assert lines[-1].startswith("violation")
    replay(program, lines.append)
    assert "no block is held" in lines[-1]
    run_program(program)


@pytest.mark.parametrize("options", [{"num_operations": 0}, {"num_blocks": 2}, {"block_size": 0}, {"check": "some"}])
def test_stress_budget_that_cannot_work_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError):
        stress_manager(**options)


CONFIG = ManagerConfig((5,), 2, 2)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        '{"format": "other"}',
        '{"format": "pagedkv program 1", "config": {"num_blocks": [4], "block_size": "2", "max_num_seqs": 1}, "operations": []}',
        '{"format": "pagedkv program 1", "config": {"num_blocks": [4], "block_size": 2, "max_num_seqs": 1}, "operations": [{"op": "x"}]}',
        '{"format": "pagedkv program 1", "config": {"num_blocks": [4], "block_size": 2, "max_num_seqs": 1}, '
        '"operations": [{"op": "open", "prompts": [{"tokens": []}]}]}',
    ],
)
def test_program_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        Program.from_json(text)


def test_shrink_keeps_what_is_needed_within_its_runs() -> None:
    needed = [MatchPrefix(Prompt((1,))), MatchPrefix(Prompt((2,)))]
    noise = [Open((Prompt((0,)),))] * 20
    program = Program(CONFIG, (*noise, needed[0], *noise, needed[1], *noise))
    runs = []

    def fails(candidate: Program) -> bool:
        runs.append(candidate)
        return all(operation in candidate.operations for operation in needed)

    assert shrink(program, fails).operations == tuple(needed)
    runs.clear()
    assert fails(shrink(program, fails, max_runs=10))
    assert len(runs) <= 11


def test_token_oracle_tells_another_namespace_from_another_history() -> None:
    oracle = TokenOracle([3], 2)
    oracle.write([[2, 3]], oracle.stamps("a", [1, 1]))
    oracle.verify(0, [1], oracle.stamps("a", [1, 1]))
    for name, tokens, kind in (("b", [1, 1], "ownership"), ("a", [1, 2], "tokens"), ("a", [1, 1, 1], "tokens")):
        with pytest.raises(ViolationError) as caught:
            oracle.verify(0, [1], oracle.stamps(name, tokens))
        assert caught.value.kind == kind
    oracle.poison(0, [1])
    with pytest.raises(ViolationError, match="nothing"):
        oracle.verify(0, [1], oracle.stamps("a", [1]))


def test_driver_passes_over_what_means_nothing() -> None:
    driver = ManagerDriver(CONFIG)
    program = Program(CONFIG, (Open((Prompt((1, 0)),)),))
    assert not any(driver.run(operation) for operation in Program.from_json(EMPTY_HANDED).operations)
    assert all(driver.run(operation) for operation in program.operations)
    driver.close()


EMPTY_HANDED = Program.from_json(
    '{"format": "pagedkv program 1", "config": {"num_blocks": [5], "block_size": 2, "max_num_seqs": 2}, "operations": ['
    '{"op": "extend", "seqs": [0], "counts": [0]}, {"op": "complete", "tokens": [1]}, {"op": "cancel", "copies_made": true}, '
    '{"op": "decode", "tokens": [1]}, {"op": "fork", "seq": 0, "count": 1}, {"op": "unpin", "pin": 0}]}'
).to_json()
