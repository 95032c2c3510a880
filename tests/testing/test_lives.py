"""Lives as values: what cutting down keeps, and that a life cut down is the same as far as it goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pagedkv.errors import InvalidRequestError
from pagedkv.testing.hash_model import HashModel
from pagedkv.testing.lives import Life, shrink_life
from pagedkv.testing.simulation import simulate, simulate_life
from pagedkv.testing.stress_engine import stress_engine
from pagedkv.testing.stress_report import Budget

WHOLE = Life(5, tuple(range(10)), turns=tuple(range(0, 40, 3)))


def test_shrink_life_keeps_what_is_needed() -> None:
    def fails(life: Life) -> bool:
        return {2, 7} <= set(life.requests) and 9 in (life.turns or ())

    assert shrink_life(WHOLE, fails) == replace(WHOLE, requests=(2, 7), turns=(9,))
    assert shrink_life(WHOLE, lambda life: True) == replace(WHOLE, requests=(0,), turns=())
    assert shrink_life(WHOLE, lambda life: False) == WHOLE


def test_shrink_life_stops_when_the_runs_are_used_up() -> None:
    runs: list[Life] = []

    def fails(life: Life) -> bool:
        runs.append(life)
        return True

    assert shrink_life(WHOLE, fails, max_runs=3).requests == tuple(range(7))
    assert len(runs) == 3


def test_life_with_all_turns_told_is_the_same_life() -> None:
    told = Life(4, tuple(range(10)), turns=tuple(range(1000)))
    assert simulate_life(told).digest == simulate(4).digest
    assert simulate_life(replace(told, turns=())).num_purges == 0


def test_watched_life_tells_what_happens_and_shows_the_tables() -> None:
    told: list[str] = []
    report = simulate_life(Life(4, tuple(range(10))), watch=told.append)
    assert sum(line.startswith("--- step") for line in told) == report.num_steps
    assert sum(" comes Job(name=" in line for line in told) + report.num_refused == 10
    assert sum(" ended r" in line for line in told) == report.num_ended
    assert any("group 0: " in line and "blocks of" in line and " is r" in line for line in told)
    assert simulate(4).digest == report.digest


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"format": "other"}', WHOLE.to_json().replace("5", '"5"'), WHOLE.to_json().replace("true", "1")]
)
def test_life_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a life"):
        Life.from_json(text)


def test_life_that_cannot_be_is_refused() -> None:
    for options in ({"num_blocks": 2}, {"block_size": 0}):
        with pytest.raises(InvalidRequestError, match="it must be at least"):
            Life(0, (0,), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="come together"):
        simulate_life(WHOLE, HashModel())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="num_operations"):
        stress_engine(simulate_life, WHOLE, num_steps=0)


def test_stress_engine_is_the_sum_of_its_lives() -> None:
    lives = [simulate(seed) for seed in (8, 9)]
    report = stress_engine(simulate_life, Life(8, tuple(range(10))), num_steps=lives[0].num_steps + 1)
    assert report.seeds == (8, 9)
    assert report.operations == report.by_operation["steps"] == sum(life.num_steps for life in lives)
    assert report.faults == sum(life.num_failed_steps + life.num_spoilt for life in lives)
    assert report.peak_blocks == max(life.peak_blocks for life in lives)


@pytest.mark.parametrize("budget", [(0, None), (None, -1.0), (None, float("nan")), (None, float("inf"))])
def test_budget_that_is_none_is_refused(budget: tuple[int | None, float | None]) -> None:
    with pytest.raises(InvalidRequestError, match="it must be"):
        Budget(*budget)
